"""A data set as large as ImageNet: how long opening it takes, and the memory of the process and of its workers.

    python benchmarks/scale.py --out output/scale_benchmark

A folder is filled with JPEG images in 1,000 classes, links to one file a class. Each arm runs in a fresh process: it
opens the folder, makes a loader, and takes the first batch from two workers; then a worker process looks at the path of
each image. Linux only.
"""

import argparse
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from measuring import in_fresh_process, memory, publish
from PIL import Image
from timm.data import create_dataset, create_loader

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.dataset import open_dataset
from timm_mealv2.data.loader import TrainLoader
from timm_mealv2.data.samples import EpochSampler, Samples

CLASSES = 1000
PIXELS = Augmentation((3, 64, 64), color_jitter=0, train_interpolation='bilinear')


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--images', type=int, default=1_281_167)
    add('--out', type=Path, default=Path('output/scale_benchmark'), help='folder of the images')
    add('--save', action='store_true', help='write benchmarks/results/scale.json')
    return parser


def fill(folder: Path, count: int) -> None:
    """Make the images; a folder that is there stays. A file has one name a class, which file systems allow."""
    if folder.is_dir():
        return
    unfinished = folder.with_name('unfinished')
    for number in range(count):
        label = number % CLASSES
        name = unfinished / f'n{label:08}/n{label:08}_{{:08}}.JPEG'
        path, first = Path(str(name).format(number)), Path(str(name).format(label))
        if number < CLASSES:
            path.parent.mkdir(parents=True)
            Image.new('RGB', (80, 80), (label % 256, 120, 150)).save(path)
        else:
            os.link(first, path)
    unfinished.rename(folder)


def private() -> float:
    """Memory in MiB that this process shares with no other."""
    lines = Path('/proc/self/smaps_rollup').read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(('Private_Clean', 'Private_Dirty'))) / 1024


def look_at_all(samples: Any, found: Any) -> None:
    """Unpack each entry, as a reader does, and report the memory that the process has of its own by then."""
    for index in range(len(samples)):
        _path, _target = samples[index]
    found.put(private())


def worker_memory(samples: Any, method: str) -> float:
    """Return the memory of a worker's own once it has looked at each entry."""
    context: Any = mp.get_context(method)
    found = context.Queue()
    process = context.Process(target=look_at_all, args=(samples, found))
    process.start()
    grown = found.get()
    process.join()
    return grown


def measure(ours: bool, root: str) -> list[float]:
    """Open, take a batch from two workers; return the two times, and the memory of process and workers."""
    logging.disable(logging.INFO)
    before = memory()
    began = time.perf_counter()
    batches: Any
    if ours:
        dataset = open_dataset('', root, 'train')
        opened = time.perf_counter()
        sampler = EpochSampler(len(dataset), 16)  # type: ignore[arg-type]
        samples = Samples(dataset, PIXELS, 42)
        loader = TrainLoader(samples, sampler, normalization=(PIXELS.mean, PIXELS.std), workers=2)
        batches = loader.batches(0)
    else:
        dataset = create_dataset('', root=root, split='train')
        opened = time.perf_counter()
        options = PIXELS.transform_options() | {'input_size': PIXELS.input_size, 'batch_size': 16, 'num_workers': 2}
        batches = iter(create_loader(dataset, is_training=True, device=torch.device('cpu'), **options))
    next(batches)
    times = [opened - began, time.perf_counter() - opened]
    grown = memory() - before
    entries = dataset.reader.samples  # type: ignore[attr-defined]
    return [*times, grown, *(worker_memory(entries, method) for method in ('fork', 'spawn'))]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    args = build_parser().parse_args(argv)
    fill(args.out / f'{args.images}/train', args.images)
    root = str(args.out / str(args.images))
    of_timm, of_ours = (in_fresh_process(measure, ours, root) for ours in (False, True))
    names = ['opening the folder, s', 'first batch after that, s', 'memory of the process, MiB']
    names += [f"a worker's own memory after all paths, {method}, MiB" for method in ('fork', 'spawn')]
    digits = (1, 2, 0, 0, 0)
    rows = [
        [name, f'{ours:.{places}f}', f'{timm:.{places}f}']
        for name, places, ours, timm in zip(names, digits, of_ours, of_timm, strict=True)
    ]
    publish('scale', f'A folder of {args.images:,} images.', ['', 'ours', "timm's"], rows, args.save)


if __name__ == '__main__':
    run_cli(main)
