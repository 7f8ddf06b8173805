"""How an experts module of transformers holds its weights, read from its flags and proved on random data."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_WIDTHS = ("hidden_dim", "hidden_size", "input_dim")
_INNERS = ("intermediate_dim", "intermediate_size", "expert_dim")
_WEIGHTS = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}
_PROOF_WIDTH, _PROOF_INNER, _PROOF_TOKENS = 12, 10, 24
"""Sizes of the proof: widths that differ, so that a transposed matrix does not fit by chance."""
_TOLERANCE = 1e-9
_STEP, _CURVED = 0.05, 1e-7
"""Step of second differences in float64, and the size from which one is no rounding error."""

Combine = Callable[..., Tensor]
"""From the outputs of gate and up, or of up alone, ``[tokens, inner]``, to the input of down, ``[tokens, inner]``."""


@dataclass(frozen=True)
class ExpertsLayout:
    """How the weights of all experts of a layer lie in 3-D parameters.

    Args:
        count: Experts.
        width: Inputs of an expert.
        inner: Inputs of its last linear.
        gated: Whether a gate and an up projection share ``gate_up_proj``; else there is ``up_proj`` alone.
        transposed: Whether a weight is ``[in, out]``.
        concatenated: Whether all gates come before all ups; else they take turns.
        biased: Whether every linear has a bias.
        scaled: Whether the router scales the inputs, zero for experts that it did not choose, and the module gets
            them all, expert by expert, ``[experts * tokens, width]``; else it gets the choice and its weights.
    """

    count: int
    width: int
    inner: int
    gated: bool
    transposed: bool
    concatenated: bool
    biased: bool
    scaled: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the linears of an expert, in call order."""
        return ("gate_proj", "up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")

    def weight(self, parameters: dict[str, Tensor], number: int, role: str) -> Tensor:
        """The weight ``[out, in]`` of a linear of one expert: a view of the 3-D parameters, by name."""
        source = parameters[self.source(role)][number]
        return self._part(source.t() if self.transposed else source, role)

    def bias(self, parameters: dict[str, Tensor], number: int, role: str) -> Tensor | None:
        """The bias ``[out]`` of a linear of one expert, None where there is none."""
        return self._part(parameters[f"{self.source(role)}_bias"][number], role) if self.biased else None

    def source(self, role: str) -> str:
        """The parameter that holds the weights of a role."""
        return "gate_up_proj" if self.gated and role != "down_proj" else role

    def is_stored_transposed(self, shape: tuple[int, ...], source: str) -> bool:
        """Whether a stored tensor ``[experts, .., ..]`` of that parameter holds ``[in, out]`` matrices.

        Where its shape is that of the parameter, the matrices lie as the module has them (so transformers reads them).
        """
        rows, columns = self.inner * (2 if source == "gate_up_proj" else 1), self.width
        if source == "down_proj":
            rows, columns = self.width, self.inner
        own = (columns, rows) if self.transposed else (rows, columns)
        return self.transposed if tuple(shape[1:]) == own else not self.transposed

    def _part(self, rows: Tensor, role: str) -> Tensor:
        if not self.gated or role == "down_proj":
            return rows
        second = role == "up_proj"
        return rows.chunk(2)[second] if self.concatenated else rows[int(second) :: 2]


def holds_experts(module: nn.Module) -> bool:
    """Whether a module has 3-D parameters of its own, one matrix per expert."""
    stacked = {name for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    return "down_proj" in stacked or ("Expert" in type(module).__name__ and bool(stacked))


def takes_choice(module: nn.Module) -> bool:
    """Whether a module is called as transformers calls experts: with rows, the experts chosen for each, and weights.

    It gives rows of the same width, whatever its parameters are.
    """
    names = [*inspect.signature(type(module).forward).parameters][1:]
    return names == ["hidden_states", "top_k_index", "top_k_weights"]


def read_layout(module: Any) -> ExpertsLayout | None:
    """Layout of an experts module from its flags, or by shape where it has none; None where it is another kind."""
    own = {name: value for name, value in module._parameters.items() if value is not None}
    up = own.get("gate_up_proj", own.get("up_proj"))
    down = own.get("down_proj")
    children = {name for name, _ in module.named_children()} - {"act_fn"}
    if up is None or down is None or up.ndim != 3 or down.ndim != 3 or not own.keys() <= _WEIGHTS or children:
        return None
    gated = "gate_up_proj" in own
    if gated == ("up_proj" in own) or getattr(module, "has_post_expert_norm", False):
        return None
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        transposed = up.shape[1:] != ((1 + gated) * down.shape[2], down.shape[1])
    count, outputs, width = (up.shape[0], up.shape[2], up.shape[1]) if transposed else up.shape
    biased = any(name.endswith("_bias") for name in own)
    if biased and len(own) != 4:
        return None
    inner = outputs // (1 + gated)
    concatenated = bool(getattr(module, "is_concatenated", True))
    arguments = inspect.signature(module.forward).parameters.values()
    scaled = [argument.kind for argument in arguments] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return ExpertsLayout(int(count), int(width), int(inner), gated, bool(transposed), concatenated, biased, scaled)


@dataclass(frozen=True)
class OwnGate:
    """The class's own function between an expert's linears, such as one that clamps.

    Args:
        owner: The experts module, without its weights.
        concatenated: As in `ExpertsLayout`.
    """

    owner: Any
    concatenated: bool

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Input of the last linear from outputs of the first two."""
        joined = torch.cat([gate, up], -1) if self.concatenated else torch.stack([gate, up], -1).flatten(-2)
        combined: Tensor = self.owner._apply_gate(joined)
        return combined


@dataclass(frozen=True)
class PlainGate:
    """``act(gate) * up``, or ``act(up)`` where there is no gate.

    Args:
        act: The activation.
    """

    act: Callable[[Tensor], Tensor]

    def __call__(self, first: Tensor, up: Tensor | None = None) -> Tensor:
        """Input of the last linear from outputs of the first ones."""
        return self.act(first) if up is None else self.act(first) * up


def combine_function(module: Any, layout: ExpertsLayout) -> Combine:
    """What an experts module computes between the linears of an expert; AttributeError where it does not say."""
    own = getattr(type(module), "_apply_gate", None)
    if not layout.gated or own is None or own.__name__ == "_default_apply_gate":
        return PlainGate(module.act_fn)
    bare = copy.copy(module)
    bare._parameters = {}
    return OwnGate(bare, layout.concatenated)


def why_unproved(module: Any, layout: ExpertsLayout) -> str | None:
    """Prove that the split linears compute what the module does, and that gate and up are not exchanged.

    A copy of the module with small random weights in float64 runs beside the split form. With the class's own gate
    function a wrong order of gate and up rows would cancel, so the roles are looked at by themselves: the product is
    affine in up, curved in gate.

    Returns:
        What does not hold; None where all does.
    """
    generator = torch.Generator().manual_seed(0)
    small, parameters = _small(module, layout, generator)
    try:
        combine = combine_function(small, layout)
        hidden = torch.randn(_PROOF_TOKENS, _PROOF_WIDTH, dtype=torch.float64, generator=generator)
        order = torch.rand(_PROOF_TOKENS, layout.count, generator=generator).argsort(1)
        chosen = order[:, : min(2, layout.count)]
        weights = torch.rand(chosen.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            call = _scaled_call(layout, (hidden, chosen, weights)) if layout.scaled else (hidden, chosen, weights)
            expected = small(*call)
            found = _split_output(parameters, layout, combine, call)
            if expected.shape != found.shape or not torch.allclose(expected, found, rtol=_TOLERANCE, atol=_TOLERANCE):
                return "its own forward computes something else than split experts would"
            if layout.gated and not _roles_hold(combine):
                return "gate and up projections cannot be told apart"
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        return (
            f"its own forward cannot be compared: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
    return None


def _small(module: Any, layout: ExpertsLayout, generator: torch.Generator) -> tuple[Any, dict[str, Tensor]]:
    """A copy of the module with small random float64 weights, and these by name."""
    small = copy.copy(module)
    for names, size in ((_WIDTHS, _PROOF_WIDTH), (_INNERS, _PROOF_INNER)):
        for name in names:
            if name in small.__dict__:
                small.__dict__[name] = size
    if getattr(module, "config", None) is not None:
        small.config = copy.deepcopy(module.config)
        small.config._experts_implementation = "eager"
    outputs = {"gate_up_proj": 2 * _PROOF_INNER, "up_proj": _PROOF_INNER, "down_proj": _PROOF_WIDTH}
    parameters: dict[str, Tensor] = {}
    for name in module._parameters:
        rows = outputs[name.removesuffix("_bias")]
        columns = _PROOF_INNER if name.startswith("down") else _PROOF_WIDTH
        shape = (rows,) if name.endswith("_bias") else (columns, rows) if layout.transposed else (rows, columns)
        parameters[name] = 0.3 * torch.randn(layout.count, *shape, dtype=torch.float64, generator=generator)
    small._parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
    return small, parameters


def _scaled_call(layout: ExpertsLayout, call: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor]:
    """Inputs ``[experts * tokens, width]`` that a router has scaled."""
    hidden, chosen, weights = call
    scores = torch.zeros(layout.count, len(hidden), dtype=hidden.dtype).scatter_(0, chosen.t(), weights.t())
    return ((scores[:, :, None] * hidden).flatten(0, 1),)


def _split_output(
    parameters: dict[str, Tensor], layout: ExpertsLayout, combine: Combine, call: tuple[Tensor, ...]
) -> Tensor:
    def expert(number: int, states: Tensor) -> Tensor:
        def linear(role: str, states: Tensor) -> Tensor:
            weight, bias = layout.weight(parameters, number, role), layout.bias(parameters, number, role)
            return nn.functional.linear(states, weight, bias)

        return linear("down_proj", combine(*(linear(role, states) for role in layout.roles[:-1])))

    if layout.scaled:
        total = torch.zeros_like(call[0])
        for number, (states, output) in enumerate(
            zip(call[0].chunk(layout.count), total.chunk(layout.count), strict=True)
        ):
            chosen = states.any(1)
            output[chosen] = expert(number, states[chosen])
        return total
    hidden, chosen, weights = call
    total = torch.zeros_like(hidden)
    for number in range(layout.count):
        slots, positions = torch.where(chosen.t() == number)
        total.index_add_(0, positions, expert(number, hidden[positions]) * weights[positions, slots, None])
    return total


def _roles_hold(combine: Combine) -> bool:
    """Whether output i depends on gate i and up i alone, curved in the gate and affine in the up, by differences."""
    size = _PROOF_INNER
    curved = torch.zeros(size, dtype=torch.bool)
    moves = _STEP * torch.eye(size, dtype=torch.float64)
    other = ~torch.eye(size, dtype=torch.bool)
    for point in (-0.4, 0.0, 0.3, 0.7):
        gate = torch.full((size, size), point, dtype=torch.float64)
        up = torch.linspace(0.1, 0.4, size, dtype=torch.float64).repeat(size, 1)
        base = combine(gate, up)
        by_gate = combine(gate + moves, up) - base, combine(gate - moves, up) - base
        by_up = combine(gate, up + moves) - base, combine(gate, up - moves) - base
        if any(change[other].abs().max() > _CURVED for change in (*by_gate, *by_up)):
            return False
        if (by_up[0] + by_up[1]).abs().max() > _CURVED:
            return False
        curved |= (by_gate[0] + by_gate[1]).diagonal().abs() > _CURVED
    return bool(curved.all())
