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
    """A quality gate failed; the output exists."""

    exit_code = 3


class InputError(HawqError):
    """A checkpoint, a text or a record that cannot be used, or a model that is not supported."""

    exit_code = 4


class NumericalError(HawqError):
    """A numerical, memory or disk failure during the work."""

    exit_code = 5
