"""Step time of MEAL V2 training, as a ratio to what it is made of.

    python benchmarks/step.py --student resnet18 --teachers resnet50 resnet34 --batch-size 16 --img-size 112

The floor is the student's own training step (cross-entropy) plus one forward pass of each teacher, each run alone,
eager and in contiguous memory format. With it take turns, round by round: a plain loop with the teachers' mean
probability, timm's logit distillation and, where it is installed (`pip install -e .[benchmarks]`), torchdistill's, both
from the first teacher (their floor has that one alone), and `MealV2Task` with all that is in it. Ratios are formed
within each round. Forms in bfloat16 autocast student and teachers; the floor stays in float32, or what `--amp` and
`--teacher-dtype` say. Weights are random: only time is measured, and with `--threads 1` on a CPU that is CPU time.
"""

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import timm
import torch
from measuring import in_turn, publish, ratios, spread
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mealv2 import EnsembleTeacher, MealV2Task
from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}
OURS = {
    'eager': (),
    'channels_last': ('channels_last',),
    'channels_last, teachers optimized': ('channels_last', 'optimized'),
    'channels_last, teachers optimized and compiled': ('channels_last', 'optimized', 'teachers compiled'),
    'channels_last, all compiled': ('channels_last', 'optimized', 'compiled'),
    'channels_last, teachers optimized, one teacher a sample': ('channels_last', 'optimized', 'one a sample'),
    'channels_last, teachers optimized, bfloat16': ('channels_last', 'optimized', 'bfloat16'),
    'channels_last, all compiled, bfloat16': ('channels_last', 'optimized', 'compiled', 'bfloat16'),
}

_LOGITS = {'path': '.', 'io': 'output'}  # where torchdistill finds them: in what the whole model returns


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--student', default='resnet18', help='timm architecture')
    add('--teachers', nargs='+', default=['resnet50', 'resnet34'], help='timm architectures')
    add('--num-classes', type=int, default=1000)
    add('--batch-size', type=int, default=16)
    add('--img-size', type=int, default=112)
    add('--rounds', type=int, default=12, help='rounds that are measured')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--threads', type=int, help='CPU threads of torch; all cores if not given')
    add('--amp', choices=sorted(DTYPES), help="autocast of the student's step, also in the floor")
    add('--teacher-dtype', choices=sorted(DTYPES), help='autocast of teachers, also in the floor')
    float32 = [name for name in OURS if 'bfloat16' not in name]  # a CPU without bfloat16 takes minutes for a step
    add('--ours', nargs='+', choices=list(OURS), default=float32, help='forms of MealV2Task; float32 if not given')
    add('--save', action='store_true', help='write benchmarks/results/step.json')
    return parser


def uses_cpu_time(args: argparse.Namespace) -> bool:
    """Whether CPU time is measured: that of one thread, which other programs on the machine hardly change."""
    return args.device == 'cpu' and args.threads == 1


def create(name: str, seed: int, args: argparse.Namespace) -> nn.Module:
    """Create a model with random weights for the number of classes and, where it is fixed, the image size asked for."""
    torch.manual_seed(seed)
    try:
        options = timm.models.resolve_model_input_args(name, {'img_size': args.img_size})
        model = timm.create_model(**{**options, 'num_classes': args.num_classes})
    except (RuntimeError, ValueError) as error:
        raise UserError(f'{name} cannot be created: {error}') from error
    return model.to(args.device)


def distillation_box(teacher: nn.Module, student: nn.Module, device: torch.device) -> Any:
    """Return torchdistill's forward pass and loss: the divergence from the teacher's probabilities, as timm's task."""
    from torchdistill.core.distillation import DistillationBox

    ends = {f'{model}_module_{what}': end for model in ('student', 'teacher') for what, end in _LOGITS.items()}
    loss = {'key': 'KDLoss', 'kwargs': {**ends, 'temperature': 1.0, 'alpha': 0.0}}
    config = {
        'num_epochs': 1,
        'teacher': {'forward_proc': 'forward_batch_only', 'requires_grad': False},
        'student': {'forward_proc': 'forward_batch_only'},
        'criterion': {'key': 'WeightedSumLoss', 'kwargs': {'sub_terms': {'kd': {'criterion': loss, 'weight': 1.0}}}},
    }
    return DistillationBox(teacher, student, {}, config, device, device_ids=None, distributed=False, lr_factor=1.0)


def build_arms(args: argparse.Namespace) -> dict[str, Callable[[int], float]]:
    """All that takes turns: the parts of the floor, then the steps; each returns milliseconds."""
    device = torch.device(args.device)
    clock = time.process_time if uses_cpu_time(args) else time.perf_counter
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    target = torch.randint(0, args.num_classes, (args.batch_size,), device=device)

    def autocast(dtype: str | None) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=DTYPES.get(dtype or ''), enabled=dtype is not None)

    def timed(function: Callable[[], object]) -> Callable[[int], float]:
        def call(_: int) -> float:
            begin = clock()
            function()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            return 1000 * (clock() - begin)

        return call

    def training(module: nn.Module, loss_of: Callable[[], Any], dtype: str | None = args.amp) -> Callable[[int], float]:
        optimizer = create_optimizer_v2(module, opt='sgd', lr=1e-4, momentum=0.9, weight_decay=0.0)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')

        def step() -> None:
            with autocast(dtype):
                loss = loss_of()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return timed(step)

    teachers = [create(name, seed, args).eval() for seed, name in enumerate(args.teachers, 1)]
    # Each arm has a student of its own, and none a layout that another has chosen.
    student, plain, timms, torchdistills = (create(args.student, 0, args).train() for _ in range(4))

    @torch.inference_mode()
    def predict(teacher: nn.Module) -> Tensor:
        with autocast(args.teacher_dtype):
            return teacher(images)

    def plain_loss() -> Tensor:
        probabilities = torch.stack([predict(teacher).float().softmax(dim=1) for teacher in teachers]).mean(dim=0)
        return -(probabilities.clone() * F.log_softmax(plain(images).float(), dim=1)).sum(dim=1).mean()

    def loss_of_task(task: nn.Module, x: Tensor) -> Tensor:
        return task(x, target)['loss']

    arms = {'student': training(student, lambda: F.cross_entropy(student(images), target))}
    arms |= {f'teacher {i}': timed(partial(predict, teacher)) for i, teacher in enumerate(teachers, 1)}
    arms['plain loop'] = training(plain, plain_loss)
    logit = LogitDistillationTask(timms, copy.deepcopy(teachers[0]), criterion=None, device=device, verbose=False)
    arms["timm's logit distillation"] = training(timms, lambda: logit(images, target)['loss'])
    if importlib.util.find_spec('torchdistill'):
        box = distillation_box(copy.deepcopy(teachers[0]), torchdistills, device)
        arms["torchdistill's knowledge distillation"] = training(
            torchdistills, lambda: box.forward_process(images, target)
        )
    for name in args.ours:
        amp, teacher_dtype = ('bfloat16', 'bfloat16') if 'bfloat16' in OURS[name] else (args.amp, args.teacher_dtype)
        ensemble = EnsembleTeacher(copy.deepcopy(teachers), autocast_dtype=DTYPES.get(teacher_dtype or ''))
        model, x = create(args.student, 0, args).train(), images
        if 'channels_last' in OURS[name]:
            model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        per_sample = 1 if 'one a sample' in OURS[name] else None
        task = MealV2Task(model, ensemble, teachers_per_sample=per_sample, verbose=False).train()
        step = training(task.get_trainable_module(), partial(loss_of_task, task, x), amp)
        if 'optimized' in OURS[name]:
            ensemble.optimize_for_inference()
        if 'teachers compiled' in OURS[name]:
            ensemble.compile_each()
        if 'compiled' in OURS[name]:
            task.compile()
        arms[f'ours, {name}'] = step
    return arms


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the JSON file if asked for."""
    args = build_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    times = in_turn(build_arms(args), args.rounds, warmup=2)
    student, *each = (times.pop(name) for name in ['student', *(f'teacher {i + 1}' for i in range(len(args.teachers)))])
    floor = [sum(parts) for parts in zip(student, *each, strict=True)]
    floor_of_one = [sum(parts) for parts in zip(student, each[0], strict=True)]
    rows = [['floor: student alone + teachers alone', spread(floor, 0), '1']]
    for name, values in times.items():
        parts = floor_of_one if 'distillation' in name else floor
        rows.append([name, spread(values, 0), spread(ratios(values, parts), 3)])
    title = (
        f'A training step of {args.student} from {" + ".join(args.teachers)}, {args.batch_size} images of '
        f'{args.img_size} pixels, {args.device}, {torch.get_num_threads()} threads: median and quartiles of '
        f'{args.rounds} rounds{", in CPU time" if uses_cpu_time(args) else ""}.'
    )
    publish('step', title, ['step', 'ms', 'ratio to the floor'], rows, args.save)


if __name__ == '__main__':
    run_cli(main)
