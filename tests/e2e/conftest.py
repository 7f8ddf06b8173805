"""Fixtures of the end-to-end tests, built once."""

from tests.e2e.runs import mixed, place, run, sensitivity  # noqa: F401
