"""Two gloo processes train what one process trains with the double batch."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from timm_mealv2 import MealV2Task
from timm_mealv2.task import scale_discriminator_lr

BATCH = 8
STEPS = 3
SCENARIOS: dict[str, dict[str, Any]] = {
    'official': {},
    'adversarial': {'discriminator_mode': 'adversarial'},
    'no_discriminator': {'discriminator_weight': 0.0},
    'hard_labels': {'hard_label_weight': 0.5},
    'stored_labels': {'stored': True},
    'accumulated': {'accumulate': 2},
    'compiled': {'compiled': True},
    'optimized': {'optimized': True},
}


def build_model(name: str, seed: int, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=10, **kwargs).double()


def train(scenario: str, rank: int, world_size: int) -> dict[str, Any]:
    """Train with this process's share of every batch; return the losses, the gradients and the weights."""
    options = dict(SCENARIOS[scenario])
    accumulate, stored = options.pop('accumulate', 1), options.pop('stored', False)
    compiled, optimized = options.pop('compiled', False), options.pop('optimized', False)
    teachers = None if stored else [build_model('test_resnet', seed) for seed in (1, 2)]
    # The student has no batch statistics. Its processes start from different weights: rank 0's have to win.
    student = build_model('test_vit', seed=10 + rank, img_size=32)
    torch.manual_seed(20 + rank)
    task = MealV2Task(student, teachers, verbose=False, **options)
    if task.discriminator is not None:
        nn.init.constant_(task.discriminator.fc3.bias, 0.5)  # no dead final ReLU
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.02, momentum=0.9, weight_decay=0.0)
    scale_discriminator_lr(optimizer, task, 0.5)
    if compiled:
        task.compile(backend='eager')
    if world_size > 1:
        task.prepare_distributed()
        assert isinstance(task.trainable_module, DistributedDataParallel)
        assert not task.trainable_module.find_unused_parameters
        assert not any('teacher' in name for name, _ in task.trainable_module.named_parameters())
    task.train()
    if optimized:
        task.teacher.optimize_for_inference()

    generator = torch.Generator().manual_seed(0)
    losses, gradients = [], []
    for _ in range(STEPS):
        x = torch.randn(BATCH, 3, 32, 32, dtype=torch.float64, generator=generator)
        target = torch.randint(0, 10, (BATCH,), generator=generator)
        if stored:
            p = torch.randn(BATCH, 10, dtype=torch.float64, generator=generator).softmax(dim=1).topk(3, dim=1)
            target = torch.cat([target[:, None].double(), p.indices.double(), p.values], dim=1)
        parts = list(zip(x.chunk(world_size * accumulate), target.chunk(world_size * accumulate), strict=True))
        parts = parts[rank::world_size]
        optimizer.zero_grad()
        with task.no_sync():
            results = [backward(task, part, accumulate) for part in parts[:-1]]
        results.append(backward(task, parts[-1], accumulate))
        losses.append({name: sum(result[name] for result in results) / accumulate for name in results[0]})
        gradients.append([p.grad.clone() for p in task.get_clip_parameters()])
        optimizer.step()
    return {
        'losses': losses,
        'gradients': gradients,
        'checkpoint': task.get_checkpoint_state(),
        'optimized': []
        if task.teacher is None
        else [a is not b for a, b in zip(task.teacher.running, task.teacher.teachers, strict=True)],
        'eval_type': type(task.get_eval_model()).__name__,
    }


def backward(task: MealV2Task, part: tuple[Tensor, Tensor], accumulate: int) -> dict[str, Tensor]:
    result = task(*part)
    (result['loss'] / accumulate).backward()
    return {name: value.detach() for name, value in result.items() if name != 'output'}


def worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting-point', rank=rank, world_size=world_size)
    for scenario in SCENARIOS:
        torch.save(train(scenario, rank, world_size), f'{folder}/{scenario}-{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each of two processes returned from `train`, `SCENARIO-RANK.pt`."""
    folder = tmp_path_factory.mktemp('ddp')
    importlib.import_module('torch._dynamo')  # here once, not in each process
    torch.multiprocessing.start_processes(worker, args=(2, str(folder)), nprocs=2, start_method='fork')
    return folder


@pytest.mark.parametrize('scenario', SCENARIOS)
def test_two_processes_equal_one_with_the_double_batch(two_processes: Path, scenario: str) -> None:
    first, second = (torch.load(two_processes / f'{scenario}-{rank}.pt', weights_only=True) for rank in (0, 1))
    alone = train(scenario, 0, 1)
    for step in range(STEPS):
        for name, expected in alone['losses'][step].items():
            mean = (first['losses'][step][name] + second['losses'][step][name]) / 2
            torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12, msg=f'step {step} {name}')
        for ours, theirs, expected in zip(
            first['gradients'][step], second['gradients'][step], alone['gradients'][step], strict=True
        ):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-11)
    assert first['checkpoint'].keys() == second['checkpoint'].keys() == alone['checkpoint'].keys()
    state, expected_state = first['checkpoint']['state_dict'], alone['checkpoint']['state_dict']
    assert state.keys() == expected_state.keys() == build_model('test_vit', 0, img_size=32).state_dict().keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected_state[name], rtol=1e-8, atol=1e-11)
    if scenario != 'no_discriminator':
        d, expected_d = (run['checkpoint']['task_state']['discriminator'] for run in (first, alone))
        assert torch.stack([gradient.abs().max() for gradient in first['gradients'][0][-6:]]).max() > 0
        for name, value in d.items():
            torch.testing.assert_close(value, expected_d[name], rtol=1e-8, atol=1e-11)


def test_both_processes_decide_alike_which_teachers_are_optimized(two_processes: Path) -> None:
    for rank in (0, 1):
        assert torch.load(two_processes / f'optimized-{rank}.pt')['optimized'] == [True, True]


def test_a_distributed_task_evaluates_the_bare_student(two_processes: Path) -> None:
    run = torch.load(two_processes / 'official-0.pt', weights_only=True)
    assert run['eval_type'] == 'VisionTransformer'
