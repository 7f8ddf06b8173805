"""Hessian-vector products with one block's weights in memory: forward-mode differentiation of the reverse sweep.

For a loss ℓ(θ) and a direction v, Hv is the derivative of the gradient ∇ℓ(θ + εv) at ε = 0 (Pearlmutter 1994). A
forward sweep carries every hidden state with its tangent, a reverse sweep the gradient with its tangent; each block
needs only its own weights, its input and that input's tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hawqtool.errors import NumericalError
from hawqtool.model.block import BlockCall, LoadedBlock
from hawqtool.model.tasks import row_labels
from hawqtool.records import LinearSpec
from hawqtool.streaming.stream import ModelStream

DATA, SAMPLED, OWN_OUTPUT = "next tokens of the rows", "sampled from the model", "the model's own embedding"
"""What the loss compares the outputs with: see `Curvature`."""

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pass:
    """One product: the loss of one row, or of the rows of one part, along one direction.

    Args:
        row: Index of the part (see `Curvature`); of the row where parts are single rows.
        tag: What tells the directions of one row apart.
    """

    row: int
    tag: int


Direction = Callable[[Pass, str, Tensor], Tensor | None]
"""Tangent of a named variable in a pass, shaped as the variable that is given; None where it stays as it is."""

Visit = Callable[[Pass, str, Tensor, Tensor], None]
"""Takes pass, name of the variable, its part of the direction v and of the product Hv."""


class Curvature:
    """The Hessian of each row's summed loss, or of its sum over the rows of a part.

    The loss is the cross-entropy of labels: for causal language models the row's own next tokens, so that the last
    output has none; for other models with logits, whose rows bring no labels, labels drawn once from the model at
    every output. For embedding models it is ‖e - e₀‖² / ‖e₀‖² with e₀ the embedding of the original model.

    Args:
        stream: The original model; float32 or wider, as second derivatives drown in the noise of half precision.
        rows: ``[rows, seq_len]`` tokens, or images.
        seed: Seed of the labels that are drawn.
        rows_per_pass: Rows of a part, whose losses are summed: more are faster where only the sum is wanted.
    """

    def __init__(self, stream: ModelStream, rows: Tensor, seed: int, rows_per_pass: int = 1) -> None:
        self.stream, self.rows, self._seed = stream, rows, seed
        self.parts = rows.split(rows_per_pass)
        embedded = stream.embed(rows, rows_per_pass)
        self.first_hidden, self.calls = embedded.hidden, embedded.calls
        self.labels = DATA if stream.task.generates else SAMPLED if stream.task.logits else OWN_OUTPUT

    @property
    def outputs(self) -> int:
        """Outputs that a row's loss sums over; results are divided by it."""
        positions = self.first_hidden[0].shape[1]
        if self.stream.task.per_row:
            return row_labels(self.stream.model)
        return positions - 1 if self.labels == DATA else positions

    def advance(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states behind a block from those before it."""
        with torch.no_grad(), self.stream.block(index) as block:
            return [block.run(state, self.calls[i][index]) for i, state in enumerate(hidden)]

    def tail(self, part: int, hidden: Tensor) -> Stage:
        """From the last block's output to the summed loss of a part's rows."""
        with torch.no_grad():
            outputs = self.stream.outputs(self.parts[part], hidden)
        if not bool(torch.isfinite(outputs).all()):
            raise NumericalError("the original model gives outputs that are NaN or Inf; check its weights")
        loss = self._loss(part, outputs)
        return Stage(self.stream.head, lambda state: loss(self.stream.outputs(self.parts[part], state)))

    def _loss(self, part: int, outputs: Tensor) -> Loss:
        if self.labels == OWN_OUTPUT:
            power = outputs.square().sum((1, 2))
            return lambda found: ((found - outputs).square().sum((1, 2)) / power).sum()
        if self.labels == DATA:
            labels = self.parts[part][:, 1:].to(outputs.device)
        else:
            first = part * len(self.parts[0])
            labels = torch.stack([self._drawn(first + i, found) for i, found in enumerate(outputs)])
        kept, flat = labels.shape[1], labels.flatten()
        return lambda found: nn.functional.cross_entropy(found[:, :kept].flatten(0, 1), flat, reduction="sum")

    def _drawn(self, row: int, outputs: Tensor) -> Tensor:
        generator = torch.Generator(outputs.device).manual_seed(self._seed + row)
        return torch.multinomial(outputs.float().softmax(-1), 1, generator=generator)[:, 0]


@dataclass(frozen=True)
class Stage:
    """A block, or what follows the blocks, as a function of the hidden state before it.

    Args:
        block: Holds the linears that count; None where there are none.
        function: Output from the hidden state.
    """

    block: LoadedBlock | None
    function: Callable[[Tensor], Tensor]

    @classmethod
    def of_block(cls, block: LoadedBlock, call: BlockCall) -> Stage:
        """A block with the other arguments of its call."""
        return cls(block, partial(block.run, call=call))

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Its linears."""
        return self.block.spec.linears if self.block else ()

    def run(self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output, with other weights where they are given, as `LoadedBlock.with_weights` takes them."""
        if self.block is None or not weights:
            return self.function(hidden)
        with self.block.with_weights(weights):
            return self.function(hidden)


class Variables(Protocol):
    """What the Hessian is taken with respect to."""

    def values(self, stage: Stage, hidden: Tensor) -> dict[str, Tensor]:
        """The variables of a stage by name."""

    def run(self, stage: Stage, values: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """Output of the stage as a function of variables and hidden state."""


class Weights:
    """Weights of the linears, under the linears' names, as the model holds them."""

    def values(self, stage: Stage, hidden: Tensor) -> dict[str, Tensor]:
        """Weights of the stage."""
        return {m.name: stage.block.parameter(m) for m in stage.linears} if stage.block else {}

    def run(self, stage: Stage, values: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """Output with these weights."""
        if stage.block is None:
            return stage.run(hidden)
        local = stage.block.local_name
        return stage.run(hidden, {f"{local(m)}.weight": values[m.name] for m in stage.linears if m.name in values})


class Inputs:
    """Additive perturbations, of value zero, of each unit's input, under the name of the first linear that shares it.

    Members of a unit in one input group are perturbed together, as one rounding of their input would.
    """

    def values(self, stage: Stage, hidden: Tensor) -> dict[str, Tensor]:
        """Zeros in the shape of each input; only a run tells how many tokens an expert sees."""
        found: dict[str, Tensor] = {}

        def see(x: Tensor, name: str) -> None:
            found[name] = torch.zeros_like(x)

        with torch.no_grad(), self._hooks(stage, see):
            stage.run(hidden)
        return found

    def run(self, stage: Stage, values: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """Output with these perturbations."""
        with self._hooks(stage, lambda x, name: x + values[name] if name in values else None):
            return stage.run(hidden)

    @contextmanager
    def _hooks(self, stage: Stage, act: Callable[[Tensor, str], Tensor | None]) -> Iterator[None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> Any:
            changed = act(inputs[0], name)
            return None if changed is None else (changed, *inputs[1:])

        hooks, block = [], stage.block
        for group in block.spec.input_groups if block else ():
            names: dict[str, str] = {}
            for linear in group:
                name = names.setdefault(linear.unit, linear.name)
                assert block is not None  # it has the group
                hooks.append(block.linear(linear).register_forward_pre_hook(partial(hook, name=name)))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


class Prefix(NamedTuple):
    """The blocks before those that are walked.

    Args:
        blocks: Their number.
        hidden: Hidden states behind them, per part.
    """

    blocks: int
    hidden: Sequence[Tensor]


def products(
    curvature: Curvature,
    variables: Variables,
    passes: Sequence[Pass],
    direction: Direction,
    visit: Visit,
    begin: Prefix | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """One Hessian-vector product of a part's summed loss per pass.

    Args:
        curvature: Rows and their losses.
        variables: What the loss is a function of.
        passes: Parts and directions; every part occurs.
        direction: The directions; asked twice for every variable, so it must repeat itself.
        visit: Takes the products of every variable that has a tangent.
        begin: Where the sweep begins; no variable before it has a tangent (default: at the first block).
        progress: Called with the blocks done, both ways together, and those in all.
    """
    stream = curvature.stream
    begin = begin or Prefix(0, curvature.first_hidden)
    states = list(begin.hidden)
    tangents = [torch.zeros_like(states[p.row]) for p in passes]
    blocks = stream.structure.blocks[begin.blocks :]
    stored: list[tuple[list[Tensor], list[Tensor]]] = []
    # The backward passes of fused attention kernels have no derivative of their own.
    with sdpa_kernel(SDPBackend.MATH):
        for done, spec in enumerate(blocks):
            stored.append((states, list(tangents)))
            states = list(states)
            with stream.block(spec.index) as block:
                for i, p in enumerate(passes):
                    stage = Stage.of_block(block, curvature.calls[p.row][spec.index])
                    point = _point(stage, variables, direction, p, stored[-1][0][p.row], tangents[i])
                    states[p.row], tangents[i] = _tangent(*point)
            progress(done + 1, 2 * len(blocks))
        one = torch.ones((), dtype=states[0].dtype, device=states[0].device)
        gradients = [(one, torch.zeros_like(one))] * len(passes)
        for i, p in enumerate(passes):
            stage = curvature.tail(p.row, states[p.row])
            point = _point(stage, variables, direction, p, states[p.row], tangents[i])
            gradients[i] = _pull(point, *gradients[i], p, visit)
        for done, spec in enumerate(reversed(blocks)):
            states, tangents = stored.pop()
            with stream.block(spec.index) as block:
                for i, p in enumerate(passes):
                    stage = Stage.of_block(block, curvature.calls[p.row][spec.index])
                    point = _point(stage, variables, direction, p, states[p.row], tangents[i])
                    gradients[i] = _pull(point, *gradients[i], p, visit)
            progress(len(blocks) + done + 1, 2 * len(blocks))


_Point = tuple[Callable[..., Tensor], tuple[dict[str, Tensor], Tensor], tuple[dict[str, Tensor], Tensor]]
"""A function of variables and hidden state, their values, their tangents."""


def _point(
    stage: Stage, variables: Variables, direction: Direction, p: Pass, hidden: Tensor, tangent: Tensor
) -> _Point:
    values, directions = {}, {}
    for name, value in variables.values(stage, hidden).items():
        found = direction(p, name, value)
        if found is not None:
            values[name], directions[name] = value.detach(), found
    return partial(variables.run, stage), (values, hidden), (directions, tangent)


def _pull(point: _Point, gradient: Tensor, tangent: Tensor, p: Pass, visit: Visit) -> tuple[Tensor, Tensor]:
    """Gradient at the stage's input and its tangent, from those at its output."""
    run, primals, directions = point

    def pull(values: dict[str, Tensor], hidden: Tensor, gradient: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        found: tuple[dict[str, Tensor], Tensor] = torch.func.vjp(run, values, hidden)[1](gradient)
        return found

    (_, before), (found, before_tangent) = _tangent(pull, (*primals, gradient), (*directions, tangent))
    for name, product in found.items():
        visit(p, name, directions[0][name], product.detach())
    return before.detach(), before_tangent.detach()


def _tangent(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """Value of a function and its derivative along the tangents."""
    found: Any = torch.func.jvp(function, primals, tangents)
    return found[0], found[1]
