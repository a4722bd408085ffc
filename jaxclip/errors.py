"""The exception for mistakes of users, as opposed to mistakes of programmers."""


class UserError(Exception):
    """Bad input. The message is one sentence, or a list of sentences, that says what is wrong and what would be right.

    Commands print it without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
