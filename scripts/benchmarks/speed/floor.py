"""The least time that a block can take: its arithmetic and its bytes over the rates of the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hawqtool.pipeline.run.job import Job
from hawqtool.records import LinearSpec, Menu
from hawqtool.rounding.gram import has_float32_products
from hawqtool.rounding.grid import COARSE_STEPS, FINE_STEPS
from speed.rates import Rates

_OPERATIONS_PER_CANDIDATE = 7
"""Of the scale search, per weight: divide, round, two bounds, multiply and subtract, square, weight, add."""


_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Work:
    """Operations of one block.

    Args:
        forward: One forward pass over the calibration rows, attention to earlier tokens only.
        gram: The lower triangles of all Gram matrices.
        factor: One Cholesky factorisation and the inverse of its triangular factor, per Gram matrix.
        search: One scale search.
        columns: Updates of the columns to come, once.
        passes: How often scales are searched and columns gone through; of several, each is looked back at.
        losses: Three quadratic forms per layer.
        weights: Weights of the linears.
    """

    forward: float
    gram: float
    factor: float
    search: float
    columns: float
    passes: int
    losses: float
    weights: int


def block_work(job: Job, rows: int, seq_len: int) -> Work:
    """Work of rounding the first block with so many rows; all blocks of the shapes here are nearly alike.

    A linear of an expert sees the share of the tokens that a router in balance sends it.
    """
    spec = job.structure.blocks[0]
    tokens = rows * seq_len
    weights = sum(linear.num_weights for linear in spec.linears)
    config = job.skeleton.config
    routed = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    shares = {linear.name: routed if _EXPERT.search(linear.name) else 1.0 for linear in spec.linears}
    attention_width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    alike = [[linear] for linear in spec.linears] if job.settings.uses_token_importance else spec.input_groups
    widths = [group[0].in_features for group in alike]
    gram = sum(shares[group[0].name] * group[0].in_features * (group[0].in_features + 1) for group in alike)
    multiplied = sum(shares[linear.name] * linear.num_weights for linear in spec.linears)
    updates = float(sum(linear.out_features * linear.in_features**2 for linear in spec.linears))
    method = job.settings.method
    candidates = (2 if method.both_signs else 1) * COARSE_STEPS + 2 * FINE_STEPS
    return Work(
        forward=2.0 * multiplied * tokens + 2.0 * tokens * seq_len * attention_width,
        gram=tokens * gram,
        factor=2 / 3 * sum(width**3 for width in widths),
        search=float(weights * candidates * _OPERATIONS_PER_CANDIDATE),
        columns=updates,
        passes=method.passes if job.settings.uses_token_importance and method.compensates else 1,
        losses=6 * updates,
        weights=weights,
    )


def importance_floor(job: Job, rates: Rates, rows: int, seq_len: int) -> float:
    """Seconds per block: two forward passes, and as much again for the gradients at the layers' outputs."""
    return 3 * block_work(job, rows, seq_len).forward / rates.of(job.dtype)


def rounding_floor(job: Job, rates: Rates, rows: int, seq_len: int, stored_bytes: float) -> dict[str, float]:
    """Seconds per block by stage of the recorder; ``stored_bytes`` are a block's packed ones.

    A target shift is left out. ``load`` and ``write`` run beside the rest where they overlap, so `block_floor` does not
    add them.
    """
    work = block_work(job, rows, seq_len)
    gram_dtype = job.dtype if has_float32_products(job.device, job.dtype) else torch.float32
    source_bytes = torch.finfo(job.dtype).bits // 8 * work.weights
    return {
        "load": max(source_bytes / rates.disk_read, source_bytes / rates.to_device),
        "forward": work.forward / rates.of(job.dtype),
        "gram": work.gram / rates.of(gram_dtype),
        "factor": work.factor / rates.float64,
        "scale search": work.passes * max(work.search / rates.float32, 4 * work.weights / rates.memory),
        "column loop": (2 * work.passes if work.passes > 1 else 1) * work.columns / rates.float32,
        "losses": work.losses / rates.coarse,
        "write": stored_bytes / rates.disk_write,
        "dequantize": 3 * work.weights / rates.memory,
    }


def block_floor(by_stage: Mapping[str, float]) -> float:
    """Seconds of a block when reading and writing overlap with the rest and neither is slower."""
    transfers = ("load", "write")
    computing = sum(seconds for stage, seconds in by_stage.items() if stage not in transfers)
    return max(computing, *(by_stage[stage] for stage in transfers))


def measuring_floor(job: Job, rates: Rates, rows: Sequence[int], seq_len: int, menu: Menu) -> float:
    """Seconds per block of measuring with so many calibration and scoring rows.

    Calibration rows run forward twice (once in each sweep), scoring rows twice forward and once backward, which is
    twice a forward pass; Gram matrices and factors come once, scale search and column loop once per format.
    """
    calibration, scoring = (block_work(job, count, seq_len) for count in rows)
    by_stage = rounding_floor(job, rates, rows[0], seq_len, 0.0)
    forward = (2 * calibration.forward + 4 * scoring.forward) / rates.of(job.dtype)
    linears: Sequence[LinearSpec] = job.structure.blocks[0].linears
    formats = sum(linear.num_weights * len(menu[linear.unit]) for linear in linears if linear.unit in menu)
    per_format = (calibration.search + calibration.columns) / rates.float32
    return forward + by_stage["gram"] + by_stage["factor"] + per_format * formats / calibration.weights
