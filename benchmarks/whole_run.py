r"""An epoch of whole training programs: `mealv2-train` beside timm's own train.py, from the same images.

    python benchmarks/whole_run.py --photos FOLDER --timm-train TRAIN.PY

timm's train.py is not in its wheel: give a copy. It distills from the same two teachers, as a registered ensemble at
temperature 1 without labels, and trains plainly; ours trains with both teachers live, with one of them a sample, and on
stored labels with one and with four samples a decode. From the photos (JPEG or PNG, larger than 500x375) random crops
are made into JPEG images. Weights are random: time alone is measured.

Each program runs as a user runs it, for two epochs and for one. The difference is an epoch, without start-up: its
processor seconds, of workers too, and its images a second. Arms take turns; ratios are formed within a round.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from measuring import in_turn, make_images, publish, ratios, spread
from timm.models import save_for_hf

from timm_mealv2.command_line import OneLineParser, file_text, run_cli
from timm_mealv2.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--photos', type=Path, required=True, metavar='FOLDER', help='natural photos')
    add('--timm-train', type=file_text, required=True, metavar='FILE', help="timm's train.py")
    add('--out', type=Path, default=Path('output/whole_run_benchmark'), help='folder of images, teachers and runs')
    add('--student', default='resnet18', help='timm architecture')
    add('--teachers', nargs=2, default=['resnet50', 'resnet34'], help='timm architectures')
    add('--img-size', type=int, default=128)
    add('--images', type=int, default=512, help='JPEG images to make')
    add('-b', '--batch-size', type=int, default=16)
    add('-j', '--workers', type=int, default=0)
    add('--threads', type=int, default=2)
    add('--rounds', type=int, default=3)
    add('--save', action='store_true', help='write benchmarks/results/whole_run.json')
    return parser


def make_teachers(args: argparse.Namespace) -> list[str]:
    """Write the teachers with random weights; return their names."""
    names = []
    for name in args.teachers:
        torch.manual_seed(0)
        save_for_hf(timm.create_model(name, num_classes=2), args.out / name, safe_serialization=True)
        names.append(f'local-dir:{(args.out / name).absolute()}')
    return names


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Arm -> its command line, without the number of epochs."""
    teachers = make_teachers(args)
    common = ['--data-dir', str(args.out), '--val-split', 'validation', '--num-classes', '2', '--device', 'cpu']
    common += ['--img-size', str(args.img_size), '-b', str(args.batch_size), '-j', str(args.workers), '--lr', '0.01']
    model = ['--model', args.student, '--output', str(args.out / 'runs'), '--experiment', 'run', '--channels-last']
    timms = [sys.executable, args.timm_train, *common, *model]
    ensemble = ['--device-modules', 'timm_mealv2', '--kd-model-name', f'local-dir:{args.out / "ensemble"}']
    ours = [sys.executable, str(ROOT / 'train_distill.py'), *common, *model, '--no-preflight', '--weight-decay', '0']
    live, store = [*ours, '--teachers', *teachers], args.out / 'store'
    shutil.rmtree(store, ignore_errors=True)
    record = [sys.executable, '-m', 'timm_mealv2.cli.soft_labels', 'record', '--teachers', *teachers, '--epochs', '2']
    record += ['--data-dir', str(args.out), '--img-size', str(args.img_size), '--device', 'cpu', '--out', str(store)]
    run(args, record)
    (args.out / 'ensemble').mkdir(exist_ok=True)
    config = {'architecture': 'mealv2_ensemble', 'num_classes': 2, 'model_args': {'teachers': teachers}}
    (args.out / 'ensemble' / 'config.json').write_text(json.dumps(config))
    stored = [*ours, '--soft-labels', str(store)]
    return {
        "timm's, from the ensemble": [*timms, *ensemble, '--kd-temperature', '1', '--task-loss-weight', '0'],
        "timm's, plain": timms,
        'ours, two teachers': live,
        'ours, one teacher a sample': [*live, '--teachers-per-sample', '1'],
        'ours, stored labels': stored,
        'ours, stored labels, 4 samples a decode': [*stored, '--samples-per-decode', '4'],
    }


def run(args: argparse.Namespace, command: Sequence[str]) -> tuple[float, float]:
    """Run a program; return its wall and processor seconds, those of the processes that it waited for included."""
    shutil.rmtree(args.out / 'runs', ignore_errors=True)
    environment = {**os.environ, 'OMP_NUM_THREADS': str(args.threads), 'PYTHONPATH': str(ROOT)}
    log = args.out / 'log.txt'
    began = time.perf_counter()
    with log.open('w') as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise UserError(f'{" ".join(command)} failed: {log.read_text()[-2000:]}')
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def epoch(args: argparse.Namespace, command: Sequence[str], number: int) -> tuple[float, float]:
    """Return wall and processor seconds of an epoch."""
    one, two = (run(args, [*command, '--epochs', epochs]) for epochs in ('1', '2'))
    return two[0] - one[0], two[1] - one[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    args = build_parser().parse_args(argv)
    args.out = args.out.absolute()
    make_images(args.photos, args.out / 'train', args.images)
    make_images(args.photos, args.out / 'validation', 2)
    times = in_turn({name: partial(epoch, args, words) for name, words in commands(args).items()}, args.rounds, 0)
    processor = {name: [seconds for _, seconds in values] for name, values in times.items()}
    distilled, plain = list(processor.values())[:2]
    rows = []
    for name, values in times.items():
        rates = [args.images / wall for wall, _ in values]
        of_distilled, of_plain = (ratios(processor[name], reference) for reference in (distilled, plain))
        rows.append([name, spread(rates, 1), spread(processor[name], 1), spread(of_distilled), spread(of_plain)])
    columns = ['program', 'images/s', 'processor s an epoch', "ratio to timm's distillation", "ratio to timm's plain"]
    title = (
        f'An epoch of {args.student} from {" + ".join(args.teachers)}: {args.images} JPEG images at {args.img_size} '
        f'pixels, batches of {args.batch_size}, {args.threads} threads.'
    )
    publish('whole_run', title, columns, rows, args.save)


if __name__ == '__main__':
    run_cli(main)
