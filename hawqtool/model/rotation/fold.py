"""A checkpoint whose residual stream is rotated: norm gains in the linears behind, both sides of the stream turned."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hawqtool.checkpoint.index import CheckpointIndex, TensorInfo
from hawqtool.checkpoint.rotated.codec import RotatedInfo, rotated
from hawqtool.checkpoint.rotated.hadamard import MAX_ODD, Rotation
from hawqtool.errors import one_line
from hawqtool.model.block_list import TRACE_ERRORS, example_row, find_blocks
from hawqtool.model.replay import replayed_blocks
from hawqtool.model.rotation.residual_trace import NotRotatableError, ResidualTrace, StreamUses, is_gained_norm
from hawqtool.model.skeleton import build_skeleton
from hawqtool.model.stored_names import stored_names
from hawqtool.model.tasks import feeds_decoder, model_task
from hawqtool.model.trace import NotPlain, block_calls, extra_outputs_of, on_meta

_NORM_TOLERANCE = 1e-4
"""Relative difference to the root mean square norm in float32, the small constant under its root included."""


def rotated_source(folder: Path, index: CheckpointIndex, seed: int) -> CheckpointIndex:
    """`rotate_checkpoint` of a folder whose model is built for it.

    Args:
        folder: Holds ``config.json``.
        index: The checkpoint, experts one by one.
        seed: Of the rotation.
    """
    # Which experts are one by one depends on the profile, but all that the index has so must be.
    models = [build_skeleton(folder, torch.float32, False, index.tensors, vllm) for vllm in (False, True)]
    return rotate_checkpoint(min(models, key=lambda model: len(_unread(model, index))), index, seed)


def rotate_checkpoint(model: Any, index: CheckpointIndex, seed: int) -> CheckpointIndex:
    """The index with all tensors on the residual stream rotated as they are read, and a tied head apart.

    With row vectors ``x' = x Q``: a reader becomes ``W diag(gain) Q`` and the gain 1 (0 where the model adds 1), a
    writer ``Q^T W`` with bias ``Q^T b``, rows of the embedding ``e Q`` (SliceGPT, 2401.15024, section 3.1; QuaRot,
    2404.00456).

    Args:
        model: Skeleton, its experts split; unchanged.
        index: The checkpoint.
        seed: Of the random signs.

    Raises:
        NotRotatableError: If the architecture does not allow it; says where and why.
    """
    model = copy.deepcopy(model)
    if feeds_decoder(model) or not (model_task(model).generates and model.get_output_embeddings() is not None):
        raise NotRotatableError(f"{type(model).__name__} is no causal language model with an output head")
    stored = stored_names(model, index.tensors)
    if unread := _unread(model, index):
        raise NotRotatableError(
            f"{unread[0]} is stored and not part of the model, so whether it reads the stream is unknown"
        )
    offsets = _gain_offsets(model)
    uses = trace_stream(model)
    tied = _tied_head(model, uses)
    infos = {name: index.tensors[stored.get(name, name)] for name in _names(uses)}
    size = infos[min(uses.embeddings)].shape[-1]
    rotation = Rotation(size, seed)
    if rotation.odd > MAX_ODD:
        raise NotRotatableError(f"its width {size} has the odd factor {rotation.odd}; expected at most {MAX_ODD}")
    missing = sorted({gain for gain in uses.readers.values() if gain is not None} - offsets.keys())
    if missing:
        raise NotRotatableError(f"{missing[0]} is of no root mean square norm")
    tensors = _turned(uses, infos, rotation, offsets)
    if tied is not None:
        table = min(uses.embeddings & uses.readers.keys())
        gain = uses.readers[table]
        head = replace(rotated(infos[table], tied), last=rotation)
        tensors[tied] = head if gain is None else replace(head, gain=infos[gain], offset=offsets[gain])
    kept = {name: tensors.pop(name, info) for name, info in index.tensors.items()}
    return replace(index, tensors=kept | tensors, rotation=rotation)


def _unread(model: Any, index: CheckpointIndex) -> list[str]:
    """Stored matrices that are no part of a model."""
    known = set(stored_names(model, index.tensors).values())
    return [info.name for info in index.tensors.values() if len(info.shape) > 1 and info.name not in known]


def _names(uses: StreamUses) -> set[str]:
    """All parameters that change."""
    gains = {gain for gain in uses.readers.values() if gain is not None}
    biases = {uses.biases[name] for name in uses.writers if name in uses.biases}
    return {*uses.embeddings, *uses.writers, *uses.readers, *gains, *biases}


def _turned(
    uses: StreamUses, infos: Mapping[str, TensorInfo], rotation: Rotation, offsets: Mapping[str, float]
) -> dict[str, RotatedInfo]:
    """The changed tensors by stored name."""
    found: dict[str, RotatedInfo] = {}

    def change(name: str, **values: Any) -> None:
        info = infos[name]
        for side, extent in (("last", info.shape[-1]), ("first", info.shape[0])):
            if side in values and extent != rotation.size:
                raise NotRotatableError(
                    f"{name} has shape {list(info.shape)}; expected {rotation.size} channels of the stream"
                )
        found[info.name] = replace(found.get(info.name) or rotated(info), **values)

    for name in sorted(uses.embeddings):
        change(name, last=rotation)
    for name in sorted(uses.readers.keys() - uses.embeddings):
        gain = uses.readers[name]
        folded = {} if gain is None else {"gain": infos[gain], "offset": offsets[gain]}
        change(name, last=rotation, **folded)
        if gain is not None:
            change(gain, constant=1.0 - offsets[gain])
    for gain in {uses.readers[name] for name in uses.readers.keys() & uses.embeddings} - {None}:
        change(str(gain), constant=1.0 - offsets[str(gain)])
    for name in sorted(uses.writers):
        change(name, first=rotation)
        if name in uses.biases:
            change(uses.biases[name], last=rotation)
    return found


def _tied_head(model: Any, uses: StreamUses) -> str | None:
    """Name of the head's weight where it is the embedding's."""
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    tables = [n for n, p in model.named_parameters() if p is head.weight and n in uses.embeddings]
    return f"{name}.weight" if tables else None


def trace_stream(model: Any) -> StreamUses:
    """What reads and writes the residual stream of a model.

    Args:
        model: Skeleton; its buffers are lost here, so it is of no further use.

    Raises:
        NotRotatableError: If something else than linears behind norms reads it, or than outputs of linears is added.
    """
    blocks_name, blocks = find_blocks(model)
    try:
        calls, extra_outputs = block_calls(model, blocks)
    except NotPlain as error:
        raise NotRotatableError("its blocks hand on more than a hidden state") from error
    # Zeros of any shape take the memory of one; on meta masks cannot be made.
    weights = {n: torch.zeros((), dtype=p.dtype).expand(p.shape) for n, p in model.named_parameters()}
    trace = ResidualTrace({id(zeros): name for name, zeros in weights.items()})
    row = {model.main_input_name: example_row(model)}
    with torch.no_grad(), trace.norms(model), replayed_blocks(blocks, extra_outputs) as ends, trace:
        try:
            torch.func.functional_call(model, weights, (), row)
        except TRACE_ERRORS as error:
            raise NotRotatableError(f"the parts around the blocks cannot be followed ({one_line(error)})") from error
    trace.write(ends[0][0][0])
    for args, kwargs in ends:
        if any(isinstance(leaf, Tensor) and trace.kind(leaf) for leaf in tree_leaves((args[1:], kwargs))):
            raise NotRotatableError("blocks get the residual stream a second time")
    model.to("meta")
    trace.names = {id(parameter): name for name, parameter in model.named_parameters()}
    for position, block in enumerate(blocks):
        trace.place = f"{blocks_name}.{position}"
        (hidden, *rest), kwargs = on_meta(calls[position])
        hidden = torch.empty_like(hidden)
        trace.mark(hidden, trace.stream())
        with torch.no_grad(), trace.norms(block), trace:
            try:
                output = block(hidden, *rest, **kwargs)
            except TRACE_ERRORS as error:
                raise NotRotatableError(f"{trace.place}: it cannot be followed ({one_line(error)})") from error
        trace.write(output[0] if extra_outputs_of(output) is not None else output)
    uses = trace.uses
    both = uses.plain & uses.writers
    if both:
        raise NotRotatableError(f"the output of {min(both)} is added to the residual stream and used otherwise too")
    untouched = [name for name, _ in model.named_parameters() if name not in trace.touched]
    if untouched:
        raise NotRotatableError(f"no row of tokens reaches {untouched[0]}, which may write to the residual stream")
    return uses


def _gain_offsets(model: nn.Module) -> dict[str, float]:
    """Gain of every root mean square norm to what the model adds to it, 0 or 1; found by running each on numbers."""
    found = {}
    for path, module in model.named_modules():
        if is_gained_norm(module):
            offset = gain_offset(module)
            if offset is not None:
                found[f"{path}.weight"] = offset
    return found


def gain_offset(norm: nn.Module) -> float | None:
    """The number c for which a norm computes ``x / rms(x) * (c + gain)``, 0 or 1; None where it does not.

    Args:
        norm: Module with one vector of gains.
    """
    width = norm.get_parameter("weight").shape[0]
    x = torch.linspace(-1, 3, 2 * width).reshape(1, 2, width)
    gain = torch.linspace(0.5, 2, width)
    try:
        with torch.no_grad():
            output = torch.func.functional_call(norm, {"weight": gain}, (x,))
    except TRACE_ERRORS:
        return None
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True))
    for offset in (0.0, 1.0):
        if torch.allclose(output, plain * (offset + gain), rtol=_NORM_TOLERANCE, atol=_NORM_TOLERANCE):
            return offset
    return None
