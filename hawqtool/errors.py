"""Expected failures, each with the exit code that belongs to it.

A message says what was found, what was expected and what to do next.
"""


class HawqError(Exception):
    """Base of every expected failure; ``exit_code`` is part of the command line's interface."""

    exit_code = 1


class UsageError(HawqError):
    """Wrong options or configuration, an infeasible size target, an output folder that may not be used."""

    exit_code = 2


class QualityError(HawqError):
    """A quality gate failed; the output exists.

    Args:
        message: All of them in one line.
        failed: A line for each.
    """

    exit_code = 3

    def __init__(self, message: str, failed: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.failed = failed


class InputError(HawqError):
    """A checkpoint, a text or a record that cannot be used, or a model that is not supported."""

    exit_code = 4


class NumericalError(HawqError):
    """A numerical, memory or disk failure during the work."""

    exit_code = 5


def one_line(error: BaseException) -> str:
    """The gist of a library's error, whose message may have many lines: the first, with what a colon announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if isinstance(error, (LookupError, ArithmeticError, AttributeError, TypeError)):
        text = f"{type(error).__name__}: {text}"
    return text.rstrip(": ")
