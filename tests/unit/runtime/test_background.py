"""Work beside the main thread: in order, over at the end, with its errors."""

from __future__ import annotations

import threading

import pytest

from hawqtool.runtime.background import Background


def test_pieces_are_done_in_order_and_fail_where_they_are_awaited() -> None:
    background, gate, done = Background(most_waiting=2), threading.Event(), list[int]()

    def piece(number: int) -> None:
        gate.wait(60)
        done.append(number)
        if number == 1:
            raise ValueError("the second")

    for number in range(2):
        background.start(lambda number=number: piece(number))
    assert not done
    gate.set()
    with pytest.raises(ValueError, match="the second"):
        background.finish()
    background.finish()  # nothing is left
    background.start(lambda: piece(2))
    background.finish()
    assert done == [0, 1, 2]
