"""Frozen records that pass from one stage to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hawqtool.formats import QuantFormat

if TYPE_CHECKING:
    from torch import Tensor

SWEEP_METRICS = ("fisher", "kron", "projection", "hawq-ggn")
"""Metrics that every measurement has: one forward and one reverse sweep give them all."""

EXTRA_METRICS = ("hawq", "kl")
"""Metrics that cost sweeps of their own, hence are measured where they are asked for."""

SCORE_METRICS = (*SWEEP_METRICS, *EXTRA_METRICS)

Menu = Mapping[str, Sequence[QuantFormat]]
"""Formats to choose from, by unit."""

UnitFormats = Mapping[str, QuantFormat]
"""The format of every unit, as a plan has it."""

LayerFormats = Mapping[str, QuantFormat]
"""The format of every linear, by its name."""


@dataclass(frozen=True)
class LinearSpec:
    """One quantizable linear layer.

    Args:
        name: Prefix of its tensors in the checkpoint.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        block: Index of the transformer block.
        unit: Name of the allocation unit (what a serving engine fuses).
        scale_bytes: Bytes of one stored scale: the size of the source weight's dtype.
        module: Name in the model that transformers builds where that differs from ``name``.
        transposed: Whether the checkpoint stores the weight as ``[in, out]``, as GPT-2's are; packed, it is
            ``[out, in]`` like all others.
    """

    name: str
    out_features: int
    in_features: int
    block: int
    unit: str
    scale_bytes: int
    module: str | None = None
    transposed: bool = False

    @property
    def module_name(self) -> str:
        """Name in the model that transformers builds."""
        return self.module or self.name

    @property
    def num_weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def stored_bytes(self, quant_format: QuantFormat) -> int:
        """Stored bytes under a format, ``weight_shape`` excluded."""
        return quant_format.stored_bytes(self.out_features, self.in_features, self.scale_bytes)


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block: its module name and its input groups in call order.

    The linears of an input group receive the same input tensor, hence share a Gram matrix and a factor.
    """

    index: int
    name: str
    input_groups: tuple[tuple[LinearSpec, ...], ...]

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Linears in call order."""
        return tuple(spec for group in self.input_groups for spec in group)


@dataclass(frozen=True)
class Unit:
    """An allocation unit: linears that must share one format because engines fuse them.

    Args:
        name: Name.
        members: The linears.
        active_share: Share of its weights that one token reads: below 1 for routed experts, where that is asked for.
    """

    name: str
    members: tuple[LinearSpec, ...]
    active_share: float = 1.0

    @property
    def num_weights(self) -> int:
        """Weights of all members."""
        return sum(m.num_weights for m in self.members)

    def stored_bytes(self, quant_format: QuantFormat) -> int:
        """Stored bytes of all members."""
        return sum(m.stored_bytes(quant_format) for m in self.members)


TokenImportance = Mapping[str, "Tensor"]
"""How much each token counts in the Gram matrix of a linear, by its name: ``[rows, positions]`` float32, mean 1.
All linears of an input group are named, or none, whose tokens all count alike. So are blocks whose output's error is
weighted."""


@dataclass(frozen=True)
class OutputMoments:
    """Second moments S of the gradients g at an output, sum of g gᵀ / ‖g‖ over tokens.

    At a linear's output they are for feedback. At a block's, where g is times the norm of its token's output, they are
    for refinement: they have no damping of their own, and no ratio.

    Args:
        ratio: Loss on held-out rows that feedback is predicted to leave, relative to that without.
        damping: λ over the mean diagonal of S; None where feedback is not worthwhile.
        lower: ``[out (out + 1) / 2]`` float32, lower triangle of S row by row; None where it is not worthwhile.
        held_out: The part of it that comes of the held-out rows; None where no setting is chosen on them.
    """

    ratio: float = 1.0
    damping: float | None = None
    lower: Tensor | None = None
    held_out: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Token rows with their origin.

    Args:
        tokens: ``[num_rows, seq_len]`` int64, or ``[num_rows, channels, height, width]`` float32.
        source: Where they come from, for the report.
        fingerprint: SHA-256 of the tokens.
        importance: How much each token counts where layers are rounded on these rows; None where all count alike.
        output_moments: Of the linears that are rounded with output feedback, and of the blocks that are refined by what
            their errors cost the loss, by name; none where that is off.
        sources: Source of each row; empty where nothing depends on it.
        cache_scales: Scales of the KV cache that were calibrated on them, by the names of their tensors.
    """

    tokens: Tensor
    source: str
    fingerprint: str
    importance: TokenImportance | None = None
    output_moments: Mapping[str, OutputMoments] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    cache_scales: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasurementRows:
    """Rows of a measurement, and how many of them go through the model together.

    Args:
        calibration: Rows behind the rounding.
        scoring: Rows behind the scores, ``[rows, seq_len]`` tokens, or images; disjoint from the others.
        batch_size: Rows per forward pass.
        scoring_batch: Rows behind the scores per pass, forwards and backwards (default: ``batch_size``).
    """

    calibration: Rows
    scoring: Tensor
    batch_size: int
    scoring_batch: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scoring_batch", self.scoring_batch or self.batch_size)


@dataclass(frozen=True)
class Score:
    """Predicted loss increase in nats per token of one unit in one format, with its standard error."""

    value: float
    stderr: float


UnitScores = dict[str, dict[str, Score]]
"""``[unit][format label]``: the scores of one metric."""


@dataclass(frozen=True)
class SensitivityTable:
    """Scores of every (metric, unit, format label), all of symmetric or all of asymmetric grids.

    Args:
        scores: ``[metric][unit][label]``.
        rounding: Rounding behind the errors that were scored.
        model: Name of the checkpoint.
        model_fingerprint: Its fingerprint.
        rows: Fingerprints of the rows, by role.
        settings: How it was measured.
        symmetric: Whether grids have no zero points.
        projections: ``[unit][label]``: for every scoring row its gradient times the unit's rounding error, over the
            root of the row's outputs; what `hawqtool.pipeline.search.shortlist.pair_loss` needs.
        curvature: ``[unit]``: what does not depend on formats: traces of the Hessian or of the Fisher matrix with
            respect to weights and inputs, and top eigenvalues.
        warnings: What the user should know of the scores.
    """

    scores: dict[str, UnitScores]
    rounding: str
    model: str
    model_fingerprint: str
    rows: dict[str, str]
    settings: dict[str, float | int | str]
    symmetric: bool = True
    projections: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    curvature: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BitPlan:
    """Format of every unit that is quantized, with the budget that led to it.

    Args:
        formats: Unit name to format.
        stored_bytes: Stored bytes of all units.
        num_weights: Weights of all units.
        budget_bytes: Most stored bytes that were allowed.
        predicted_loss: Sum of the chosen scores, nats per token.
        metric: Name of the scores.
        solver: What found the plan, with the reason where that was not what was asked for.
        lower_bound: Loss below which no plan within the budget (and ``max_cost``) can fall: by linear relaxation, or
            as HiGHS proved.
        seconds: Time that the solver took.
        cost: Sum of the chosen second costs, in their own unit.
        max_cost: Most of them that was allowed.
    """

    formats: UnitFormats
    stored_bytes: int
    num_weights: int
    budget_bytes: int | None = None
    predicted_loss: float | None = None
    metric: str | None = None
    solver: str | None = None
    lower_bound: float | None = None
    cost: float | None = None
    max_cost: float | None = None
    seconds: float | None = field(default=None, compare=False)

    @property
    def gap(self) -> float | None:
        """Most by which the loss may exceed the optimum, relative to it; None where no bound is known."""
        if self.predicted_loss is None or self.lower_bound is None:
            return None
        if self.predicted_loss == self.lower_bound:
            return 0.0
        return (self.predicted_loss - self.lower_bound) / abs(self.predicted_loss) if self.predicted_loss else None

    @property
    def symmetric(self) -> bool:
        """Whether no layer has zero points."""
        return all(fmt.symmetric for fmt in self.formats.values())

    @property
    def bpw(self) -> float:
        """Stored bits per weight over the quantized linears, scales and zero points included."""
        return 8 * self.stored_bytes / self.num_weights


@dataclass(frozen=True)
class RoundedLayer:
    """Codes, scales and zero points of one layer.

    Args:
        codes: ``[out, in]`` int8, signed, or float8_e4m3fn.
        scales: ``[out, groups]`` in the stored dtype.
        metrics: What the report says of the layer.
        zeros: ``[out, groups]`` int8, signed; None on a symmetric grid.
        divisor: That of E4M3 scales; None where scales are stored otherwise.
        input_divisor: That of E4M3 scales of the inputs; None where nothing of the inputs is stored.
    """

    name: str
    quant_format: QuantFormat
    codes: Tensor
    scales: Tensor
    metrics: LayerMetrics
    zeros: Tensor | None = None
    divisor: float | None = None
    input_divisor: float | None = None


@dataclass(frozen=True)
class LayerMetrics:
    """Numbers of one rounded layer.

    Errors are relative: squared output error over squared output, on the rounding rows (from the Gram
    matrix); ``rtn_error`` is plain rounding on the same scales. ``predicted_error`` is
    sum of R_jj² s² / 12, what compensation leaves when nothing clips. The three are None where no inputs
    were looked at. ``kernel`` ran the column loop: ``eager``,
    ``numba`` or ``triton``, None for plain rounding. ``beta``, ``target_shift`` and ``scales_refitted`` are the
    settings that the layer was rounded with, some of them chosen on held-out rows; with a shift, the errors include
    what it changes on purpose. ``feedback_ratio``, ``feedback_damping`` and ``feedback_blocks`` are those of output
    feedback: the predicted loss relative to that without, λ, and blocks of rows; 1, None and 0 where there is none.
    With feedback, output errors are larger on purpose: the loss, not the output, is what rows make up for.
    ``gram_gain`` is the share of the held-out error that learning from the Gram matrix took off, 0 where the layer
    stayed as it was, None where that was not tried. ``copied`` are experts that lay on the grid of their format.
    """

    output_error: float | None
    rtn_error: float | None
    predicted_error: float | None
    weight_error: float
    clip_rate: float
    damping: float
    damping_retries: int
    dead_inputs: int
    num_tokens: int
    seconds: float
    fallback: str | None = None
    kernel: str | None = None
    beta: float = 0.0
    target_shift: float = 0.0
    scales_refitted: bool = False
    feedback_ratio: float = 1.0
    feedback_damping: float | None = None
    feedback_blocks: int = 0
    gram_gain: float | None = None
    copied: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Quality of one model on the evaluation rows, against the original.

    Args:
        measure: What ``divergence`` is: ``kl`` (nats per output: per token for language models) or
            ``embedding_error`` (squared error of the embedding over its square).
        divergence: Mean over rows.
        stderr: Its standard error.
        row_divergence: The values of the rows.
        num_tokens: Positions of all rows.
        perplexity: Of the next token; causal language models only.
        same_top: Share of outputs whose likeliest class is the original's; logits only.
        cosine: Mean cosine to the original's embedding; embeddings only.
        kl_p99: KL that one output of a hundred reaches; logits only.
        kl_p999: KL that one output of a thousand reaches; logits only.
        flips: Share of another likeliest class among outputs that the original is sure of; None where it is of none.
        sources: Source of each row; empty where nothing depends on it.
    """

    measure: str
    divergence: float
    stderr: float
    row_divergence: tuple[float, ...] = field(repr=False)
    num_tokens: int
    perplexity: float | None = None
    same_top: float | None = None
    cosine: float | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None
    flips: float | None = None
    sources: tuple[str, ...] = field(default=(), repr=False)
