"""A written GGUF file as a source of the checkpoint's weights, by our own dequantization in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hawqtool.checkpoint.gguf.block_codec import dequantize_blocks
from hawqtool.checkpoint.gguf.block_types import BlockType
from hawqtool.checkpoint.gguf.header import GgufTensor, read_gguf
from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.errors import InputLostError
from hawqtool.pipeline.gguf.record import Place


class GgufSource:
    """`TensorReader` of a checkpoint whose quantized matrices come from a GGUF file.

    Args:
        path: The file.
        places: Which tensor holds which matrix, by the name of the checkpoint's tensor.
        index: The checkpoint, which gives all else.
    """

    def __init__(self, path: Path, places: Mapping[str, Place], index: CheckpointIndex) -> None:
        self._header, self._places = read_gguf(path), places
        self._reader = TensorReader(index)

    def __contains__(self, name: object) -> bool:
        return name in self._reader

    def tensor(self, name: str) -> Tensor:
        """Tensor on the CPU as the checkpoint has it; float32 where it is quantized.

        Raises:
            InputLostError: If the file cannot be read.
        """
        place = self._places.get(name)
        if place is None:
            return self._reader.tensor(name)
        tensor = self._header.tensors[place.tensor]
        stored = self._rows(tensor, place.first_row)
        assert isinstance(tensor.kind, BlockType)  # places are those of what was quantized
        values = dequantize_blocks(stored, tensor.kind)
        if place.piece.rows is not None:
            values = torch.empty_like(values).index_copy_(0, place.piece.rows, values)
        return values.t().contiguous() if place.transposed else values

    def _rows(self, tensor: GgufTensor, first: int) -> Tensor:
        rows = tensor.shape[-2]
        width = tensor.num_bytes // math.prod(tensor.shape[:-1])
        try:
            with self._header.path.open("rb") as stream:
                stream.seek(tensor.start + first * width)
                data = bytearray(stream.read(rows * width))
        except OSError as error:
            raise InputLostError(f"{self._header.path} cannot be read ({error.strerror}); check the disk") from None
        if len(data) != rows * width:
            raise InputLostError(f"{self._header.path} ended inside tensor {tensor.name}; write it again")
        return torch.frombuffer(data, dtype=torch.uint8).view(rows, width)
