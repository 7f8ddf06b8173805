"""A fixed order of sums where a device has a choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class FixedOrder:
    """Does work with sums of gradients in a fixed order, which attention on a GPU takes only when told so.

    Learning goes through thousands of roundings: differences of the last bit end as another model. Where an operation
    knows no fixed order, that work and all after it are done without.

    Args:
        device: Where the work is done; a CPU has a fixed order anyway.

    Attributes:
        kept: Whether all work so far had a fixed order.
    """

    def __init__(self, device: torch.device) -> None:
        self._switched, self.kept = device.type == "cuda", True

    def run(self, work: Callable[[], Result]) -> Result:
        """Do work, which may be begun twice; gives its result."""
        if self._switched and self.kept:
            try:
                with _fixed_order():
                    return work()
            except RuntimeError as error:
                if "deterministic" not in str(error):
                    raise
                self.kept = False
        return work()


@contextmanager
def _fixed_order() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = False  # it is slow, and nothing here reads what was not written
    torch.use_deterministic_algorithms(True)  # attention takes no notice where this is to warn only
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filling
