"""The program `mealv2-report`: run folders drawn as curves.png and report.html."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.report import draw_runs, write_report
from timm_mealv2.runs import read_run
from timm_mealv2.training.options import build_parser as build_training_parser


def build_parser() -> argparse.ArgumentParser:
    """Return a fresh parser of the command line."""
    parser = OneLineParser(prog='mealv2-report', description='Draw run folders: curves.png and report.html.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folder; several are drawn together')
    parser.add_argument(
        '--out', type=Path, metavar='DIR', help='folder to write to (default: the run folder; of several, their parent)'
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, that of the process if None."""
    args = build_parser().parse_args(argv)
    folders = [Path(run).resolve() for run in dict.fromkeys(args.runs)]
    out = args.out or Path(os.path.commonpath(folders))
    common = Path(os.path.commonpath([folder.parent for folder in folders]))
    runs = {str(folder.relative_to(common)): read_run(folder) for folder in folders}  # before anything is written
    out.mkdir(parents=True, exist_ok=True)
    print(draw_runs(runs, out / 'curves.png'))
    defaults = {action.dest: action.default for action in build_training_parser()._actions}
    print(write_report(runs, out / 'report.html', defaults))


def cli() -> None:
    """Run the command `mealv2-report`."""
    run_cli(main)


if __name__ == '__main__':
    cli()
