"""The training loader alone, beside timm's `create_loader` with the same augmentation.

    python benchmarks/loader.py --photos FOLDER

From the photos (JPEG or PNG, larger than 500x375) random crops are made into JPEG images of 500x375 pixels. Each arm
loads an epoch of them in turn: random resized crops and flips, bilinear, normalized on the CPU.
Without workers the process's own CPU time counts, which other load on the machine changes little.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from measuring import in_turn, make_images, publish, ratios, spread
from timm.data import create_loader

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.data.loader import TrainLoader
from timm_mealv2.data.samples import EpochSampler, Samples


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--photos', type=Path, required=True, metavar='FOLDER', help='natural photos')
    add('--out', type=Path, default=Path('output/loader_benchmark'), help='folder of the images')
    add('--images', type=int, default=512, help='JPEG images to make')
    add('--img-size', type=int, default=224)
    add('-b', '--batch-size', type=int, default=64)
    add('-j', '--workers', type=int, nargs='+', default=[0, 2])
    add('--samples-per-decode', type=int, default=4, metavar='R', help='of the last arm')
    add('--rounds', type=int, default=7, help='rounds that are measured')
    add('--save', action='store_true', help='write benchmarks/results/loader.json')
    return parser


def loaders(args: argparse.Namespace, workers: int) -> dict[str, Callable[[int], float]]:
    """Arm -> what loads an epoch and returns milliseconds a sample."""
    pixels = Augmentation((3, args.img_size, args.img_size), color_jitter=0, train_interpolation='bilinear')
    options = pixels.transform_options() | {'input_size': pixels.input_size, 'batch_size': args.batch_size}
    timms = create_loader(
        open_dataset('', str(args.out), 'train'),
        is_training=True,
        num_workers=workers,
        device=torch.device('cpu'),
        persistent_workers=workers > 0,
        **options,
    )
    samples = Samples(open_dataset('', str(args.out), 'train'), pixels, 42)

    clock = time.perf_counter if workers else time.process_time

    def ours(turns: int) -> TrainLoader:
        sampler = EpochSampler(len(samples), args.batch_size, samples_per_decode=turns)
        return TrainLoader(samples, sampler, normalization=(pixels.mean, pixels.std), workers=workers)

    def load(batches: Callable[..., Iterable], epoch: int) -> float:
        began = clock()
        count = sum(len(images) for images, _ in batches(epoch))
        return 1e3 * (clock() - began) / count

    turns = args.samples_per_decode
    return {
        "timm's create_loader": partial(load, lambda _: timms),
        'ours': partial(load, ours(1).batches),
        f'ours, {turns} samples a decode': partial(load, ours(turns).batches),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    args = build_parser().parse_args(argv)
    logging.disable(logging.INFO)
    make_images(args.photos, args.out / 'train', args.images)
    rows = []
    for workers in args.workers:
        times = in_turn(loaders(args, workers), args.rounds)
        reference, *_ = times.values()
        for arm, values in times.items():
            rows.append([arm, str(workers), spread(values, 3), spread(ratios(reference, values))])
    columns = ['loader', 'workers', 'ms a sample: median (quartiles)', "images/s, as a ratio to timm's"]
    publish(
        'loader',
        f'The training loader alone: crops of {args.img_size} pixels of 500x375 JPEG images.',
        columns,
        rows,
        args.save,
    )


if __name__ == '__main__':
    run_cli(main)
