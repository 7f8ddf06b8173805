"""How many rows a forward pass takes, and how much memory the limit leaves to hidden states beside it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hawqtool.checkpoint.index import CheckpointIndex, TensorInfo
from hawqtool.config import RunConfig
from hawqtool.data.mixing import scoring_rows
from hawqtool.formats import MAX_BITS
from hawqtool.model.discovery import Structure
from hawqtool.records import BlockSpec, LinearSpec
from hawqtool.rounding.spec import TOGETHER_ELEMENTS
from hawqtool.streaming.offload import Offload
from hawqtool.streaming.stream import BLOCKS_AHEAD
from hawqtool.values import parse_size

AUTO = "auto"
AUTO_SHARE = 0.9
"""Share of a GPU's memory that is used by default."""

CPU_BATCH_SIZE, CUDA_BATCH_SIZES = 16, (128, 64, 32)
"""Rows per forward pass by default: on a GPU the first that fits, or the last."""

IMPORTANCE_ROWS = {"cpu": 2, "cuda": 8}
"""Rows of a pass of token importance, at least; fixed per kind of device, because they change sums."""
_IMPORTANCE_TOKENS, _IMPORTANCE_SHARE = 1 << 30, 4
"""Numbers at the ends of a block's linears, all tokens of a pass together, below which a GPU waits for launches; and
into how many passes a batch is parted at least, so that one that was halved for want of memory halves these too."""

HOST_BYTES = 6 << 30
"""Most host memory for hidden states beside a GPU; with all else a run then stays below 12 GiB there."""

_SCORING_BATCH, _SCORING_SHARE = 8, 4
_FOUR_WIDTHS = (2, 3, 4, 8)
_FLOAT_BYTES = 4
_GIB = 1 << 30
_FACTOR_BYTES = 28
"""Per entry of a Gram matrix while it is factored: itself and three matrices in float64."""
_COLUMN_BYTES, _COLUMN_MATRICES = 8, 6
"""Per entry of a Gram matrix in the column loop, with its factor; float32 matrices per stacked weight."""
_FORWARD_WIDE, _FORWARD_NARROW = 3, 6
"""Tensors of a forward pass that live at a time: as wide as the widest layer, and as the hidden state."""
_ANNEALING_BYTES = 64
"""Per weight that is learned from its Gram matrix: three logits with mean and gradient, what makes them, the weight."""
_BACKWARD_COPIES = 2
"""A layer's inputs and outputs while scores are taken: values and gradients."""
_SAVED_COPIES, _LOGIT_BYTES = 4, 24
"""The same with all that a pass with gradients keeps, norms in float32 among it; per logit with its gradient."""


def memory_limit(config: RunConfig, device: torch.device) -> int | None:
    """Bytes that the run may use of the device; None where nothing limits it, as by default on a CPU."""
    if config.max_memory != AUTO:
        return parse_size(config.max_memory)
    if device.type != "cuda":
        return None
    return int(AUTO_SHARE * torch.cuda.get_device_properties(device).total_memory)


def half_of_memory() -> int:
    """Half the bytes of the host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def copies_ahead(config: RunConfig, device: torch.device) -> bool:
    """Whether blocks that are read ahead lie on the device, to which they are copied beside other work."""
    return device.type == "cuda" and config.max_memory == AUTO


@dataclass(frozen=True)
class Work:
    """What the memory beside the hidden states depends on.

    Args:
        config: The run's configuration.
        index: The checkpoint.
        structure: Its structure.
        device: Where the run computes.
        dtype: dtype of weights and activations.
        num_samples: Calibration rows.
        seq_len: Tokens of a row.
        sees_original: Whether rounding sees the original's inputs beside those that the rounded layers give.
    """

    config: RunConfig
    index: CheckpointIndex
    structure: Structure
    device: torch.device
    dtype: torch.dtype
    num_samples: int
    seq_len: int
    sees_original: bool = False

    def needed_bytes(self, batch_size: int) -> int:
        """Estimate of the memory that measuring and rounding take besides."""
        scoring = min(scoring_rows(self.num_samples, None, self.device.type), scoring_batch(self.device, batch_size))
        tokens = [min(batch_size, count) * self.seq_len for count in (self.num_samples, scoring)]
        formats = _most_formats(self.config)
        needed = workspace_bytes(self.index, self.structure, self.dtype, tokens[0], tokens[1], formats)
        if self.sees_original:
            single = tokens[0] if batch_size >= self.num_samples else 0
            needed += drift_bytes(self.structure, self.dtype, single)
        rotates = self.index.rotation is not None and self.device.type == "cuda"
        if rotates or copies_ahead(self.config, self.device):  # where blocks that are read ahead lie
            weights = max(sum(n.num_weights for n in spec.linears) for spec in self.structure.blocks)
            needed += BLOCKS_AHEAD * weights * torch.finfo(self.dtype).bits // 8
        if self.config.gram_steps:
            linears = (linear for spec in self.structure.blocks for linear in spec.linears)
            needed += _ANNEALING_BYTES * max((linear.num_weights for linear in linears), default=0)
        return needed


def choose_batch_size(work: Work) -> int:
    """Rows per forward pass where the configuration names none.

    One batch needs one forward pass per block, several need more than two. So a GPU takes as many as fit beside its
    block into its whole memory or --max-memory: what is free at the moment decides nothing, because the number of
    batches changes sums.
    """
    limit = memory_limit(work.config, work.device)
    if work.device.type != "cuda" or limit is None:
        return CPU_BATCH_SIZE
    return next((rows for rows in CUDA_BATCH_SIZES if work.needed_bytes(rows) <= limit), CUDA_BATCH_SIZES[-1])


def make_offload(work: Work, batch_size: int, warn: Callable[[str], None], folder: Path | None) -> Offload | None:
    """Where hidden states are kept; None where all of them stay on the device.

    Args:
        work: What has to be done.
        batch_size: Rows of a batch.
        warn: Takes a warning when the work alone may exceed the limit.
        folder: Existing folder for what memory does not hold; None for the system's temporary one.
    """
    limit = memory_limit(work.config, work.device)
    if limit is None:
        return None
    workspace = work.needed_bytes(batch_size)
    if workspace > limit:
        warn(
            f"one block's work may take {workspace / _GIB:.1f} GiB, more than the {limit / _GIB:.1f} GiB of "
            "--max-memory; lower --batch-size or --seq-len to stay below it"
        )
    host = min(HOST_BYTES, limit // 2) if work.device.type == "cuda" else 0
    return Offload(work.device, max(0, limit - workspace), host, folder or Path(tempfile.gettempdir()))


def importance_rows(work: Work, batch_size: int, of_text: bool) -> int:
    """Rows of a pass of token importance: on a GPU more of small models, whose launches take longer than their sums.

    It is a power of two that depends on shapes alone; memory has its say through the rows of a batch.

    Args:
        work: What has to be done.
        batch_size: Rows per forward pass.
        of_text: Whether rows are tokens alone; how many positions others have is not known here.
    """
    fewest = IMPORTANCE_ROWS[work.device.type]
    if work.device.type != "cuda" or not of_text:
        return min(fewest, batch_size)
    most = _IMPORTANCE_TOKENS // (work.seq_len * max(map(_ends, work.structure.blocks)))
    rows = max(fewest, min(most, batch_size // _IMPORTANCE_SHARE))
    return min(1 << (rows.bit_length() - 1), batch_size)


def scoring_batch(device: torch.device, batch_size: int) -> int:
    """Rows behind the scores in a pass, forwards and backwards: on a GPU a quarter of a batch, 8 at least.

    Gradients take more memory than a pass forwards, which is what a batch is chosen by.

    Args:
        device: Where the run computes.
        batch_size: Rows per forward pass.
    """
    return min(max(_SCORING_BATCH, batch_size // _SCORING_SHARE), batch_size) if device.type == "cuda" else batch_size


def _ends(spec: BlockSpec) -> int:
    """Numbers that the linears of a block take and give for a token."""
    return sum(linear.in_features + linear.out_features for linear in spec.linears)


def importance_offload(work: Work, batch_size: int, otherwise: Offload | None) -> Offload | None:
    """Where token importance keeps hidden states: on a GPU it leaves them more room than rounding does.

    Args:
        work: What has to be done.
        batch_size: Rows of its passes.
        otherwise: What keeps them while the model is rounded.
    """
    limit = memory_limit(work.config, work.device)
    if otherwise is None or limit is None or work.device.type != "cuda":
        return otherwise
    room = limit - importance_bytes(work.index, work.structure, work.dtype, batch_size * work.seq_len, work.seq_len)
    return otherwise.with_device_bytes(room) if room > otherwise.device_bytes else otherwise


def importance_bytes(
    index: CheckpointIndex, structure: Structure, dtype: torch.dtype, batch_tokens: int, positions: int
) -> int:
    """Estimate of the memory that token importance needs beside the hidden states between blocks.

    Args:
        index: The checkpoint.
        structure: Its structure.
        dtype: dtype of weights and activations.
        batch_tokens: Tokens of a pass.
        positions: Positions of a row, whose logits are held together.
    """
    size = torch.finfo(dtype).bits // 8
    classes = max((info.shape[0] for info in _outside(index, structure) if len(info.shape) == 2), default=0)

    def of_block(spec: BlockSpec) -> int:
        moments = 2 * _FLOAT_BYTES * sum(linear.out_features**2 for linear in spec.linears)
        weights = sum(linear.num_weights for linear in spec.linears)
        return weights * size + batch_tokens * _ends(spec) * size * _SAVED_COPIES + moments

    logits = positions * classes * _LOGIT_BYTES
    return _outside_weights(index, structure) * size + max(max(map(of_block, structure.blocks)), logits)


def workspace_bytes(
    index: CheckpointIndex,
    structure: Structure,
    dtype: torch.dtype,
    batch_tokens: int,
    scoring_tokens: int,
    formats: int,
) -> int:
    """Estimate of the memory that measuring and rounding need beside the hidden states between blocks.

    Args:
        index: The checkpoint.
        structure: Its structure.
        dtype: dtype of weights and activations.
        batch_tokens: Tokens of a batch of the calibration rows.
        scoring_tokens: Tokens of a batch of the scoring rows.
        formats: Formats that a layer is measured in.
    """
    size = torch.finfo(dtype).bits // 8
    return _outside_weights(index, structure) * size + max(
        _block_bytes(spec, size, batch_tokens, scoring_tokens, formats) for spec in structure.blocks
    )


def _most_formats(config: RunConfig) -> int:
    """Formats that a layer is measured in, at most; the widest has whole rows alone where groups are not given."""
    bits, sizes = config.given_widths or _FOUR_WIDTHS, len(config.group_sizes)
    if config.is_uniform:
        return 1
    if config.formats is not None:
        return sum(1 if label[2:] else sizes for label in config.formats)
    return sum(1 if config.chooses_groups and width == MAX_BITS else sizes for width in bits)


def drift_bytes(structure: Structure, dtype: torch.dtype, single_tokens: int) -> int:
    """What rounding holds besides to see the original's inputs.

    Args:
        structure: Of the model.
        dtype: dtype of weights and activations.
        single_tokens: Tokens of all rows where they are one batch, whose inputs are kept through a block; 0 where there
            are several, which need a copy of the block.
    """
    size = torch.finfo(dtype).bits // 8
    if single_tokens:
        widths = [sum(group[0].in_features for group in spec.input_groups) for spec in structure.blocks]
        return single_tokens * max(widths) * size
    return max(sum(linear.num_weights for linear in spec.linears) for spec in structure.blocks) * size


def _outside_weights(index: CheckpointIndex, structure: Structure) -> int:
    return sum(math.prod(info.shape) for info in _outside(index, structure))


def _outside(index: CheckpointIndex, structure: Structure) -> list[TensorInfo]:
    """What is loaded beside the blocks."""
    inside = tuple(f"{spec.name}." for spec in structure.blocks)
    stored = {stored: name for name, stored in structure.stored_names.items()}
    names = (stored.get(name, name) for name in index.tensors)
    loaded = zip(names, index.tensors.values(), strict=True)
    return [info for name, info in loaded if not name.startswith(inside) and name not in structure.unused]


def _block_bytes(spec: BlockSpec, size: int, batch_tokens: int, scoring_tokens: int, formats: int) -> int:
    linears: Sequence[LinearSpec] = spec.linears
    if not linears:
        return 0
    weights = sum(linear.num_weights for linear in linears)
    widest = max(linear.out_features for linear in linears)
    narrow = linears[0].in_features
    forward = batch_tokens * (_FORWARD_WIDE * widest + _FORWARD_NARROW * narrow) * size
    gram = _FLOAT_BYTES * max(linear.in_features for linear in linears) ** 2
    rounding = max(_rounding_bytes(group, formats) for group in spec.input_groups)
    errors = _FLOAT_BYTES * weights * formats
    backward = scoring_tokens * _ends(spec) * size * _BACKWARD_COPIES
    return weights * size + max(forward + gram, rounding + errors, backward + errors)


def _rounding_bytes(group: Sequence[LinearSpec], formats: int) -> int:
    columns = group[0].in_features
    rows = sum(linear.out_features for linear in group)
    stacked = min(rows * columns * formats, max(TOGETHER_ELEMENTS, max(m.num_weights for m in group)))
    loop = columns**2 * _COLUMN_BYTES + _COLUMN_MATRICES * _FLOAT_BYTES * stacked
    return max(columns**2 * _FACTOR_BYTES, loop)
