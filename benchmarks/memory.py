"""Peak memory of live training, beside what it is made of: the student's training alone and the teachers alone.

    python benchmarks/memory.py

Each figure is of a fresh process (Linux): its peak (VmHWM) after a few steps, less what importing took. The bound is
the student's training alone with cross-entropy, the forward pass of one teacher, and the weights of the others:
teachers run one after the other, and none keeps anything but its share of the mean. Weights are random.
"""

import argparse
from collections.abc import Sequence

import timm
import torch
from measuring import in_fresh_process, memory, publish
from timm.task import ClassificationTask, TrainingTask

from timm_mealv2 import EnsembleTeacher, MealV2Task
from timm_mealv2.command_line import OneLineParser, run_cli


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--student', default='resnet18', help='timm architecture')
    add('--teacher', default='resnet50', help='timm architecture of all teachers')
    add('--counts', type=int, nargs='+', default=[1, 2, 4], help='numbers of teachers')
    add('--batch-size', type=int, default=16)
    add('--img-size', type=int, default=128)
    add('--steps', type=int, default=4)
    add('--save', action='store_true', help='write benchmarks/results/memory.json')
    return parser


def training(student: str, teacher: str, count: int, batch_size: int, img_size: int, steps: int) -> float:
    """Train with `count` teachers, with labels alone if 0; return the growth of the peak in MiB."""
    before = memory()
    model = timm.create_model(student)
    task: TrainingTask = ClassificationTask(model, verbose=False)
    if count:
        task = MealV2Task(model, [timm.create_model(teacher) for _ in range(count)], verbose=False)
    task.train()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01, momentum=0.9)
    images, target = torch.randn(batch_size, 3, img_size, img_size), torch.zeros(batch_size, dtype=torch.long)
    for _ in range(steps):
        task(images, target)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    return memory('VmHWM') - before


def forward(teacher: str, batch_size: int, img_size: int, steps: int) -> tuple[float, float]:
    """Predict with one teacher; return the growth of the peak and the size of its weights in MiB."""
    before = memory()
    ensemble = EnsembleTeacher([timm.create_model(teacher)])
    images = torch.randn(batch_size, 3, img_size, img_size)
    for _ in range(steps):
        ensemble.predict(images)
    weights = sum(tensor.nbytes for tensor in ensemble.state_dict().values()) / 2**20
    return memory('VmHWM') - before, weights


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    args = build_parser().parse_args(argv)
    settings = args.batch_size, args.img_size, args.steps
    alone = in_fresh_process(training, args.student, args.teacher, 0, *settings)
    teacher, weights = in_fresh_process(forward, args.teacher, *settings)
    rows = [
        [f"{args.student}'s training alone", f'{alone:.0f}', '', ''],
        [f'forward pass of one {args.teacher}, {weights:.0f} MiB of weights included', f'{teacher:.0f}', '', ''],
    ]
    for count in args.counts:
        live = in_fresh_process(training, args.student, args.teacher, count, *settings)
        bound = alone + teacher + (count - 1) * weights
        rows.append([f'live training, teachers: {count}', f'{live:.0f}', f'{bound:.0f}', f'{live / bound:.2f}'])
    title = (
        f'Peak memory with batches of {args.batch_size} images of {args.img_size} pixels, less what importing takes.'
    )
    publish('memory', title, ['process', 'peak, MiB', 'bound, MiB', 'ratio'], rows, args.save)


if __name__ == '__main__':
    run_cli(main)
