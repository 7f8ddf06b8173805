"""Fixtures of the tests of scripts, built once."""

from tests.support.runs import mixed, place, run, sensitivity  # noqa: F401
