"""What every command line program of the package does the same: a user's mistake is one line and exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from timm_mealv2.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage (that of `mealv2-train` fills a screen).

    Its subparsers are of the same class. Exit code 2, as argparse has it.
    """

    def error(self, message: str) -> NoReturn:
        """Print `message` on one line of stderr and exit with code 2."""
        self.exit(2, f'error: {_one_line(message)} ({self.prog} --help lists the options)\n')


def run_cli(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run `main(argv)` as a program; returns when it succeeds.

    A `UserError` becomes one line on stderr and exit code 2; anything else that is not the user's mistake keeps its
    traceback. Ctrl-C exits with 130, and a reader that closed the pipe (`| head`) with 141, as shells report the two
    signals.
    """
    try:
        main(argv)
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's shutdown
    except UserError as error:
        print(f'error: {_one_line(str(error))}', file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # What is still buffered would raise once more when the interpreter flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def _one_line(message: str) -> str:
    return ' '.join(message.split())
