"""Live training in one process and in two, with the same images an update and the same cores.

    python benchmarks/ddp.py

The training program runs on the sample in examples/, each time afresh: one process with two threads, two processes with
one thread each and half of the images. The rate is that of its second epoch, as `summary.csv` has it.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from measuring import in_turn, publish, ratios, spread

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / 'examples/fashion_mnist'


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--student', default='resnet10t', help='timm architecture')
    add('--total-batch-size', type=int, default=128)
    add('--cores', type=int, default=2)
    add('--rounds', type=int, default=3)
    add('--out', type=Path, default=Path('output/ddp_benchmark'), help='folder of the runs')
    add('--save', action='store_true', help='write benchmarks/results/ddp.json')
    return parser


def train(args: argparse.Namespace, processes: int, number: int) -> float:
    """Train for two epochs; return images/s of all processes in the second."""
    name = f'{processes}-processes'
    shutil.rmtree(args.out / name, ignore_errors=True)
    teachers = [f'local-dir:{SAMPLE / "teachers" / teacher}' for teacher in ('teacher_a', 'teacher_b')]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    command += [str(ROOT / 'train_distill.py'), '--teachers', *teachers, '--data-dir', str(SAMPLE / 'data')]
    command += '--train-split train.tar --val-split validation.tar --num-classes 10 --input-size 1 32 32'.split()
    command += '--mean 0.286 --std 0.353 --workers 0 --device cpu --teacher-optimize off --epochs 2'.split()
    command += ['--model', args.student, '--total-batch-size', str(args.total_batch_size)]
    command += ['--output', str(args.out), '--experiment', name]
    environment = {**os.environ, 'OMP_NUM_THREADS': str(args.cores // processes)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise UserError(f'the training failed: {run.stderr[-2000:]}')
    with (args.out / name / 'summary.csv').open() as file:
        return float(list(csv.DictReader(file))[-1]['images_per_second'])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    args = build_parser().parse_args(argv)
    rates = in_turn({str(count): partial(train, args, count) for count in (1, 2)}, args.rounds, warmup=0)
    rows = [
        [count, str(args.cores // int(count)), spread(values, 0), spread(ratios(rates['1'], values))]
        for count, values in rates.items()
    ]
    columns = ['processes', 'threads each', 'images/s: median (quartiles)', 'time, as a ratio to one process']
    title = f'Live training of {args.student} at 32 pixels, {args.total_batch_size} images an update.'
    publish('ddp', title, columns, rows, args.save)


if __name__ == '__main__':
    run_cli(main)
