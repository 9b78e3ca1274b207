"""What the user can mend, told in one line."""


class UserError(ValueError):
    """A mistake of the user's: the message says in one line what is wrong and what to do.

    The command line programs print it without a traceback and exit with code 2. As a `ValueError` it needs no
    import to be caught by users of the Python interface.
    """


def one_line(error: BaseException) -> str:
    """Return an error's message in one line of at most 300 characters, its type's name where it has none."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:300]}...'
