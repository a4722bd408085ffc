"""The one exception that a user, not a programmer, has to act on."""


class UserError(Exception):
    """Bad input: its message is one sentence (or a list of them) that names what is wrong and what would be right.

    Commands print it without a traceback and exit with status 2.
    """
