"""The one error that a person, not a program, is meant to read."""


class UserError(Exception):
    """Something about the input is wrong and its author can put it right.

    The message is one paragraph: it names the argument or file, the value found there, and the remedy.
    The command line prints it without a traceback and exits with code 2; nothing has been trained by then.
    """


class TrainingDivergedError(Exception):
    """The loss of a run is no longer finite; the message says which, and at which step."""


def in_one_line(error: Exception) -> str:
    """An error of another library for a message of ours: its type and at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
