"""Whether a run rotates the residual stream: as it is told, or where rotation was seen to pay and costs nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hawqtool.checkpoint.fusion import is_expert
from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.checkpoint.source import ResolvedModel
from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.model.rotation.fold import rotate_checkpoint
from hawqtool.model.rotation.residual_trace import NotRotatableError
from hawqtool.model.tasks import model_task

FEWEST_CHANNELS = 256
"""Channels of the stream from which ``auto`` rotates: 576 are the fewest that were measured."""

WIDEST_BITS = 4
"""Least width of a menu up to which ``auto`` rotates.

Storing rotated weights in 16 bits costs a KL of 2e-4 on SmolLM2, next to nothing beside rounding to 4 bits and as much
as rounding to 8.
"""


MOST_WEIGHTS = 2_000_000_000
"""Weights up to which ``auto`` rotates.

The processor rotates them anew on every read, of which a run has about ten. Of a model of 2.4e9 weights (six blocks of
Llama-3-8B, with its vocabulary) that took longer than all else of a GPU's run, so that large ones wait for a rotation
on the device; ``--rotate on`` does not.
"""


@dataclass(frozen=True)
class RotationChoice:
    """A checkpoint, rotated or not, and why.

    Args:
        index: Its index.
        text: ``on`` or ``off``, with the reason where the run decided.
    """

    index: CheckpointIndex
    text: str


def choose_rotation(config: RunConfig, source: ResolvedModel, model: Any, index: CheckpointIndex) -> RotationChoice:
    """Rotate a checkpoint where the configuration says so, or leaves it open and rotation pays.

    Args:
        config: The run's configuration.
        source: Where the checkpoint comes from.
        model: Skeleton, its experts split; unchanged.
        index: The checkpoint, as it is stored.

    Raises:
        InputError: If rotation is asked for and cannot be had; says where and why.
    """
    if config.rotate == "off":
        return RotationChoice(index, "off")
    if config.rotate == "on":
        if source.runs_code:
            raise InputError(f"--rotate: {source.spec} brings its own code, which is not followed; use --rotate off")
        return RotationChoice(rotate_checkpoint(model, index, config.seed), "on")
    reason = _reason_against(config, source, model, index)
    if reason is None:
        try:
            rotated = rotate_checkpoint(model, index, config.seed)
            return RotationChoice(rotated, "on, as the head is not tied to the embedding (--rotate off goes without)")
        except NotRotatableError as error:
            reason = error.reason
    return RotationChoice(index, f"off: {reason}")


def _reason_against(config: RunConfig, source: ResolvedModel, model: Any, index: CheckpointIndex) -> str | None:
    """Why an open choice falls on no rotation, before the architecture is looked at; None if nothing speaks for it."""
    if config.rounding == "rtn":
        return "--rounding rtn, with which it was not measured"
    if config.bits is not None and min(config.bits) > WIDEST_BITS:
        return f"above {WIDEST_BITS} bits, storing rotated weights costs what rounding gains"
    if config.special_formats:
        return f"with {config.special_formats[0].label} it was not measured"
    if source.runs_code:
        return "the model brings its own code, which is not followed"
    if index.source_format is not None:
        return "the original is quantized, and its weights round best on the grid that they lie on"
    if index.stacks or any(is_expert(name.removesuffix(".weight")) for name in index.tensors):
        return "models with experts were not measured"
    if not model_task(model).generates:
        return f"{type(model).__name__} is no causal language model"
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or table is None:
        return f"{type(model).__name__} has no output head"
    shape = tuple(table.weight.shape)
    if head.weight is table.weight:
        size = max((info.num_bytes for info in index.tensors.values() if info.shape == shape), default=0)
        shown = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
        return f"the head is tied to the embedding and would take {shown} of its own (--rotate on)"
    count = sum(math.prod(info.shape) for info in index.tensors.values())
    if count > MOST_WEIGHTS:
        return (
            f"its {count / 1e9:.1f} billion weights would be rotated on every read, longer than all else (--rotate on)"
        )
    if shape[-1] < FEWEST_CHANNELS:
        return f"its stream has {shape[-1]} channels, and fewer than {FEWEST_CHANNELS} were not measured"
    return None
