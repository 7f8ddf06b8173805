"""Processes that draw figures beside a run: a second on a slow host, in which a GPU's launches would wait for Python.

``python -m hawqtool.report.page.drawing_processes`` reads orders from stdin, each a pickled list of names and data of
figures, and writes a pickled list of their SVG elements for each to stdout; it ends with its input.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, BinaryIO, Self

_MOST, _CORES_EACH = 4, 4
"""Processes at most, and cores of the machine for which there is one."""


def figure_svg(name: str, values: Any) -> str:
    """A figure of the page as an SVG element.

    Args:
        name: Of the figure.
        values: Its data, as `figure_data` gives it.
    """
    # Matplotlib is slow to load, and most commands draw nothing.
    from hawqtool.report.page.drawing import as_svg
    from hawqtool.report.page.figures import FIGURES, TITLES

    return as_svg(partial(FIGURES[name], values), name, TITLES[name])


class DrawingProcesses:
    """Draw figures side by side; a context manager, which ends them."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the processes, which load what they need; once."""
        count = 0 if self._children else min(_MOST, max(1, (os.cpu_count() or 1) // _CORES_EACH))
        command, pipe = [sys.executable, "-m", __name__], subprocess.PIPE
        for _ in range(count):
            self._children.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL))

    def __len__(self) -> int:
        return len(self._children)

    def begin(self, figures: Mapping[str, Any]) -> Callable[[], dict[str, str]]:
        """Have figures drawn, by data by name; what was begun before has been waited for.

        Returns:
            What waits for the SVG elements by name; those that a process failed at, and all where there is none, are
            not among them.
        """
        names = list(figures)
        shares = [names[first :: len(self._children)] for first in range(len(self._children))]
        given = [(child, share) for child, share in zip(self._children, shares, strict=True) if share]
        begun = [(c, share) for c, share in given if _ordered(c, [(name, figures[name]) for name in share])]

        def wait() -> dict[str, str]:
            return {name: svg for c, share in begun for name, svg in zip(share, _answer(c), strict=False)}

        return wait

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            child.kill()
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # an order that it did not take
                child.stdin.close()
        for child in self._children:
            child.__exit__(kind, error, trace)
        self._children.clear()


def _ordered(child: subprocess.Popen[bytes], order: Sequence[tuple[str, Any]]) -> bool:
    """Whether a process has taken an order."""
    assert child.stdin is not None
    try:
        pickle.dump(order, child.stdin)
        child.stdin.flush()
    except BrokenPipeError:  # it has ended
        return False
    return True


def _answer(child: subprocess.Popen[bytes]) -> list[str]:
    """What a process has drawn; nothing where it has ended."""
    assert child.stdout is not None
    try:
        found: list[str] = pickle.load(child.stdout)
    except (EOFError, pickle.UnpicklingError):  # it has ended, perhaps within its answer
        return []
    return found


def serve(orders: BinaryIO, answers: BinaryIO) -> None:
    """Draw what is ordered until the orders end."""
    while True:
        try:
            order = pickle.load(orders)
        except EOFError:
            return
        pickle.dump([figure_svg(*figure) for figure in order], answers)
        answers.flush()


if __name__ == "__main__":
    figure_svg("timings", {"names": ["none"], "values": [1.0], "errors": [], "axis": ""})  # loads all that others need
    serve(sys.stdin.buffer, sys.stdout.buffer)
