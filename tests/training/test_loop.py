"""What a training step asks of the device: how many operators, and never an answer."""

import collections
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch.utils._python_dispatch import TorchDispatchMode

from timm_mealv2 import MealV2Task
from timm_mealv2.data.unreadable import BadImages
from timm_mealv2.training import stopping
from timm_mealv2.training.distributed import Processes
from timm_mealv2.training.loop import Stepper
from timm_mealv2.training.meters import Meters
from timm_mealv2.training.stopping import Guard, Signals


class Counting(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def make_stepper(device: str = 'cpu', clip_grad: float | None = None, **options: Any) -> Stepper:
    torch.manual_seed(0)
    student = timm.create_model('test_resnet', num_classes=3).to(device)
    teachers = [timm.create_model(name, num_classes=3) for name in ('test_resnet', 'test_efficientnet')]
    task = MealV2Task(student, teachers, verbose=False)
    stepper = Stepper(task, create_optimizer_v2(task.get_trainable_module(), lr=0.01, **options), clip_grad=clip_grad)
    stepper.train()
    return stepper


def step(stepper: Stepper, update: int, meters: Meters) -> float:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(update))
    device = stepper.task.device
    scalars, norm = stepper.step(images.to(device), (torch.arange(4) % 3).to(device), update=update)
    assert norm is not None
    meters.update([(scalars, 4)], norm)
    return norm


@pytest.mark.parametrize(
    'options', [{'opt': 'sgd'}, {'opt': 'adamw', 'fused': True, 'clip_grad': 1.0}, {'opt': 'sgd', 'foreach': True}]
)
def test_a_step_waits_for_the_device_once(options: dict[str, Any]) -> None:
    stepper, meters = make_stepper(**options), Meters()
    step(stepper, 0, meters)
    with Counting() as mode:
        step(stepper, 1, meters)
    assert sum(mode.counts[name] for name in ('_local_scalar_dense', 'nonzero', 'is_nonzero')) == 1
    assert mode.counts['clone'] + mode.counts['copy_'] + mode.counts['_to_copy'] <= 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_gpu_is_waited_for_once_a_step() -> None:
    stepper, meters = make_stepper('cuda', opt='sgd', fused=True), Meters()
    step(stepper, 0, meters)
    batch = torch.rand(4, 3, 32, 32, device='cuda'), torch.arange(4, device='cuda') % 3
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter('always')
            for update in range(1, 20):
                scalars, norm = stepper.step(*batch, update=update)
                assert norm is not None
                meters.update([(scalars, 4)], norm)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len(waits) == 19


@pytest.mark.parametrize('clip_grad', [None, 0.01])
def test_the_norm_is_that_of_all_gradients_before_clipping(clip_grad: float | None) -> None:
    stepper, reference = (make_stepper(opt='momentum', clip_grad=bound) for bound in (clip_grad, None))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reference.task(images, torch.arange(4) % 3)['loss'].backward()
    gradients = [p.grad for p in reference.task.get_clip_parameters()]
    expected = torch.cat([gradient.flatten() for gradient in gradients]).double().norm().item()
    before = [parameter.detach().clone() for parameter in stepper.task.get_clip_parameters()]
    meters = Meters()
    assert step(stepper, 0, meters) == pytest.approx(expected, rel=1e-5)
    assert meters.means()['grad_norm'] == pytest.approx(expected, rel=1e-5)
    moved = [(a - b).flatten() for a, b in zip(stepper.task.get_clip_parameters(), before, strict=True)]
    bound = expected if clip_grad is None else clip_grad
    assert torch.cat(moved).norm().item() == pytest.approx(0.01 * bound, rel=1e-2)


def test_updates_that_are_not_finite_count_in_no_mean() -> None:
    meters = Meters()
    meters.update([({'loss': torch.tensor(1.0)}, 2), ({'loss': torch.tensor(4.0)}, 4)], 3.0)
    meters.update([({'loss': torch.tensor(math.nan)}, 2)], math.inf)
    meters.update([({'loss': torch.tensor(2.0)}, 2)], 5.0)
    assert meters.means() == {'loss': 22 / 8, 'grad_norm': 4.0}


class Fleet(Processes):
    """Stands for two processes, the other one ten times slower; counts the exchanges."""

    exchanges = 0

    @property
    def distributed(self) -> bool:
        return True

    def maxima(self, values: Sequence[int]) -> list[int]:
        Fleet.exchanges += 1
        signal, news, microseconds = values
        return [signal, news, 10 * microseconds]


@pytest.mark.parametrize(('interval', 'seconds', 'expected'), [(50, 0.0001, 50), (50, 0.01, 10), (50, 1.0, 1)])
def test_processes_exchange_news_at_each_interval_or_second(
    interval: int, seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(stopping.time, 'perf_counter', lambda: now)
    Fleet.exchanges = 0
    guard = Guard(Signals(), BadImages(), Fleet(torch.device('cpu')), interval)
    exchanged = []
    for update in clock:
        now = update * seconds
        before = Fleet.exchanges
        guard.after_update(update)
        if Fleet.exchanges > before:
            exchanged.append(update)
        if len(exchanged) == 10:
            break
    gaps = {later - former for former, later in itertools.pairwise(exchanged[2:])}
    assert gaps == {expected}
