"""How weights are rounded, and what is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hawqtool.formats import QuantFormat
from hawqtool.rounding.factor import Factor
from hawqtool.rounding.grid import Quantized
from hawqtool.rounding.statistics import GroupStatistics

Grid = tuple[Tensor, Tensor | None]
"""Scales and zero points of a layer; no zero points on a symmetric grid."""

BETAS = (0.0, 0.05, 0.1, 0.2, 0.4)
"""What ``auto`` chooses FOEM's β from."""

PASSES = 2
"""Passes of the two-pass scale search of a layer whose tokens count by importance.

KL of SmolLM2 and its off-lattice copy at 3 bits (128 rows of 2048 tokens): 0.387 and 0.466 after one, 0.377 and
0.450 after two, 0.373 and 0.446 after three, 0.375 and 0.451 after five, when all rows took the last; two with each
row's best: 0.372 and 0.438.
"""


@dataclass(frozen=True)
class RoundingMethod:
    """How weights are rounded.

    Args:
        name: ``rtn``, ``gptq``, ``foem`` or ``gptaq``.
        beta: FOEM's β, or ``auto``: the one of `BETAS` with the least error on held-out rows, layer by layer; ignored
            by the others.
        both_signs: Allow negative scales on symmetric grids (see `search_scales`).
        damping: Fraction of the mean diagonal; None chooses by tokens per column.
        alpha: GPTAQ's α; ignored by the others.
        shift: Share of the target shift (see `full_shift`), 0 for none, or ``auto``: by held-out rows, layer by layer.
        refit: Refit the scales of each layer whose error on held-out rows that lowers.
        passes: How often compensated rounding searches scales where tokens count by importance: after the first time on
            what the columns had become when they were rounded, keeping each row's best.
        paper_form: Whether FOEM is that of its paper, not that of its authors' code (see `round_compensated`); ignored
            by the others.
    """

    name: str = "gptq"
    beta: float | Literal["auto"] = 0.1
    both_signs: bool = True
    damping: float | None = None
    alpha: float = 0.25
    shift: float | Literal["auto"] = 0.0
    refit: bool = False
    passes: int = PASSES
    paper_form: bool = False

    @property
    def feedback_beta(self) -> float | Literal["auto"]:
        """β of the column loop."""
        return self.beta if self.name == "foem" else 0.0

    @property
    def compensates(self) -> bool:
        """Whether later columns make up for errors; FOEM's β = 1 is plain rounding."""
        return self.name != "rtn" and self.feedback_beta != 1

    @property
    def needs_drift(self) -> bool:
        """Whether it looks at the original model's inputs too."""
        return self.shift != 0 or (self.name == "gptaq" and self.alpha != 0)

    @property
    def needs_held_out(self) -> bool:
        """Whether it chooses settings on held-out rows."""
        return self.feedback_beta == "auto" or self.shift == "auto" or self.refit


@dataclass(frozen=True)
class Task:
    """One weight to round in one format.

    Args:
        name: Name of the layer.
        weight: ``[out, in]`` float32.
        quant_format: Format.
        stored_dtype: dtype of the stored scales.
        given: Codes and scales that give the weight to the bit, which are taken as they are; None where it is rounded.
        divisor: That of E4M3 scales; None where scales are stored otherwise.
    """

    name: str
    weight: Tensor
    quant_format: QuantFormat
    stored_dtype: torch.dtype
    given: Quantized | None = None
    divisor: float | None = None


class TaskGroup(NamedTuple):
    """Layers that share their input.

    Args:
        tasks: The layers, each in its format.
        factor: Factor of the Gram matrix of their inputs.
        statistics: What the factor came from; None where nothing else of it is wanted.
    """

    tasks: Sequence[Task]
    factor: Factor
    statistics: GroupStatistics | None


@dataclass(frozen=True)
class LayerSettings:
    """What a layer is rounded with: β of the loop, share of the target shift, whether its scales are refitted."""

    beta: float = 0.0
    shift: float = 0.0
    refit: bool = False
