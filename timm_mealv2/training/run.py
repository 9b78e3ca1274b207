"""The training program: `main(argv)` parses, joins the processes, builds the parts of the run, and trains."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from timm_mealv2.command_line import run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.training.build import build
from timm_mealv2.training.distributed import is_timeout, join_processes
from timm_mealv2.training.options import BEGIN
from timm_mealv2.training.progress import TerminalHandler, TrainLog
from timm_mealv2.training.settings import parse_args, recipes
from timm_mealv2.training.stopping import Signals

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
    if argv[0] == 'recipes':  # a data set of that name is ./recipes
        recipes(argv[1:])
        return
    primary = int(os.environ.get('RANK', os.environ.get('SLURM_PROCID', 0))) == 0
    console = TerminalHandler() if sys.stderr.isatty() else logging.StreamHandler()
    logging.basicConfig(level=logging.INFO, format='%(message)s', handlers=[console])
    for name in ('timm.data', 'timm.utils'):  # they tell of each tar file, and of all checkpoints after each epoch
        logging.getLogger(name).setLevel(logging.WARNING if primary else logging.ERROR)
    if not primary:  # the first process says what all have to say; unreadable images are each one's own
        logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger('timm_mealv2.data.unreadable').setLevel(logging.WARNING)
        warnings.simplefilter('ignore')
    args = parse_args(argv)
    with TrainLog() as log, Signals(log=primary) as signals:
        device = args.device if 'device' in args.given else None
        processes = join_processes(device, args.device_modules or (), args.process_timeout)
        try:
            build(args, processes, signals).run(log)
        except RuntimeError as error:
            # A broken connection: another process has failed, and its error is the one to show. torchrun, which shows
            # the earliest by the second, ends this process before its own is told.
            broken = isinstance(error, dist.DistError) or 'gloo' in str(error).lower() or is_timeout(error)
            if processes.distributed and broken:
                ends = time.monotonic() + _PATIENCE
                silent = processes.silent(_PATIENCE)
                if silent and is_timeout(error):
                    raise UserError(
                        f'{", ".join(silent)} did not answer for {args.process_timeout:g} minutes (--process-timeout): '
                        'it hangs, or its machine does.'
                    ) from error
                time.sleep(max(0.0, ends - time.monotonic()))
            raise
        finally:
            if processes.distributed:
                dist.destroy_process_group()


def cli() -> None:
    """Run `main` as the command `mealv2-train`."""
    run_cli(record(main))  # torchrun shows the error of the process that failed first


if __name__ == '__main__':
    cli()
