"""How a long computation keeps what it has done, wherever that is kept."""

from __future__ import annotations

from typing import Any, Protocol

BYTES_PER_SECOND = 20e6
"""Most that is written on average: a few percent of what a disk takes, so that keeping costs little beside walking."""


class Saved(Protocol):
    """Finished work by key.

    A content is None, a bool, a number, a string, a tensor, or a list or a dict (with strings for keys) of contents.
    Tensors come back on the CPU, tuples as lists.
    """

    def load(self, key: str) -> Any:
        """What was saved under a key; None where nothing was."""

    def save(self, key: str, content: Any) -> None:
        """Keep a content, in the place of an earlier one."""

    def part(self, name: str) -> Saved:
        """The same store with keys of its own for one part of the work."""

    def drop(self, *keys: str) -> None:
        """Forget contents, as far as there are any; without keys all of this part."""


class NothingSaved:
    """Keeps nothing: for work that is not resumed."""

    def load(self, key: str) -> Any:
        """None."""

    def save(self, key: str, content: Any) -> None:
        """Nothing."""

    def part(self, name: str) -> Saved:
        """Itself."""
        return self

    def drop(self, *keys: str) -> None:
        """Nothing."""


NOTHING_SAVED = NothingSaved()
