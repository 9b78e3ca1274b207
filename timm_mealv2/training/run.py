"""The training program: `main(argv)` parses, joins the processes, builds the parts of the run, and trains."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from logging.handlers import MemoryHandler
from typing import Any

import torch.distributed as dist

from timm_mealv2.command_line import run_cli
from timm_mealv2.training.build import build
from timm_mealv2.training.distributed import join_processes
from timm_mealv2.training.logs import logging_of_run
from timm_mealv2.training.options import BEGIN
from timm_mealv2.training.settings import import_modules, parse_args
from timm_mealv2.training.stopping import Signals
from timm_mealv2.training.trainer import Trainer

_PATIENCE = 10  # seconds for torchrun to find the process that failed; it looks ten times a second


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the arguments say; without them, those of the command line.

    Raises:
        UserError: What the user can mend.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        print(BEGIN, end='', file=sys.stderr)
        raise SystemExit(2)
    primary = int(os.environ.get('RANK', os.environ.get('SLURM_PROCID', 0))) == 0
    with logging_of_run(primary) as log, Signals(log=primary) as signals:
        train(parse_args(argv), log, signals)


def train(args: argparse.Namespace, log: MemoryHandler, signals: Signals, **parts: Any) -> Trainer:
    """Join the processes, build the parts of a run, and train; return what has trained.

    Args:
        args: The settings, as `parse_args` returns them.
        log: Keeps the lines of the log until there is a file, see `logging_of_run`.
        signals: What may end the run early.
        **parts: Parts that are there already, see `build`.

    Raises:
        UserError: What the user can mend.
    """
    import_modules(args.device_modules or ())
    device = args.device if 'device' in args.given else None
    processes = join_processes(device, args.process_timeout)
    try:
        trainer = build(args, processes, signals, **parts)
        trainer.run(log)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or 'gloo' in str(error).lower():
            time.sleep(_PATIENCE)  # another process has failed: torchrun finds that one, and ends this one
        raise
    finally:
        if processes.distributed:
            dist.destroy_process_group()
    return trainer


def cli() -> None:
    """Run `main` as the command `mealv2-train`."""
    program = main
    if 'TORCHELASTIC_RUN_ID' in os.environ:  # torchrun then shows the error of the process that failed first
        from torch.distributed.elastic.multiprocessing.errors import record

        program = record(main)
    run_cli(program)


if __name__ == '__main__':
    cli()
