"""Step time of MEAL V2 training, as a ratio to what it is made of.

    python benchmarks/step_time.py --student resnet18 --teachers resnet50 resnet34 --batch-size 16 --img-size 96

The reference is the student's own training step (cross-entropy) plus one forward pass of each teacher, each run alone,
eager and in contiguous memory format. The measured step is `MealV2Task` with everything in it: teachers, losses,
discriminator, backward pass and optimizer. The two parts of the reference and the step take turns, round by round, so
that what else the machine does meets all of them; the ratio is formed within each round. Weights are random: only time
is measured.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from timm_mealv2 import EnsembleTeacher, MealV2Task
from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--student', default='resnet18', help='timm architecture')
    parser.add_argument('--teachers', nargs='+', default=['resnet50', 'resnet34'], help='timm architectures')
    parser.add_argument('--num-classes', type=int, default=1000)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--img-size', type=int, default=96)
    parser.add_argument('--steps', type=int, default=20, help='rounds that are measured')
    parser.add_argument('--warmup', type=int, default=3, help='rounds before those')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help='CPU threads of torch; all cores if not given')
    parser.add_argument('--discriminator-mode', default='official', help='official or adversarial')
    parser.add_argument('--amp', choices=sorted(DTYPES), help="autocast of the student's step, also in the reference")
    parser.add_argument('--teacher-dtype', choices=sorted(DTYPES), help='autocast of teachers, also in the reference')
    parser.add_argument('--channels-last', action='store_true', help='student and images of the task in channels_last')
    parser.add_argument('--compile', action='store_true', help='compile the task with inductor; never the reference')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write configuration and results there as well')
    return parser


def create(name: str, seed: int, args: argparse.Namespace) -> nn.Module:
    """Create a model with random weights for the number of classes and, where it is fixed, the image size asked for."""
    torch.manual_seed(seed)
    try:
        options = timm.models.resolve_model_input_args(name, {'img_size': args.img_size})
        model = timm.create_model(**{**options, 'num_classes': args.num_classes})
    except (RuntimeError, ValueError) as error:
        raise UserError(f'{name} cannot be created: {error}') from error
    return model.to(args.device)


def build_parts(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The three things that are timed: 'student' and 'teachers' of the reference, and the 'task'."""
    device = torch.device(args.device)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    target = torch.randint(0, args.num_classes, (args.batch_size,), device=device)

    def autocast(dtype: str | None) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=DTYPES.get(dtype or ''), enabled=dtype is not None)

    def training_step(module: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = create_optimizer_v2(module, opt='sgd', lr=1e-4, momentum=0.9, weight_decay=0.0)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'float16')

        def step() -> None:
            with autocast(args.amp):
                loss = loss_of()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return step

    student = create(args.student, 0, args).train()
    teachers = [create(name, seed, args).eval() for seed, name in enumerate(args.teachers, 1)]

    # The ensemble lays its teachers out channels_last and the reference must not, hence the copies.
    ensemble = EnsembleTeacher(copy.deepcopy(teachers), autocast_dtype=DTYPES.get(args.teacher_dtype or ''))
    task_student, task_images = copy.deepcopy(student), images
    if args.channels_last:
        task_student = task_student.to(memory_format=torch.channels_last)
        task_images = images.contiguous(memory_format=torch.channels_last)
    task = MealV2Task(task_student, ensemble, discriminator_mode=args.discriminator_mode, verbose=False).train()
    task_step = training_step(task.get_trainable_module(), lambda: task(task_images, target)['loss'])
    if args.compile:
        task.compile()

    def teachers_forward() -> None:
        with torch.inference_mode(), autocast(args.teacher_dtype):
            for teacher in teachers:
                teacher(images)

    return {
        'student': training_step(student, lambda: F.cross_entropy(student(images), target)),
        'teachers': teachers_forward,
        'task': task_step,
    }


def measure(parts: dict[str, Callable[[], None]], rounds: int, warmup: int, cuda: bool) -> dict[str, list[float]]:
    """Seconds of each part in each round. The part that goes first changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(warmup + rounds):
        names = list(parts)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            parts[name]()
            if cuda:
                torch.cuda.synchronize()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles of the times in milliseconds, and of the ratio."""
    reference = [s + t for s, t in zip(seconds['student'], seconds['teachers'], strict=True)]
    rows = {
        'student alone (ms)': [1e3 * s for s in seconds['student']],
        'teachers alone (ms)': [1e3 * s for s in seconds['teachers']],
        'reference: their sum (ms)': [1e3 * s for s in reference],
        'MealV2Task step (ms)': [1e3 * s for s in seconds['task']],
        'ratio: step / reference': [a / b for a, b in zip(seconds['task'], reference, strict=True)],
    }
    summary = {}
    for name, values in rows.items():
        lower, median, upper = statistics.quantiles(values, n=4, method='inclusive')
        summary[name] = {'median': median, 'lower_quartile': lower, 'upper_quartile': upper}
    return summary


def describe(args: argparse.Namespace) -> dict[str, str]:
    """What the figures hold for: date, hardware, versions."""
    cuda = args.device.startswith('cuda')
    cpu = next((line.partition(':')[2].strip() for line in cpuinfo() if line.startswith('model name')), '')
    return {
        'date': date.today().isoformat(),
        'device': torch.cuda.get_device_name(args.device) if cuda else f'{cpu or platform.machine()}',
        'threads': str(torch.get_num_threads()),
        'versions': f'Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}',
    }


def cpuinfo() -> list[str]:
    """Lines of Linux's /proc/cpuinfo, none elsewhere."""
    path = Path('/proc/cpuinfo')
    return path.read_text().splitlines() if path.exists() else []


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the JSON file if asked for."""
    args = build_parser().parse_args(argv)
    if args.steps < 2:
        raise UserError(f'--steps must be 2 or more, got {args.steps}: quartiles need several rounds.')
    if args.threads:
        torch.set_num_threads(args.threads)
    environment = describe(args)
    summary = summarise(measure(build_parts(args), args.steps, args.warmup, args.device.startswith('cuda')))

    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(' | '.join(f'{name}: {value}' for name, value in environment.items()))
    print(' | '.join(f'{name}: {value}' for name, value in options.items() if value not in (None, False)))
    print(f'{"median of " + str(args.steps) + " rounds":28} {"median":>9} {"quartiles":>19}')
    for name, row in summary.items():
        digits = 3 if 'ratio' in name else 1
        quartiles = f'{row["lower_quartile"]:.{digits}f} .. {row["upper_quartile"]:.{digits}f}'
        print(f'{name:28} {row["median"]:9.{digits}f} {quartiles:>19}')
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps({'environment': environment, 'options': options, 'results': summary}, indent=2))


if __name__ == '__main__':
    run_cli(main)
