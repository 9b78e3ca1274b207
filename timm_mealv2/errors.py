"""What the user can mend, told in one line."""


class UserError(ValueError):
    """A mistake of the user's: the message says in one line what is wrong and what to do.

    The command line programs print it without a traceback and exit with code 2. As a `ValueError` it needs no
    import to be caught by users of the Python interface.
    """
