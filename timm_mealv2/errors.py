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


# The libraries' writers, allocators and worker processes tell of these in the text of errors of their own.
_REFUSALS = [
    *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)),
    *map(os.strerror, (errno.ENOMEM, errno.EMFILE, errno.ENFILE)),
    "can't start new thread",
    'could not create a primitive',  # oneDNN, without memory
    'DataLoader worker (pid',  # it was killed: for its memory, or as shared memory was full
]


def refusal(error: BaseException) -> str | None:
    """Return what the machine refused: space, memory, open files, a folder that takes files; None if nothing."""
    text = 'MemoryError: Cannot allocate memory' if isinstance(error, MemoryError) else str(error)
    if not any(words in text for words in _REFUSALS):
        return None
    return text.strip().splitlines()[-1]  # of a worker's error, behind its traceback
