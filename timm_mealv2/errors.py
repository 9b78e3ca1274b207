"""What the user can mend, told in one line."""

import csv
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user's: the message says in one line what is wrong and what to do.

    The command line programs print it without a traceback and exit with code 2. As a `ValueError` it needs no
    import to be caught by users of the Python interface.
    """


class TrainingFailedError(Exception):
    """A training that cannot go on, by no mistake in its options: the message says in one line what happened.

    The command line program prints it without a traceback and exits with code 1.
    """


@contextmanager
def blamed_on(file: str | os.PathLike[str]) -> Iterator[None]:
    """Tell what Python raises within the block as a fault of a file's content: the block does nothing but use that."""
    faults = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, csv.Error)
    try:
        yield
    except UserError:
        raise
    except faults as error:
        text = one_line(error)
        raise UserError(
            f'{os.fspath(file)} is damaged, or not of this program: {type(error).__name__}: {text}'
        ) from error


def one_line(error: BaseException) -> str:
    """Return an error's message in one line of at most 300 characters, its type's name where it has none."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:300]}...'


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, of the libraries' writers too, tells that the disk or a quota is full."""
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
