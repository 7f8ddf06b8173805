"""A block, or the output head, with its weights in memory: how they are read, replaced and run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hawqtool.model.carried.walk import CarriedCall
from hawqtool.model.replay import Call
from hawqtool.records import BlockSpec, LinearSpec

BlockCall = Call | CarriedCall
"""What a block is called with beside the hidden state, or on what is carried."""


@dataclass(frozen=True)
class LoadedBlock:
    """A block with its weights in memory; the output head is the whole model, of which only the head's linear counts.

    Args:
        module: The loaded block, or the model.
        spec: Its linears.
    """

    module: nn.Module
    spec: BlockSpec

    def local_name(self, linear: LinearSpec) -> str:
        """Name of a linear inside the module."""
        return linear.module_name.removeprefix(f"{self.spec.name}.")

    def linear(self, linear: LinearSpec) -> nn.Module:
        """The module of a linear."""
        return self.module.get_submodule(self.local_name(linear))

    def parameter(self, linear: LinearSpec) -> nn.Parameter:
        """The weight of a linear as the module holds it, ``[in, out]`` where it is transposed."""
        return self.module.get_parameter(f"{self.local_name(linear)}.weight")

    def weight(self, linear: LinearSpec) -> Tensor:
        """Weight of a linear, ``[out, in]`` float32; the module's own memory where that has this form."""
        weight = self.parameter(linear).float()
        return weight.t().contiguous() if linear.transposed else weight

    def set_weight(self, linear: LinearSpec, weight: Tensor) -> None:
        """Put a weight ``[out, in]`` in the place of the loaded one."""
        with torch.no_grad():
            self.parameter(linear).copy_(weight.t() if linear.transposed else weight)

    def run(self, hidden: Tensor, call: BlockCall) -> Tensor:
        """Output ``[rows, positions, width]`` from such a hidden state and the other arguments of the call.

        Where more than a hidden state is carried, both hold all of it: see `hawqtool.model.carried.layout.Layout`.
        """
        if isinstance(call, CarriedCall):
            return call.run(self.module, hidden)
        output = self.module(hidden, *call[0], **call[1])
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other weights while the context lasts; gradients and tangents flow through them.

        The loaded ones stay in memory, and are back afterwards.

        Args:
            weights: By name of a linear, ``[out, in]``, or by name of a parameter inside the module, as that lies.
        """
        linears, loaded = {linear.name: linear for linear in self.spec.linears}, []
        try:
            for name, weight in weights.items():
                linear = linears.get(name)
                path = name if linear is None else f"{self.local_name(linear)}.weight"
                place, _, leaf = path.rpartition(".")
                owner = self.module.get_submodule(place)
                loaded.append((owner, leaf, owner._parameters[leaf]))
                # Set like this, a plain tensor may stand where a parameter did, and it keeps its history.
                value = weight.t() if linear is not None and linear.transposed else weight
                owner._parameters[leaf] = value  # type: ignore[assignment]
            yield
        finally:
            for owner, leaf, parameter in reversed(loaded):
                owner._parameters[leaf] = parameter

    def shifted(self, errors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W + D for the linears of this block that are named, in the dtype and the layout of W.

        Args:
            errors: D by name of the linear, ``[out, in]`` float32.
        """
        found = {}
        for linear in self.spec.linears:
            if linear.name in errors:
                weight, error = self.parameter(linear), errors[linear.name]
                total = (weight.float() + (error.t() if linear.transposed else error)).to(weight.dtype)
                found[linear.name] = total.t() if linear.transposed else total
        return found

    def copy(self) -> LoadedBlock:
        """A copy whose weights stay as they are now."""
        return LoadedBlock(copy.deepcopy(self.module), self.spec)
