"""What the user can mend, told in one line."""

import errno
import os


class UserError(ValueError):
    """A mistake of the user's: the message says in one line what is wrong and what to do.

    The command line programs print it without a traceback and exit with code 2. As a `ValueError` it needs no
    import to be caught by users of the Python interface.
    """


class UnknownOptionError(UserError, TypeError):
    """There is no option of a name: in Python a `TypeError`, as of any function that has no such argument."""


class TrainingFailedError(Exception):
    """A training that cannot go on, by no mistake in its options: the message says in one line what happened.

    The command line program prints it without a traceback and exits with code 1.
    """


def one_line(error: BaseException) -> str:
    """Return an error's message in one line of at most 300 characters, its type's name where it has none."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:300]}...'


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, of the libraries' writers too, tells that the disk or a quota is full."""
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
