"""Kill and resume a training at random points, and compare its end with that of one that was never killed.

    python benchmarks/soak.py --minutes 10

The training is a short one of the sample in examples/fashion_mnist, with everything on that draws random numbers or
keeps a state. It is run once without a kill; then again and again, each time with kills by SIGKILL or SIGTERM after
random times (a function of --seed), each followed by the same command again. What is left in the run folder in the end
has to be the same: every tensor of every checkpoint to the bit, the names of the files, and the summary but for its
speed. The program ends with 1 if anything differs.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.runs import TIMES
from timm_mealv2.training.checkpoint_saver import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / 'examples/fashion_mnist'
OPTIONS = (
    '--model test_resnet --num-classes 10 --in-chans 1 --img-size 28 --batch-size 50 --epochs 3 --lr 0.02 --opt adamw '
    '--sched plateau --patience-epochs 0 --warmup-epochs 1 --grad-accum-steps 2 --clip-grad 1 --model-ema '
    '--model-ema-decay 0.9 --mixup 0.2 --reprob 0.3 --drop 0.1 --drop-path 0.1 --hard-label-weight 0.2 '
    '--checkpoint-hist 2 --recovery-interval 3 --log-interval 100 --no-preflight --device cpu --resume auto '
    '--teacher-tune off'
).split()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=10, help='begin no further run after this time')
    parser.add_argument('--seed', type=int, default=0, help='of the times and kinds of the kills')
    parser.add_argument('--workers', type=int, default=2, help='worker processes of the training')
    parser.add_argument('--processes', type=int, default=1, help='training processes, under torchrun if not 1')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures there as well')
    return parser


def differences(first: Path, second: Path) -> list[str]:
    """Compare two run folders; what differs, one text each, none if they are the same.

    Compared are the names of the files, each value of each checkpoint but its arguments (they hold the folder), and the
    summary but for speed and times.
    """
    found = []
    names = [sorted(path.name for path in folder.iterdir()) for folder in (first, second)]
    if names[0] != names[1]:
        found.append(f'files: {names[0]} and {names[1]}')
    rows = []
    for folder in (first, second):
        with open(folder / 'summary.csv', newline='') as file:
            own = csv.DictReader(file)
            rows.append([{k: v for k, v in row.items() if k not in ('images_per_second', *TIMES)} for row in own])
    if rows[0] != rows[1]:
        found.append(f'summary.csv: {rows[0]} and {rows[1]}')
    for name in sorted(set(names[0]) & set(names[1])):
        if name.endswith('.pth.tar'):
            values = [
                dict(_leaves({k: v for k, v in read_checkpoint(folder / name).items() if k != 'args'}))
                for folder in (first, second)
            ]
            for key in sorted(values[0].keys() | values[1].keys()):
                if not _equal(*(value.get(key, 'absent') for value in values)):
                    found.append(f'{name}: {key}')
    return found


def _leaves(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list, tuple)):
        yield path, type(value).__name__
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f'{path}/{key}')
    else:
        yield path, value


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and (first == second or (first != first and second != second))


def start(folder: Path, args: argparse.Namespace) -> subprocess.Popen:
    """Start the training whose run folder is `folder`, or continue it."""
    command = [sys.executable]
    if args.processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(args.processes)]
    command += [str(ROOT / 'train_distill.py'), *OPTIONS, '--workers', str(args.workers)]
    command += ['--data-dir', str(SAMPLE / 'data'), '--train-split', 'train.tar', '--val-split', 'validation.tar']
    command += ['--teachers', *(f'local-dir:{SAMPLE}/teachers/teacher_{name}' for name in 'ab')]
    command += ['--output', str(folder.parent), '--experiment', folder.name]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with open(folder.parent / f'{folder.name}.log', 'ab') as log:
        # A session of its own: a kill meets the worker processes too, as when a machine is taken away.
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def soak(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Run the soak in the folder `root`; return its figures."""
    end = time.monotonic() + 60 * args.minutes
    began = time.monotonic()
    whole = root / 'unkilled'
    if start(whole, args).wait() != 0:
        raise UserError(f'the training does not run: {_last_line(root / "unkilled.log")}')
    duration = time.monotonic() - began
    print(f'unkilled run: {duration:.0f} s', flush=True)
    generator = random.Random(args.seed)
    kills = {'SIGKILL': 0, 'SIGTERM': 0}
    runs = resumes = 0
    found: list[str] = []
    while time.monotonic() < end:
        run = root / f'run-{runs}'
        starts = 0
        while True:
            process = start(run, args)
            starts += 1
            try:
                code = process.wait(generator.uniform(0, 0.7 * duration))
            except subprocess.TimeoutExpired:
                name = generator.choice(list(kills))
                kills[name] += 1
                if name == 'SIGKILL':
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.terminate()
                code = process.wait()
                continue
            if code != 0:
                raise UserError(f'a run ended with {code}: {_last_line(root / f"{run.name}.log")}')
            break
        runs += 1
        resumes += starts - 1
        differing = differences(whole, run)
        found += [f'{run.name}: {text}' for text in differing]
        print(f'{run.name}: {starts - 1} kills, {len(differing)} differences', flush=True)
    return {'runs': runs, **kills, 'resumes': resumes, 'differences': found}


def _last_line(path: Path) -> str:
    return (path.read_text(errors='replace').splitlines() or [''])[-1]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the soak and print its figures."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(args, Path(folder))
    print(
        f'{date.today()}: {figures["runs"]} runs, {figures["SIGKILL"]} kills by SIGKILL and {figures["SIGTERM"]} by '
        f'SIGTERM, {figures["resumes"]} resumes, {len(figures["differences"])} differences'
    )
    for text in figures['differences'][:20]:
        print(f'  {text[:500]}')
    if args.json:
        args.json.write_text(json.dumps({**figures, 'date': str(date.today())}, indent=1))
    if figures['differences']:
        raise SystemExit(1)


if __name__ == '__main__':
    run_cli(main)
