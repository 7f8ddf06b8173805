"""What the linears of a block see in one reverse step: their inputs and the gradients at their outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hawqtool.formats.activations import ActivationFormat
from hawqtool.model.block import BlockCall, LoadedBlock
from hawqtool.model.experts import ExpertLinear
from hawqtool.records import BlockSpec, LinearSpec
from hawqtool.rounding.floats.activations import fake_quantize
from hawqtool.rounding.floats.scale_search import divisor_of_peak
from hawqtool.runtime.stage_timer import Recorder
from hawqtool.sensitivity.scores import LayerRows
from hawqtool.streaming.block import Activations


def block_backward(
    block: LoadedBlock,
    scoring: Activations,
    gradients: list[Tensor],
    outputs: int,
    input_power: dict[str, Tensor],
    input_errors: InputErrors | None = None,
) -> tuple[dict[str, LayerRows], list[Tensor]]:
    """What every linear saw with the gradients at its output, and the gradient at the block's input.

    ``input_power`` gains each unit's squared gradients at its inputs, summed over the tokens of a row, ``[rows]``;
    ``input_errors`` what rounding these inputs costs.
    """
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {linear.name: ([], []) for linear in block.spec.linears}
    powers: dict[str, list[Tensor]] = {linear.unit: [] for linear in block.spec.linears}
    before, reverse = [], _Reverse(block, scoring.recorder, with_experts=True)
    for position, hidden in enumerate(scoring.hidden):
        rows, positions = hidden.shape[:2]
        captured, found = reverse.run(hidden, scoring.calls[position][block.spec.index], gradients[position])
        before.append(found.pop(0))
        by_row = _ByRow((call.module for call in captured.calls.values()), rows, positions)
        for name, call in captured.calls.items():
            for into, values in zip(seen[name], (call.x.detach(), found.pop(0)), strict=True):
                into += by_row.split(call.module, values)
        for name in seen.keys() - captured.calls.keys():  # an expert that no token of the batch was routed to
            weight = block.parameter(_linear(block.spec, name))
            for into, width in zip(seen[name], reversed(weight.shape), strict=True):
                into += [weight.new_zeros(0, width)] * rows
        totals = {unit: torch.zeros(rows, dtype=torch.float64) for unit in powers}
        of_experts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for shared, gradient in zip(captured.inputs, found, strict=True):
            if isinstance(shared.module, ExpertLinear):
                squares = _squared_norms(gradient)
                of_experts.setdefault(shared.unit, []).append((squares, by_row.rows_of(shared.module)))
            else:
                parts = by_row.split(shared.module, gradient)
                totals[shared.unit] += torch.stack([_squared_norms(g).sum() for g in parts]).cpu()
            if input_errors is not None:
                input_errors.add(shared, gradient, position, by_row)
        for unit, experts in of_experts.items():
            totals[unit] += _sums_by_row(experts, rows).cpu()
        for unit, total in totals.items():
            powers[unit].append(total)
    for unit, parts in powers.items():
        power = torch.cat(parts)
        input_power[unit] = input_power[unit] + power if unit in input_power else power
    positions = scoring.hidden[0].shape[1]
    return {n: LayerRows(zip(x, g, strict=True), positions, outputs) for n, (x, g) in seen.items()}, before


@dataclass(frozen=True)
class InputErrors:
    """What rounding the inputs of units costs, Σ_t (J_t · dx_t)² of each row.

    J is the gradient at a unit's input x, through its linears alone, dx what rounding adds to x. To second order the
    loss grows by half of it, per output: errors of different tokens are uncorrelated, so that, other than for weights,
    no product of a token's change with another's is left (HAWQ-V2, Dong et al. 2020, section 3.3, takes the trace of
    the curvature and the mean square of dx apart). Divisors of scales are those of the batch itself: calibration finds
    others later, at most a power of two apart, which matter to the smallest groups alone.

    Args:
        formats: How the inputs of a unit may be rounded, by unit.
        found: By unit and format, a tensor ``[rows]`` float64 a batch; written.
    """

    formats: Mapping[str, Sequence[ActivationFormat]]
    found: dict[str, dict[ActivationFormat, list[Tensor]]]

    def add(self, shared: _SharedInput, gradient: Tensor, batch: int, by_row: _ByRow) -> None:
        """Add an input with its gradient in a batch."""
        for activations in self.formats.get(shared.unit, ()):
            x = shared.x.detach()
            divisor = divisor_of_peak(float(x.abs().max())) if activations.has_divisor and x.numel() else None
            error = fake_quantize(x, replace(activations, divisor=divisor)) - x
            moves = (gradient * error).sum(-1, keepdim=True, dtype=_at_least_float32(gradient))
            rows = torch.stack([m.double().square().sum() for m in by_row.split(shared.module, moves)]).cpu()
            parts = self.found.setdefault(shared.unit, {}).setdefault(activations, [])
            if len(parts) > batch:
                parts[batch] = parts[batch] + rows
            else:
                parts.append(rows)


GradientVisitor = Callable[[str, Tensor, Tensor, int], None]
"""Takes a linear, gradients ``[rows, positions, out]`` at its output, their norms, and the number of the first row."""


def token_powers(
    block: LoadedBlock, seen: Activations, gradients: Sequence[Tensor], visit: GradientVisitor = lambda *_: None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """‖g‖² of every token at the outputs of a block's linears, and the gradient at the block's input.

    Args:
        block: The loaded block.
        seen: Hidden states before the block, in any dtype.
        gradients: Gradient at the block's output, per batch.
        visit: Sees the gradients at the outputs of the linears too.

    Returns:
        ``[rows, positions]`` float32 by the name of the linear. Experts are left out.
    """
    powers: dict[str, list[Tensor]] = {}
    before, reverse, first = [], _Reverse(block, seen.recorder, with_experts=False), 0
    for position, hidden in enumerate(seen.hidden):
        rows, states = len(hidden), hidden.to(gradients[position].dtype)
        captured, found = reverse.run(states, seen.calls[position][block.spec.index], gradients[position])
        before.append(found.pop(0))
        for name, gradient in zip(captured.calls, found, strict=True):
            norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=_at_least_float32(gradient))
            powers.setdefault(name, []).append(norms.square().reshape(rows, -1))
            visit(name, gradient.reshape(rows, -1, gradient.shape[-1]), norms.reshape(rows, -1), first)
        first += rows
    return {name: torch.cat(parts) for name, parts in powers.items()}, before


class _Call(NamedTuple):
    """A linear's call."""

    module: nn.Module
    x: Tensor
    output: Tensor


class _SharedInput(NamedTuple):
    """An input under a name of its own for the linears of one unit, so that it has a gradient through them alone."""

    unit: str
    module: nn.Module
    x: Tensor
    alias: Tensor


@dataclass
class _Captured:
    """Calls of a block's linears by name, and their inputs in call order."""

    calls: dict[str, _Call]
    inputs: list[_SharedInput]


class _Reverse:
    """Differentiates a block, batch by batch.

    The last-linear shortcut leaves out the product of its last linear where the block only adds that to something.

    Args:
        block: The loaded block.
        recorder: Takes note of the passes.
        with_experts: Whether experts are watched too, and inputs beside outputs; else the outputs of the other linears.
    """

    def __init__(self, block: LoadedBlock, recorder: Recorder, with_experts: bool) -> None:
        self.block, self.recorder, self.with_experts = block, recorder, with_experts
        self.last = last_linear(block)

    def run(self, hidden: Tensor, call: BlockCall, gradient: Tensor) -> tuple[_Captured, list[Tensor]]:
        """The calls of a batch, and the gradients at its hidden states, at the outputs of the calls and at inputs.

        Args:
            hidden: Hidden states before the block.
            call: Its other arguments.
            gradient: Gradient at its output.
        """
        if self.last is not None:
            with without_product(self.last):
                captured, found = self._run(hidden, call, gradient)
            ours = {id(call.output) for call in captured.calls.values() if call.module is self.last}
            watched = zip(self._watched(captured), found[1:], strict=True)
            if all(adds_up(gradient, at_linear) for tensor, at_linear in watched if id(tensor) in ours):
                return captured, found
            self.last = None
        return self._run(hidden, call, gradient)

    def _watched(self, captured: _Captured) -> list[Tensor]:
        inputs = captured.inputs if self.with_experts else ()
        return [*(call.output for call in captured.calls.values()), *(shared.alias for shared in inputs)]

    def _run(self, hidden: Tensor, call: BlockCall, gradient: Tensor) -> tuple[_Captured, list[Tensor]]:
        linears = [
            linear
            for linear in self.block.spec.linears
            if self.with_experts or not isinstance(self.block.linear(linear), ExpertLinear)
        ]
        leaf = hidden.detach().requires_grad_()
        with self.recorder.stage("backward"), torch.enable_grad(), _captured(self.block, linears) as captured:
            output = self.block.run(leaf, call)
            return captured, _gradients(output, [leaf, *self._watched(captured)], gradient)


def _gradients(output: Tensor, tensors: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Gradients at tensors; zeros where the output does not depend on one, or only through a choice."""
    reached = [tensor for tensor in tensors if tensor.requires_grad]
    found = iter(torch.autograd.grad(output, reached, gradient, materialize_grads=True))
    return [next(found) if tensor.requires_grad else torch.zeros_like(tensor) for tensor in tensors]


@contextmanager
def _captured(block: LoadedBlock, linears: Sequence[LinearSpec]) -> Iterator[_Captured]:
    """Note what linears of a block are called with while the context lasts."""
    captured = _Captured({}, [])

    def share(module: nn.Module, inputs: tuple[Tensor, ...], unit: str) -> tuple[Tensor, ...]:
        x = inputs[0]
        known = next((i for i in captured.inputs if i.unit == unit and i.x is x), None)
        if known is None:
            known = _SharedInput(unit, module, x, x.view_as(x))
            captured.inputs.append(known)
        return known.alias, *inputs[1:]

    def capture(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        captured.calls[name] = _Call(module, inputs[0], output)

    hooks = []
    for linear in linears:
        module = block.linear(linear)
        hooks.append(module.register_forward_pre_hook(partial(share, unit=linear.unit)))
        hooks.append(module.register_forward_hook(partial(capture, name=linear.name)))
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def _at_least_float32(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _linear(spec: BlockSpec, name: str) -> LinearSpec:
    return next(linear for linear in spec.linears if linear.name == name)


def _squared_norms(gradient: Tensor) -> Tensor:
    """‖g‖² of every token of ``[..., n]``, flattened, float64."""
    return (
        torch.linalg.vector_norm(gradient.flatten(0, -2), dim=-1, dtype=_at_least_float32(gradient)).double().square()
    )


def _sums_by_row(values: Sequence[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """Sums ``[rows]`` float64 of values ``[tokens]``, each with the rows that its tokens are of."""
    joined, row = torch.cat([value for value, _ in values]), torch.cat([of_tokens for _, of_tokens in values])
    return torch.stack([torch.where(row == number, joined, 0.0).sum() for number in range(rows)])


class _ByRow:
    """Splits what the linears of a block see in a batch by row.

    The tokens of all experts are sorted together: to ask for each one's order and counts would have a GPU wait for
    the answer hundreds of times.

    Args:
        modules: The linears.
        rows: Rows of the batch.
        positions: Positions of a row.
    """

    def __init__(self, modules: Iterable[nn.Module], rows: int, positions: int) -> None:
        self._rows = rows
        self._experts: dict[int, tuple[Tensor, Tensor, list[int]]] = {}
        routed = {id(module.positions): module.positions for module in modules if isinstance(module, ExpertLinear)}
        if not routed:
            return
        sizes = [len(tokens) for tokens in routed.values()]
        row, device = torch.cat(list(routed.values())) // positions, next(iter(routed.values())).device
        starts = torch.tensor(list(itertools.accumulate([0, *sizes[:-1]])), device=device)
        counts = torch.tensor(sizes, device=device)
        expert = torch.arange(len(sizes), device=device).repeat_interleave(counts, output_size=len(row))
        # Tokens come by rank of the choice; sorted by row, those of one row lie together.
        keys, order = (expert * rows + row).sort(stable=True)
        local = order - starts.repeat_interleave(counts, output_size=len(row))
        borders = torch.searchsorted(keys, torch.arange(len(sizes) * rows + 1, device=device)).tolist()
        parts = [last - first for first, last in itertools.pairwise(borders)]
        per_expert = zip(routed, row.split(sizes), local.split(sizes), strict=True)
        for number, (key, rows_of, places) in enumerate(per_expert):
            self._experts[key] = rows_of, places, parts[number * rows : (number + 1) * rows]

    def split(self, module: nn.Module, values: Tensor) -> list[Tensor]:
        """Parts ``[tokens, n]`` of ``[rows, ..., n]``, its flattened form, or the tokens routed to an expert."""
        flat = values.flatten(0, -2)
        if not isinstance(module, ExpertLinear):
            return list(flat.reshape(self._rows, -1, flat.shape[-1]))
        _, places, sizes = self._experts[id(module.positions)]
        return list(flat[places].split(sizes))

    def rows_of(self, module: ExpertLinear) -> Tensor:
        """Row of each token routed to an expert."""
        return self._experts[id(module.positions)][0]


class _NoProduct(torch.autograd.Function):
    """Zeros in the place of x Wᵀ, with its gradient at x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None


def last_linear(block: LoadedBlock) -> nn.Linear | None:
    """The linear that a block calls last, if it is a plain one and alone with its input."""
    if not block.spec.input_groups:  # all its linears are kept
        return None
    group = block.spec.input_groups[-1]
    module = block.linear(group[0])
    return module if len(group) == 1 and type(module) is nn.Linear else None


@contextmanager
def without_product(linear: nn.Linear) -> Iterator[None]:
    """While the context lasts, the linear gives zeros, whose gradient arrives at its input as that of its output would.

    All other gradients are right only if what comes behind adds its output to something: see `adds_up`.
    """
    linear.forward = lambda x: _NoProduct.apply(x, linear.weight)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del linear.forward


def adds_up(at_output: Tensor, at_linear: Tensor) -> bool:
    """Whether the gradient at a linear's output is that at the block's: then the block adds the one to the other.

    A norm behind the linear, or a factor, would have changed it. Where it is zero, so are all others.
    """
    return at_output.numel() == at_linear.numel() and torch.equal(at_output, at_linear.reshape(at_output.shape))
