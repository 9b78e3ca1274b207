"""What the training loop costs beside forward pass, backward pass and optimizer.

    python benchmarks/overhead.py

A bare loop and `train_one_epoch` train the same model with SGD on the same images, in turn. What is compared is the CPU
time of one thread, which other load on the machine hardly changes.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import timm
import torch
from measuring import in_turn, publish, ratios, spread
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import Tensor

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.training.logs import EpochLog
from timm_mealv2.training.loop import Stepper, train_one_epoch
from timm_mealv2.training.meters import Meters
from timm_mealv2.training.run_folder import Position

CASES = (('test_resnet', 2, 32, 200), ('resnet50', 8, 64, 6))  # model, images, pixels, batches a round


class Batches:
    """The same batch again and again."""

    resumable = True

    def __init__(self, count: int, images: int, pixels: int) -> None:
        self.count, self.batch = count, (torch.randn(images, 3, pixels, pixels), torch.arange(images) % 10)

    def __len__(self) -> int:
        return self.count

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches."""
        yield from [self.batch] * self.count


def build_arms(model: str, batches: Any) -> dict[str, Callable[[int], float]]:
    """The two loops; each returns milliseconds a batch."""
    tasks = [ClassificationTask(timm.create_model(model, num_classes=10), verbose=False).train() for _ in range(2)]
    ours, bare = [Stepper(task, create_optimizer_v2(task.get_trainable_module(), 'sgd', lr=1e-4)) for task in tasks]

    def train_bare(_: int) -> float:
        begin = time.process_time()
        for images, target in batches.batches(0):
            bare.task(images, target)['loss'].backward()
            bare.optimizer.step()
            bare.optimizer.zero_grad()
        return 1000 * (time.process_time() - begin) / len(batches)

    def train_ours(_: int) -> float:
        begin = time.process_time()
        start = Position()
        train_one_epoch(ours, batches, start, Meters(), EpochLog(start, len(batches), shown=False))
        return 1000 * (time.process_time() - begin) / len(batches)

    return {'bare': train_bare, 'ours': train_ours}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the JSON file if asked for."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15, help='rounds that are measured')
    parser.add_argument('--save', action='store_true', help='write benchmarks/results/overhead.json')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for model, images, pixels, count in CASES:
        times = in_turn(build_arms(model, Batches(count, images, pixels)), args.rounds)
        ratio = spread(ratios(times['ours'], times['bare']), 3)
        rows.append([f'{model}, {images} of {pixels} px', spread(times['bare'], 1), spread(times['ours'], 1), ratio])
    title = f'CPU time of a step in milliseconds, median and quartiles of {args.rounds} rounds.'
    publish('overhead', title, ['model, images', 'bare loop', 'ours', 'ratio'], rows, args.save)


if __name__ == '__main__':
    run_cli(main)
