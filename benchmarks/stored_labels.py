"""What stored labels cost and save. Weights are random and images synthetic: only time and bytes are measured.

    python benchmarks/stored_labels.py bytes
    python benchmarks/stored_labels.py reading --images 1281167 --epochs 10
    python benchmarks/stored_labels.py first-batch --images 1281167
    python benchmarks/stored_labels.py kill --minutes 2
    python benchmarks/stored_labels.py loading --photos FOLDER
    python benchmarks/stored_labels.py throughput --photos FOLDER --img-size 64 --channels-last

bytes: what a sample of everything (crop, flip, RandAugment, erasing, mixing) takes with K classes, in a store and in
two layouts that keep the random choices: one pickle an image (as dataset reinforcement, arXiv 2303.08983, keeps them),
and one `torch.save` an image of crops, flips and labels (FKD, arXiv 2112.01528, which knows crops and flips alone).

reading: a store of random records is written, and the labels of an epoch are read from it as a training reads them. The
same labels are read from one pickle an image, in a random order; of these only `--pickles` files are made, and the time
is scaled to all images. Both are read from the page cache, in turn, `--rounds` times.

first-batch: how much later than in plain training the first batch comes, for as many images as in `reading`.

kill: six recording processes on the sample in examples/ are killed and started at random for some minutes; the store
must be that of one process, byte for byte.

loading, throughput: from the photos (JPEG or PNG, larger than 500x375) random crops are made into JPEG images of
500x375 pixels. An epoch each of plain supervised training, stored labels with one and with R samples a decode, and live
teachers takes turns, round by round; ratios are formed within a round. `loading` loads the batches alone, in turn
batch by batch, and counts the process's CPU time: it goes without workers.
"""

import argparse
import io
import json
import os
import pickle
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from measuring import HEIGHT, WIDTH, in_turn, make_images, memory, ratios, spread
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.models import save_for_hf
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from timm_mealv2 import MealV2Task
from timm_mealv2.cli import soft_labels as command
from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.data.augmentation import Augmentation
from timm_mealv2.data.dataset import PathsAndTargets, open_dataset
from timm_mealv2.data.loader import TrainLoader, collate_labels
from timm_mealv2.data.samples import EpochSampler, Samples
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing
from timm_mealv2.soft_labels.replay import replay
from timm_mealv2.soft_labels.store import (
    FORMAT,
    NAMES,
    SoftLabelStore,
    StoreMeta,
    checksum,
    library_versions,
    names_sha256,
)
from timm_mealv2.training.logs import EpochLog
from timm_mealv2.training.loop import Stepper, train_one_epoch
from timm_mealv2.training.meters import Meters
from timm_mealv2.training.run_folder import Position

CLASSES = 1000
SAMPLE = Path(__file__).resolve().parents[1] / 'examples/fashion_mnist'


# Synthetic stores


def image_name(number: int) -> str:
    """A name as those of ImageNet."""
    return f'n{number % CLASSES:08}/n{number % CLASSES:08}_{number:08}.JPEG'


class ManyImages(ReaderImageFolder):
    """A folder of many images, all of which are the same file."""

    def __init__(self, count: int) -> None:
        self.root = '/data/train'
        paths = [(f'{self.root}/{image_name(number)}', number % CLASSES) for number in range(count)]
        self.samples = PathsAndTargets(paths)  # as `open_dataset` keeps them
        buffer = io.BytesIO()
        Image.new('RGB', (WIDTH, HEIGHT), (90, 120, 150)).save(buffer, 'JPEG')
        self.file = buffer.getvalue()

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        return io.BytesIO(self.file), self.samples[index][1]


def make_store(args: argparse.Namespace) -> Path:
    """Write a store of random records; one that is there stays."""
    folder = args.out / f'store-{args.images}-{args.epochs}-{args.top_k}'
    names = [image_name(number) for number in range(args.images)]
    meta = StoreMeta(
        format=FORMAT,
        teachers=[
            {'name': 'random', 'sha256': '', 'weight': 1.0, 'img_size': None, 'classes': None, 'autocast_dtype': None}
        ],
        augmentation=Augmentation((3, args.img_size, args.img_size)),
        seed=42,
        num_classes=CLASSES,
        top_k=args.top_k,
        images=args.images,
        names_sha256=names_sha256(names),
        versions=library_versions(),
        batch_size=128,
        part_images=min(max(-(-args.images // 128), 256), 2**14),
        blocks=[0],
    ).extend(args.epochs, 10)
    if (folder / 'meta.json').is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for part in meta.parts():
        with replacing(folder / part.file) as path, path.open('wb') as file:
            for epoch in part.epochs:
                data = random_records(meta, len(part.images), generator).tobytes()
                file.write(data + checksum(data, epoch, part.images.start))
    (folder / NAMES).write_text('\0'.join(names))
    meta.write(folder)
    return folder


def random_records(meta: StoreMeta, count: int, generator: np.random.Generator) -> np.ndarray:
    """Records of random labels."""
    records = np.empty(count, meta.dtype)
    records['crc'] = generator.integers(1, 2**32, count, np.uint32)
    records['classes'] = generator.integers(0, CLASSES, (count, meta.top_k))
    records['probabilities'] = -np.sort(-generator.dirichlet(np.ones(meta.top_k), count), axis=1)
    return records


def choices(generator: np.random.Generator) -> dict[str, Any]:
    """The random choices of a sample of everything, in as few bytes as a pickle of plain values takes."""
    return {
        'crop': generator.integers(0, 500, 4).astype(np.uint16),
        'flip': bool(generator.integers(2)),
        'randaugment': [(int(generator.integers(15)), float(generator.random(dtype=np.float32))) for _ in range(2)],
        'erase': generator.integers(0, 224, 4).astype(np.uint16),
        'mix': (int(generator.integers(1_281_167)), float(generator.random(dtype=np.float32))),
    }


def pickle_of(records: np.ndarray, generator: np.random.Generator) -> bytes:
    """An image's samples in a pickle: for each its random choices, K class indices and K probabilities."""
    samples = [
        {**choices(generator), 'classes': record['classes'], 'probabilities': record['probabilities']}
        for record in records
    ]
    return pickle.dumps(samples, protocol=5)


# Measurements


def measure_bytes(args: argparse.Namespace) -> dict[str, Any]:
    """Measure bytes a sample in three layouts, of the same labels."""
    args.images, args.epochs = 2000, 10
    store = SoftLabelStore(make_store(args))
    generator = np.random.default_rng(0)
    records = np.stack([store.read_epoch(epoch, np.arange(args.images)) for epoch in range(args.epochs)], axis=1)
    total = records.size
    rows = {'store, all files': sum(path.stat().st_size for path in store.path.iterdir()) / total}
    rows['store, records'] = float(store.meta.dtype.itemsize)
    pickles = [len(pickle_of(of_image, generator)) for of_image in records]
    rows['one pickle an image'] = sum(pickles) / total
    rows['one pickle an image, in blocks of 4096 bytes'] = sum(-(-size // 4096) * 4096 for size in pickles) / total
    fkd = 0
    for of_image in records:
        buffer = io.BytesIO()
        labels = torch.from_numpy(of_image['probabilities']), torch.from_numpy(of_image['classes'].astype(np.int16))
        torch.save((torch.rand(args.epochs, 4), torch.rand(args.epochs) < 0.5, *labels), buffer)
        fkd += buffer.tell()
    rows['one torch.save an image, crops and flips'] = fkd / total
    print(f'| K = {args.top_k}, {args.epochs} samples an image | bytes a sample |\n|---|---:|')
    for name, value in rows.items():
        print(f'| {name} | {value:.1f} |')
    return {'bytes': rows}


def measure_reading(args: argparse.Namespace) -> dict[str, Any]:
    """Measure opening a store and reading an epoch's labels, beside one pickle an image."""
    folder = make_store(args)
    generator = np.random.default_rng(1)
    meta = StoreMeta.read(folder)
    pickles = args.out / f'pickles-{args.epochs}'
    if not pickles.is_dir() or len(list(pickles.iterdir())) != args.pickles:
        shutil.rmtree(pickles, ignore_errors=True)
        pickles.mkdir()
        for number in range(args.pickles):
            (pickles / str(number)).write_bytes(pickle_of(random_records(meta, args.epochs, generator), generator))
    figures: dict[str, list[float]] = {'open': [], 'epoch': [], 'pickles': []}
    grown = 0.0
    for number in range(args.rounds + 1):
        began = time.perf_counter()
        store = SoftLabelStore(folder)
        opened = time.perf_counter()
        before = memory()
        order = generator.permutation(args.images)
        began_reading = time.perf_counter()
        records = store.read_epoch(number % store.epochs, order)
        read = time.perf_counter()
        grown = max(grown, memory() - before)
        assert len(records) == args.images
        of_pickles = generator.permutation(args.pickles)
        began_pickles = time.perf_counter()
        for name in of_pickles.tolist():
            pickle.loads((pickles / str(name)).read_bytes())[number % args.epochs]
        scaled = (time.perf_counter() - began_pickles) * args.images / args.pickles
        if number:  # the first round fills the page cache
            figures['open'].append(opened - began)
            figures['epoch'].append(read - began_reading)
            figures['pickles'].append(scaled)
    opening, epoch, scaled = (statistics.median(values) for values in figures.values())
    print(f'| {args.images:,} images x {args.epochs} epochs, K = {args.top_k} | |\n|---|---:|')
    print(f'| opening the store | {opening:.3f} s |')
    print(f'| labels of an epoch from the store | {epoch:.2f} s |')
    print(f'| the same from one pickle an image ({args.pickles:,} files, scaled) | {scaled:.1f} s |')
    print(f'| ratio | {scaled / epoch:.0f} |')
    print(f'| memory that grows meanwhile | {grown:.0f} MiB, {grown * 2**20 / args.images:.0f} bytes an image |')
    return {'seconds': figures, 'memory_mib': grown}


def measure_first_batch(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the time until the first batch, from an open data set on."""
    folder = make_store(args)
    times: dict[str, list[float]] = {'plain': [], 'stored': []}
    dataset = ImageDataset('', reader=ManyImages(args.images))
    for _ in range(args.rounds):
        for arm, values in times.items():
            began = time.perf_counter()
            if arm == 'plain':
                samples = Samples(dataset, Augmentation((3, args.img_size, args.img_size)), 42)
                parts: tuple[Any, ...] = samples, EpochSampler(len(samples), args.batch_size), collate_labels
            else:
                # Its records are random.
                parts = replay(SoftLabelStore(folder), dataset, args.batch_size, allow_pixel_change=True)
            loader = TrainLoader(*parts, normalization=((0.5,) * 3, (0.5,) * 3), workers=args.workers)
            next(iter(loader.batches(0)))
            values.append(time.perf_counter() - began)
            del loader, parts
    for arm, values in times.items():
        print(f'{arm:<8}{statistics.median(values):.2f} s until the first batch, {args.images:,} images')
    later = statistics.median(b - a for a, b in zip(*times.values(), strict=True))
    print(f'later   {later:.2f} s')
    return {'seconds': times}


def measure_kill(args: argparse.Namespace) -> dict[str, Any]:
    """Kill and start six recording processes at random; compare with one process's store."""
    teachers = [f'local-dir:{SAMPLE / "teachers" / name}' for name in ('teacher_a', 'teacher_b')]
    options = ['--recipe', 'quickstart', '--teachers', *teachers, '--data-dir', str(SAMPLE / 'data')]
    options += ['--train-split', 'train.tar', '--epochs', str(args.epochs), '--top-k', '5', '--workers', '0']
    options += ['--aa', 'rand-m5', '--cutmix', '1', '--device', 'cpu']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}

    def start(out: Path) -> subprocess.Popen:
        argv = [sys.executable, '-m', 'timm_mealv2.cli.soft_labels', 'record', *options, '--out', str(out)]
        return subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    for name in ('one', 'killed'):
        shutil.rmtree(args.out / name, ignore_errors=True)
    rng = random.Random(args.seed)
    out, kills = args.out / 'killed', 0
    processes = [start(out) for _ in range(6)]
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        time.sleep(rng.uniform(0.5, 4))
        victim = rng.randrange(6)
        if processes[victim].poll() is None:
            processes[victim].kill()
            kills += 1
        processes[victim].wait()
        processes[victim] = start(out)
    codes = [process.wait() for process in processes]
    written = len(list(out.glob('part-*')))
    assert start(args.out / 'one').wait() == 0
    one, killed = (
        {path.name: path.read_bytes() for path in folder.glob('[!.]*')} for folder in (args.out / 'one', out)
    )
    same = one == killed
    print(f'{kills} kills in {args.minutes:g} minutes, {written} parts, exit codes {codes}; ', end='')
    print('the same bytes as one process' if same else 'DIFFERENT from one process')
    if not same:
        differing = sorted(name for name in {*one, *killed} if one.get(name) != killed.get(name))
        raise UserError(f'these files differ: {", ".join(differing)}')
    return {'kills': kills, 'same': same}


# Training and loading


def make_teachers(names: Sequence[str], folder: Path) -> list[str]:
    """Write teachers of random weights as folders that timm loads; return their names for --teachers."""
    for number, name in enumerate(names):
        if not (folder / name / 'config.json').is_file():
            torch.manual_seed(number)
            save_for_hf(timm.create_model(name, num_classes=CLASSES), folder / name, safe_serialization=True)
    return [f'local-dir:{folder / name}' for name in names]


def make_arms(args: argparse.Namespace, teachers: Sequence[str], store: Path) -> dict[str, tuple[Stepper, TrainLoader]]:
    """Arm -> what a step is, and its loader."""
    dataset = open_dataset('', str(args.out / 'train'), 'train')
    labels = SoftLabelStore(store)
    pixels = labels.meta.augmentation

    def stepper(make_task: Callable[[nn.Module], TrainingTask]) -> Stepper:
        torch.manual_seed(0)
        task = make_task(timm.create_model(args.student, num_classes=CLASSES))
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01, momentum=0.9)
        return Stepper(task, optimizer, channels_last=args.channels_last)

    def loader(*parts: Any) -> TrainLoader:
        return TrainLoader(*parts, normalization=(pixels.mean, pixels.std), workers=args.workers)

    def plain() -> TrainLoader:
        samples = Samples(dataset, replace(pixels), 42)
        return loader(samples, EpochSampler(len(samples), args.batch_size), collate_labels)

    def stored(student: nn.Module) -> TrainingTask:
        return MealV2Task(student, None, discriminator_weight=0, verbose=False)

    turns = args.samples_per_decode
    return {
        'plain': (stepper(lambda student: ClassificationTask(student, verbose=False)), plain()),
        'stored': (stepper(stored), loader(*replay(labels, dataset, args.batch_size))),
        f'stored, {turns} samples a decode': (
            stepper(stored),
            loader(*replay(labels, dataset, args.batch_size, samples_per_decode=turns)),
        ),
        'live': (
            stepper(lambda student: MealV2Task(student, list(teachers), discriminator_weight=0, verbose=False)),
            plain(),
        ),
    }


def loading_rates(loaders: dict[str, TrainLoader], epoch: int) -> dict[str, float]:
    """Load an epoch of each loader, batch by batch in turn; return images a second of CPU time."""
    batches = {arm: loader.batches(epoch) for arm, loader in loaders.items()}
    seconds, images = dict.fromkeys(loaders, 0.0), dict.fromkeys(loaders, 0)
    for _ in range(len(next(iter(loaders.values())))):
        for arm, iterator in batches.items():
            began = time.process_time()
            images[arm] += len(next(iterator)[0])
            seconds[arm] += time.process_time() - began
    return {arm: images[arm] / seconds[arm] for arm in loaders}


def measure_throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Measure images/s of every arm, round by round; of the loader alone if that is asked for."""
    if args.photos is None:
        raise UserError(f'{args.what} needs --photos FOLDER.')
    make_images(args.photos, args.out / 'train', args.jpegs)
    teachers = make_teachers(args.teachers, args.out / 'teachers')
    store = args.out / f'photos-{args.jpegs}-{args.img_size}'
    argv = ['record', '--teachers', *teachers, '--data-dir', str(args.out), '--img-size', str(args.img_size)]
    argv += ['--color-jitter', '0', '--train-interpolation', 'bilinear', '--workers', '0', '--device', 'cpu']
    command.main([*argv, '--epochs', str(args.samples_per_decode), '--out', str(store)])
    arms = make_arms(args, teachers, store)

    def train(arm: str, number: int) -> float:
        stepper, loader = arms[arm]
        start = Position(epoch=number)
        log = EpochLog(start, len(loader), shown=False)
        return train_one_epoch(stepper, loader, start, Meters(), log)['images_per_second']

    if args.what == 'loading':
        del arms['live']  # it loads what plain training loads
        loaders = {arm: loader for arm, (_, loader) in arms.items()}
        rounds = [loading_rates(loaders, number) for number in range(args.rounds + 1)][1:]
        rates = {arm: [rate[arm] for rate in rounds] for arm in arms}
    else:
        rates = in_turn({arm: partial(train, arm) for arm in arms}, args.rounds)
    print('| arm | images/s, median | ratio to plain, median (quartiles) |\n|---|---:|---:|')
    for arm, values in rates.items():
        print(f'| {arm} | {statistics.median(values):.1f} | {spread(ratios(values, rates["plain"]), 3)} |')
    return {'images_per_second': rates}


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    'bytes': measure_bytes,
    'reading': measure_reading,
    'first-batch': measure_first_batch,
    'kill': measure_kill,
    'loading': measure_throughput,
    'throughput': measure_throughput,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('what', choices=tuple(MEASUREMENTS))
    add('--out', type=Path, default=Path('output/soft_labels_benchmark'), help='folder of what is written')
    add('--images', type=int, default=1_281_167, help='reading, first-batch: images of the synthetic store')
    add('--epochs', type=int, default=10, help='reading, kill: epochs of a store')
    add('--top-k', type=int, default=10, metavar='K', help='classes to store of a sample')
    add('--pickles', type=int, default=20_000, metavar='N', help='reading: pickles to make and read')
    add('--minutes', type=float, default=2.0, help='kill: how long')
    add('--seed', type=int, default=0, help='kill: seed of the kills')
    add('--photos', type=Path, metavar='FOLDER', help='loading, throughput: natural photos')
    add('--jpegs', type=int, default=512, metavar='N', help='loading, throughput: JPEG images to make')
    add('--student', default='mobilenetv3_small_050')
    add('--teachers', nargs='+', default=['resnet18', 'resnet34'], help='timm architectures')
    add('--img-size', type=int, default=224)
    add('-b', '--batch-size', type=int, default=64)
    add('-j', '--workers', type=int, default=0)
    add('--channels-last', action='store_true')
    add('--samples-per-decode', type=int, default=4, metavar='R', help='loading, throughput: of the second stored arm')
    add('--rounds', type=int, default=5, help='rounds that are measured')
    add('--json', type=Path, metavar='FILE', help='write configuration and results there as well')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a measurement."""
    args = build_parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    versions = f'Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}'
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    machine = platform.processor() or platform.machine()
    print(f'{date.today()}, {machine}, {torch.get_num_threads()} threads, {versions}', flush=True)
    results = MEASUREMENTS[args.what](args)
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps({'settings': settings, 'versions': versions, **results}, indent=2) + '\n')


if __name__ == '__main__':
    run_cli(main)
