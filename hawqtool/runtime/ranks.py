"""Processes that share the work of a run, one per GPU: the first leads, the others do what it hands out."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hawqtool.errors import UsageError
from hawqtool.runtime.launched import OTHER_GONE, local_rank, world_size

_LONGEST_WAIT = timedelta(days=30)
"""A rank may wait for the leader while that works alone; one that dies is noticed by what started them all."""


_SEED_STEP = 1_000_003
"""Between the seeds of two ranks: others are a few apart from the one that was given."""


_SECONDS_TO_END = 3.0
"""How long a process takes to end once it no longer exchanges anything, at most."""

_LEADER_IS_HERE, _LOOKS_EVERY = "hawqtool/leader", 0.02
"""What the leader tells when it joins the others, and seconds between two looks at that."""


class Task(NamedTuple):
    """What the leader hands out.

    Args:
        function: A module's function; its first arguments are what `Ranks.serve` was given.
        args: Further ones.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]


class Ranks:
    """The processes of a run, and what goes between them.

    Values that go from one to another may be anything that pickles; tensors in them travel as they are, on a GPU by
    NCCL, and arrive on the receiver's device of the same kind. Every method but `share` must be called by all ranks
    in the same order, those with a task inside it.

    Args:
        rank: Number of this process; 0 leads.
        size: How many there are.
        first: Number of the first one among all processes, where they are some of them only.
        group: torch's group of those; None for that of all.

    Attributes:
        kept: What tasks keep for later ones, by name; teams have that of all ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, first: int = 0, group: Any = None) -> None:
        self.rank, self.size = rank, size
        self.kept: dict[str, Any] = {}
        self._first, self._group = first, group
        self._teams: dict[int, Ranks | None] = {}

    @property
    def leads(self) -> bool:
        """Whether this is the process that hands out tasks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The consecutive rows of ``count`` that are this rank's; shares differ by one at most.

        Raises:
            UsageError: If there are fewer rows than ranks.
        """
        if count < self.size:
            raise UsageError(f"{count} rows cannot be shared by {self.size} processes; use fewer --gpus, or more rows")
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def seed(self, seed: int) -> int:
        """A seed for draws of this rank alone; the leader's is the one given."""
        return seed + _SEED_STEP * self.rank

    def teams(self, count: int) -> tuple[int, Ranks | None]:
        """The ranks in so many teams of equal size, for work that does not depend on each other's.

        Returns:
            Number of this rank's team, and its ranks, the first of which leads; None where this one is left over.
        """
        number, place = divmod(self.rank, self.size // count)
        if count not in self._teams:
            self._teams[count] = self._team(count, number, place)
        return number, self._teams[count]

    def _team(self, count: int, number: int, place: int) -> Ranks | None:
        size = self.size // count
        firsts = [self._first + team * size for team in range(count)]
        # Every process takes part in making all of them.
        groups = [dist.new_group(range(first, first + size)) if size > 1 else None for first in firsts]
        if number >= count:
            return None
        team = Ranks(place, size, firsts[number], groups[number])
        team.kept = self.kept
        return team

    def to_owner(self, value: Any, owner: int) -> list[Any] | None:
        """Values of all ranks in their order, on the rank that owns them; None on the others."""
        return self.folded(value, owner, _appended, [])

    def folded(self, value: Any, owner: int, add: Callable[[Any, Any], Any], start: Any = None) -> Any:
        """Sum of the values of all ranks in their order, on the rank that owns it; None on the others.

        The owner holds the sum and one value of another rank at a time.

        Args:
            value: This rank's own; the owner's may be changed.
            owner: Who gets the sum.
            add: Gives the sum of what there is so far and the next value.
            start: What the first value is added to; None: nothing, the first is the sum so far.
        """
        if self.rank != owner:
            self._give(value, owner)
            return None
        total = start
        for rank in range(self.size):
            part = value if rank == owner else self._take(rank)
            total = part if total is None else add(total, part)
        return total

    def _give(self, value: Any, to: int) -> None:
        with _ends_with_others():
            _send(value, self._first + to)

    def _take(self, source: int) -> Any:
        with _ends_with_others():
            return _receive(self._first + source)

    def from_owner(self, value: Any, owner: int) -> Any:
        """The owner's value on every rank; what the others give is ignored."""
        if self.size == 1:
            return value
        source, group = self._first + owner, self._group
        with _ends_with_others():
            if self.rank == owner:
                data, tensors = _pickled(value)
                dist.broadcast(torch.tensor([len(data)]), source, group)
                dist.broadcast(data, source, group)
                for tensor in tensors:
                    dist.broadcast(tensor, source, group)
                return value
            length = torch.zeros(1, dtype=torch.int64)
            dist.broadcast(length, source, group)
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, source, group)
            return _unpickled(data, lambda tensor: dist.broadcast(tensor, source, group))

    def everywhere(self, value: Any) -> list[Any]:
        """Values of all ranks in their order, on every rank."""
        return [self.from_owner(value, rank) for rank in range(self.size)]

    def mean(self, value: Tensor, count: int) -> Tensor:
        """Mean over what all ranks hold, on every rank, from each one's own mean over ``count`` things."""
        if self.size == 1:
            return value
        shares = self.everywhere((value, count))
        total = sum(number for _, number in shares)
        return sum((own * (number / total) for own, number in shares[1:]), shares[0][0] * (shares[0][1] / total))

    def averages(self, values: Sequence[Tensor], count: int) -> list[Tensor]:
        """Means over what all ranks hold, on every rank, from each one's own means over ``count`` things.

        Each value is summed by one rank, in the order of the ranks.
        """
        if self.size == 1:
            return list(values)
        owners = owners_by_cost([float(value.numel()) for value in values], self.size)
        places = [[p for p, owner in enumerate(owners) if owner == rank] for rank in range(self.size)]
        own: list[Tensor] = []
        for owner, some in enumerate(places):
            total = self.folded((count, [values[p] * count for p in some]), owner, _added)
            if total is not None:
                own = [value.div_(total[0]) for value in total[1]]
        found = list(values)
        for owner, some in enumerate(places):
            for place, mean in zip(some, self.from_owner(own, owner), strict=True):
                found[place] = mean
        return found

    def hand_out(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the other ranks call ``function(..., *args)``; the leader is to do its own share then."""
        if self.size > 1:
            self.from_owner(Task(function, args), 0)

    def serve(self, *context: Any) -> None:
        """Do what the leader hands out, until it has nothing more.

        Args:
            context: First arguments of every task.
        """
        while (task := self.awaited()) is not None:
            task.function(*context, *task.args)

    def awaited(self) -> Any:
        """What the leader gives next."""
        return self.from_owner(None, 0)

    def dismiss(self) -> None:
        """Let the others go; by the leader, between tasks."""
        if self.size > 1 and self.leads:
            self.from_owner(None, 0)

    def leave(self) -> None:
        """Stop the threads that exchange values: a process that ends with them may be aborted."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def owners_by_cost(costs: Sequence[float], size: int) -> list[int]:
    """A rank for every piece of work: the most costly first, each to the rank that has the least so far."""
    loads, owners = [0.0] * size, [0] * len(costs)
    for position in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[position] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owners[position]] += costs[position]
    return owners


def _added(total: tuple[int, list[Tensor]], more: tuple[int, list[Tensor]]) -> tuple[int, list[Tensor]]:
    return total[0] + more[0], [value.add_(part) for value, part in zip(total[1], more[1], strict=True)]


def _appended(values: list[Any], value: Any) -> list[Any]:
    return [*values, value]


ALONE = Ranks()
"""The one process of a run that has no others."""


def take_gpu() -> None:
    """Make this process's own GPU the current one; nothing without others.

    Raises:
        UsageError: If there are more processes than GPUs.
    """
    if world_size() == 1:
        return
    if local_rank() >= (count := torch.cuda.device_count()):
        raise UsageError(f"{world_size()} processes were started, but there are {count} GPUs; expected one for each")
    torch.cuda.set_device(local_rank())


def joined(cuda: bool) -> Ranks:
    """The processes that a launcher started together with this one; `ALONE` without one. Waits for all of them.

    Args:
        cuda: Whether each computes on a GPU of its own.

    Raises:
        UsageError: If there are more processes than GPUs.
    """
    if world_size() == 1:
        return ALONE
    if cuda:
        take_gpu()
    store, rank, size = next(dist.rendezvous("env://", timeout=_LONGEST_WAIT))
    if rank == 0:
        store.set(_LEADER_IS_HERE, "")
    while not store.check([_LEADER_IS_HERE]):  # joining hears no signal
        time.sleep(_LOOKS_EVERY)
    backends = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=_LONGEST_WAIT)
    return Ranks(rank, size)


@contextmanager
def _ends_with_others() -> Iterator[None]:
    """Ends the process where another, with which it exchanges something, has ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        time.sleep(_SECONDS_TO_END)  # the other's exit code is the run's, so it has to be seen first
        raise SystemExit(OTHER_GONE) from error


class _Pickler(pickle.Pickler):
    """Leaves tensors out, noting their places."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not Tensor:
            return None
        self.tensors.append(value.detach().contiguous())
        return value.dtype, tuple(value.shape), value.device.type


class _Unpickler(pickle.Unpickler):
    """Puts tensors in their places, filled by what receives them, in order."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.tensors: list[Tensor] = []

    def persistent_load(self, described: Any) -> Tensor:
        dtype, shape, device = described
        self.tensors.append(torch.empty(shape, dtype=dtype, device=device))
        return self.tensors[-1]


def _pickled(value: Any) -> tuple[Tensor, list[Tensor]]:
    """Bytes ``[n]`` uint8 of a value without its tensors, and these."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(value)
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8), pickler.tensors


def _unpickled(data: Tensor, receive: Callable[[Tensor], Any]) -> Any:
    unpickler = _Unpickler(io.BytesIO(data.numpy().tobytes()))
    value = unpickler.load()
    for tensor in unpickler.tensors:
        receive(tensor)
    return value


def _send(value: Any, to: int) -> None:
    data, tensors = _pickled(value)
    dist.send(torch.tensor([len(data)]), to)
    dist.send(data, to)
    for tensor in tensors:
        dist.send(tensor, to)


def _receive(source: int) -> Any:
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, source)
    data = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(data, source)
    return _unpickled(data, lambda tensor: dist.recv(tensor, source))
