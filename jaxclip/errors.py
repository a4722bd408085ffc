"""The one exception that a user, not a programmer, has to act on."""


class UserError(Exception):
    """Bad input: its message is one sentence (or a list of them) that names what is wrong and what would be right.

    Commands print it without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; the error's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
