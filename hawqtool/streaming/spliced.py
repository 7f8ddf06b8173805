"""A quantized model put together of roundings that lie ready: any unit takes any of its formats, nothing is rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqtool.checkpoint.packing import pack_codes, unpack_codes
from hawqtool.formats import QuantFormat
from hawqtool.model.block import LoadedBlock
from hawqtool.records import LayerMetrics, LinearSpec, RoundedLayer, UnitFormats
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.streaming.block import Activations, advance
from hawqtool.streaming.offload import Offload, Offloaded
from hawqtool.streaming.stream import ModelStream

_ALIGNMENT = 16
"""Bytes to whose multiples every tensor in a block's memory is padded, so that it can be seen in its own dtype."""


@dataclass(frozen=True)
class _Part:
    """Where a tensor lies in a block's memory."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, memory: Tensor) -> Tensor:
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return memory[self.start : self.start + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class _Packed:
    """A rounded layer whose codes are packed."""

    quant_format: QuantFormat
    columns: int
    metrics: LayerMetrics
    codes: _Part
    scales: _Part
    zeros: _Part | None


@dataclass(frozen=True)
class BlockRoundings:
    """The roundings of a block's linears, on the device.

    Args:
        memory: Bytes of all of them.
        layers: By linear and format label.
    """

    memory: Tensor
    layers: Mapping[tuple[str, str], _Packed]

    def __contains__(self, key: object) -> bool:
        return key in self.layers

    def layer(self, name: str, label: str) -> RoundedLayer:
        """Codes, scales, zero points and metrics of a linear in a format."""
        packed = self.layers[name, label]
        codes = unpack_codes(packed.codes.of(self.memory), packed.quant_format.bits, packed.columns)
        zeros = None if packed.zeros is None else packed.zeros.of(self.memory)
        return RoundedLayer(name, packed.quant_format, codes, packed.scales.of(self.memory), packed.metrics, zeros)

    def weight(self, name: str, label: str) -> Tensor:
        """``[out, in]`` in the dtype of the scales."""
        layer = self.layer(name, label)
        return dequantize(*Quantized(layer.codes, layer.scales, layer.zeros))


class RoundingStore:
    """Roundings of a model's linears in several formats, a block in one piece: on the device, or where there is room.

    Args:
        offload: Finds room; None where all stays on the device.
    """

    def __init__(self, offload: Offload | None) -> None:
        self._offload = offload
        self._blocks: dict[int, tuple[Tensor | Offloaded, dict[tuple[str, str], _Packed]]] = {}

    def put(self, index: int, layers: Sequence[RoundedLayer]) -> None:
        """Keep the layers of a block, none of them twice in one format."""
        pieces, start = list[Tensor](), 0

        def place(tensor: Tensor) -> _Part:
            nonlocal start
            part, flat = _Part(start, tuple(tensor.shape), tensor.dtype), tensor.contiguous().view(-1).view(torch.uint8)
            pieces.extend([flat, flat.new_zeros(-len(flat) % _ALIGNMENT)])
            start += sum(map(len, pieces[-2:]))
            return part

        found = {
            (layer.name, layer.quant_format.label): _Packed(
                layer.quant_format,
                layer.codes.shape[1],
                layer.metrics,
                place(pack_codes(layer.codes, layer.quant_format.bits)),
                place(layer.scales),
                None if layer.zeros is None else place(layer.zeros),
            )
            for layer in layers
        }
        memory = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
        self._blocks[index] = memory if self._offload is None else self._offload.store(memory), found

    def block(self, index: int) -> BlockRoundings:
        """The roundings of a block.

        Raises:
            ResourceError: If they lie on a disk that does not give them back.
        """
        memory, found = self._blocks[index]
        return BlockRoundings(memory if isinstance(memory, Tensor) else memory.load(), found)


@dataclass(frozen=True)
class SplicedModel:
    """A model whose units have the roundings of a store.

    Args:
        stream: Gives all that no unit takes, and the weights of units of which the store has nothing.
        store: Roundings of every linear in its unit's formats.
        formats: The format that each unit takes.
    """

    stream: ModelStream
    store: RoundingStore
    formats: UnitFormats

    @contextmanager
    def block(self, index: int) -> Iterator[tuple[LoadedBlock, BlockRoundings]]:
        """A block with its units' roundings in place, and all that the store has of it."""
        with self.stream.block(index) as block:
            roundings = self.store.block(index)
            for linear in block.spec.linears:
                label = self.label(linear)
                if (linear.name, label) in roundings:
                    block.set_weight(linear, roundings.weight(linear.name, label))
            yield block, roundings

    def label(self, linear: LinearSpec) -> str:
        """Label of the format that a linear's unit takes; empty where it is not quantized."""
        chosen = self.formats.get(linear.unit)
        return "" if chosen is None else chosen.label

    def final_hidden(self, rows: Tensor, batch_size: int) -> Tensor:
        """Output of the last block for all rows, ``[rows, positions, width]``."""
        seen: Activations = self.stream.embed(rows, batch_size)
        for spec in self.stream.structure.blocks:
            with self.block(spec.index) as (block, _):
                advance(block, seen)
        return torch.cat(list(seen.hidden))
