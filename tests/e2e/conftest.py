"""Fixtures of the end-to-end tests, built once."""

from tests.support.runs import mixed, place, run, sensitivity  # noqa: F401
