# mypy: ignore-errors
"""What stored labels cost and save: training throughput, and peak memory against the size of the store.

    python benchmarks/stored_labels.py loading --photos FOLDER
    python benchmarks/stored_labels.py throughput --photos FOLDER --img-size 64
    python benchmarks/stored_labels.py memory --photos FOLDER
    python benchmarks/stored_labels.py storage --photos FOLDER

From the photos (JPEG or PNG, natural ones, larger than 500x375) random crops are made into JPEG images of ImageNet's
usual size, 500x375 pixels, and labelled by the teachers with `mealv2-softlabels record`. Weights are random: only time
and memory are measured.

throughput: an epoch each of plain supervised training (cross-entropy), of stored labels with one crop and with R crops
a decode, and of live teachers takes turns, round by round, so that what else the machine does meets all of them; the
ratios are formed within each round. The same loader, transform, student, batch size and optimizer serve all four.

loading: the same, but the batches are loaded alone: what a step so fast that it waits for them would see.

memory: recording and one epoch of training run in processes of their own, without workers, for a growing number of
crops; what is reported is the largest resident set.

storage: the files of a store, all of them, against all class probabilities of every crop (dense), and against the same
records in a file for each image, as the file system allocates them.
"""

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset
from timm.models import save_for_hf
from timm.task import ClassificationTask, TrainingTask
from timm_mealv2.soft_labels.dataset import SoftLabelDataset
from torch import nn
from torch.utils.data import Dataset

from timm_mealv2 import MealV2Task
from timm_mealv2.cli import soft_labels as command
from timm_mealv2.cli.parser import OneLineParser, run_cli
from timm_mealv2.data.loader import TrainLoader
from timm_mealv2.errors import UserError
from timm_mealv2.files import replacing
from timm_mealv2.soft_labels.store import SoftLabelStore
from timm_mealv2.training.checkpoint_saver import Progress
from timm_mealv2.training.loop import EpochEvents, Meters, Stepper, train_one_epoch

WIDTH, HEIGHT = 500, 375


def make_images(photos: Path, folder: Path, count: int) -> None:
    """Write `count` JPEG images of 500x375 pixels, random crops of the photos; what is there already stays."""
    if folder.is_dir() and len(list(folder.rglob('*.jpg'))) == count:
        return
    sources = sorted(path for path in photos.rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    if not sources:
        raise UserError(f'--photos {photos}: no JPEG or PNG images there.')
    rng = random.Random(0)
    for label in ('a', 'b'):
        (folder / label).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        with Image.open(sources[number % len(sources)]) as file:
            photo = file.convert('RGB')
            scale = min(photo.width / WIDTH, photo.height / HEIGHT) * rng.uniform(0.3, 1)
            width, height = max(1, int(WIDTH * scale)), max(1, int(HEIGHT * scale))
            left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
            crop = photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
            crop.save(folder / 'ab'[number % 2] / f'{number:05}.jpg', quality=90)


def make_teachers(names: Sequence[str], folder: Path) -> list[str]:
    """Write teachers of random weights as folders that timm loads; return their names for --teachers."""
    for number, name in enumerate(names):
        if not (folder / name / 'config.json').is_file():
            torch.manual_seed(number)
            save_for_hf(timm.create_model(name, num_classes=1000), folder / name, safe_serialization=True)
    return [f'local-dir:{folder / name}' for name in names]


def record_argv(args: argparse.Namespace, teachers: Sequence[str], crops: int, store: Path) -> list[str]:
    """The command line of a recording."""
    argv = ['record', '--teachers', *teachers, '--data-dir', str(args.out), '--img-size', str(args.img_size)]
    argv += ['--crops', str(crops), '--top-k', str(args.top_k), '-b', str(args.batch_size), '--out', str(store)]
    return [*argv, '--workers', '0']


def make_loader(args: argparse.Namespace, dataset: Dataset, per_decode: int = 1) -> TrainLoader:
    """The training loader, the same for every arm."""
    transform = {'scale': (0.08, 1.0), 'hflip': 0.5, 'color_jitter': None, 'interpolation': 'bilinear'}
    return TrainLoader(
        dataset,
        input_size=(3, args.img_size, args.img_size),
        batch_size=args.batch_size,
        transform={**transform, 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD},
        crops_per_decode=per_decode,
        workers=args.workers,
    )


def make_arms(args: argparse.Namespace, teachers: Sequence[str], store: Path) -> dict[str, tuple[Stepper, TrainLoader]]:
    """Arm -> what a step is, and its loader."""

    def images() -> Dataset:
        return create_dataset('', root=str(args.out), split='train')

    def stepper(make_task: Callable[[nn.Module], TrainingTask]) -> Stepper:
        torch.manual_seed(0)
        task = make_task(timm.create_model(args.student, num_classes=1000))
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01, momentum=0.9)
        return Stepper(task, optimizer, channels_last=args.channels_last)

    def stored(student: nn.Module) -> TrainingTask:
        return MealV2Task(student, None, discriminator_weight=0, verbose=False)

    labels = SoftLabelStore(store)
    several = f'stored, {args.crops_per_decode} crops a decode'
    return {
        'plain': (stepper(lambda student: ClassificationTask(student, verbose=False)), make_loader(args, images())),
        'stored': (stepper(stored), make_loader(args, SoftLabelDataset(images(), labels))),
        several: (stepper(stored), make_loader(args, SoftLabelDataset(images(), labels), args.crops_per_decode)),
        'live': (
            stepper(lambda student: MealV2Task(student, list(teachers), discriminator_weight=0, verbose=False)),
            make_loader(args, images()),
        ),
    }


def loading_rate(loader: TrainLoader, epoch: int) -> float:
    """Load an epoch; return images/s."""
    began = time.perf_counter()
    images = sum(len(batch) for batch, _ in loader.batches(epoch))
    return images / (time.perf_counter() - began)


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Measure images/s of every arm, round by round; of the loader alone if that is asked for."""
    teachers = make_teachers(args.teachers, args.out / 'teachers')
    store = args.out / f'store-{args.images}-{args.img_size}'
    command.main(record_argv(args, teachers, args.crops_per_decode, store))
    arms = make_arms(args, teachers, store)
    if args.what == 'loading':
        del arms['live']  # it loads what plain training loads
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(args.rounds + 1):
        for arm, (stepper, loader) in arms.items():
            if args.what == 'loading':
                rate = loading_rate(loader, number)
            else:
                start, quiet = Progress(epoch=number), EpochEvents(log=False)
                trained = train_one_epoch(stepper, loader, start=start, meters=Meters(), events=quiet)
                rate = trained['images_per_second']
            if number:  # the first round starts the workers
                rates[arm].append(rate)
    lines = ['| arm | images/s, median | ratio to plain, median (quartiles) |', '|---|---:|---:|']
    for arm, values in rates.items():
        ratios = [value / plain for value, plain in zip(values, rates['plain'], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(f'| {arm} | {statistics.median(values):.1f} | {middle:.3f} ({low:.3f} to {high:.3f}) |')
    print('\n'.join(lines))
    return {'images_per_second': rates}


def peak_memory(argv: Sequence[str]) -> float:
    """Run a program; return the largest resident set of it in MiB (Linux)."""
    # getrusage would tell that of this process too, from which the other one was forked.
    code = (
        'import re, runpy, sys\n'
        'sys.argv = sys.argv[1:]\n'
        'runpy.run_module(sys.argv[0], run_name="__main__")\n'
        'print("peak", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])'
    )
    result = subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f'{shlex.join(argv)} failed: {result.stderr.strip().splitlines()[-1]}')
    return int(result.stdout.split('peak ')[-1]) / 1024


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Measure peak memory of recording and of training from the store, for each number of crops."""
    teachers = make_teachers(args.teachers, args.out / 'teachers')
    print('| crops | store, MB | peak of recording, MiB | peak of training, MiB |\n|---:|---:|---:|---:|')
    rows = []
    for crops in args.crops:
        with tempfile.TemporaryDirectory(dir=args.out) as folder:
            store = Path(folder, 'store')
            recording = peak_memory(['timm_mealv2.soft_labels', *record_argv(args, teachers, crops, store)])
            size = sum(file.stat().st_size for file in store.iterdir()) / 1e6
            argv = ['timm_mealv2.training.run', '--soft-labels', str(store), '--data-dir', str(args.out)]
            argv += ['--val-split', 'train', '--model', args.student, '--num-classes', '1000']
            argv += ['--unlabeled', '--img-size', str(args.img_size), '-b', str(args.batch_size), '--workers', '0']
            argv += ['--opt', 'momentum', '--lr', '0.01', '--epochs', '1', '--output', folder, '--experiment', 'run']
            training = peak_memory(argv)
        rows.append({'crops': crops, 'store_mb': size, 'recording_mib': recording, 'training_mib': training})
        print(f'| {crops} | {size:.2f} | {recording:.0f} | {training:.0f} |', flush=True)
    return {'rows': rows}


def storage(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the bytes a crop takes, stored in one way or another."""
    teachers = make_teachers(args.teachers, args.out / 'teachers')
    rows: dict[str, float] = {}
    for crops in args.crops:
        with tempfile.TemporaryDirectory(dir=args.out) as folder:
            command.main(record_argv(args, teachers, crops, Path(folder, 'store')))
            store = SoftLabelStore(Path(folder, 'store'))
            files = Path(folder, 'files')
            files.mkdir()
            for row, _ in enumerate(store.names):
                (files / str(row)).write_bytes(store.records(row, range(crops)).tobytes())
            os.sync()
            count = len(store.names) * crops
            rows[f'store, {crops} crops'] = sum(file.stat().st_size for file in store.path.iterdir()) / count
            rows[f'one file an image, {crops} crops'] = sum(f.stat().st_blocks * 512 for f in files.iterdir()) / count
    for dtype, size in (('float16', 2), ('float32', 4)):
        rows[f'dense, {dtype}'] = 8 + size * store.meta.num_classes
    print(f'| {store.meta.num_classes} classes, K = {store.meta.top_k} | bytes a crop |\n|---|---:|')
    for name, value in rows.items():
        print(f'| {name} | {value:,.1f} |')
    return {'bytes': rows}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('throughput', 'loading', 'memory', 'storage'))
    parser.add_argument('--photos', type=Path, required=True, metavar='FOLDER', help='natural photos')
    parser.add_argument('--out', type=Path, default=Path('output/soft_labels_benchmark'), help='folder of the images')
    parser.add_argument('--images', type=int, default=512, help='JPEG images to make')
    parser.add_argument('--student', default='mobilenetv3_small_050')
    parser.add_argument('--teachers', nargs='+', default=['resnet18', 'resnet34'], help='timm architectures')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('-b', '--batch-size', type=int, default=64)
    parser.add_argument('-j', '--workers', type=int, default=0)
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--crops-per-decode', type=int, default=4, metavar='R', help='throughput: of the second arm')
    parser.add_argument('--rounds', type=int, default=9, help='throughput: rounds that are measured')
    parser.add_argument('--crops', type=int, nargs='+', default=[4, 40, 400], help='memory, storage: crops of an image')
    parser.add_argument('--top-k', type=int, default=10, metavar='K', help='classes to store of a crop')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write configuration and results there as well')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a measurement."""
    args = build_parser().parse_args(argv)
    make_images(args.photos, args.out / 'train', args.images)
    versions = f'Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}'
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    print(
        f'{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {versions}'
    )
    results = {'memory': memory, 'storage': storage}.get(args.what, throughput)(args)
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps({'settings': settings, 'versions': versions, **results}, indent=2) + '\n')


if __name__ == '__main__':
    run_cli(main)
