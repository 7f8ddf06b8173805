"""Types of report.json and of its parts, with the meaning of every key; docs/output.md is made from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from hawqtool.report.plan_comparison import PlanComparison, PlanQuality, Shipped, TaskResult, shipped_of

Grade = Literal["near lossless", "usable", "damaged"]


class Sizes(TypedDict):
    """Bytes and bits."""

    original_bytes: Annotated[int, "Bytes of the original's weight files."]
    quantized_bytes: Annotated[int, "Bytes of the written weight files."]
    stored_bytes_linears: Annotated[int, "Bytes of codes, scales and zero points of the linears."]
    shape_tensor_bytes: Annotated[int, "Bytes of the small tensors that state shapes."]
    bpw_linears: Annotated[float, "Stored bits per weight of the linears."]
    bpw_file: Annotated[float, "Bits of the files per parameter of the model."]
    effective_bits: NotRequired[Annotated[float, "Bits per weight of the linears as ModelOpt counts its budget."]]


class PlanEntry(TypedDict):
    """Format of one linear."""

    name: Annotated[str, "Linear."]
    unit: Annotated[str, "Unit that it belongs to; all linears of a unit share a format."]
    bits: Annotated[int, "Bits of a code."]
    group_size: Annotated[int | str, "Weights that share a scale; `channel` for a whole row."]
    symmetric: Annotated[bool, "Whether there are no zero points."]
    bytes: Annotated[int, "Stored bytes."]
    format: NotRequired[Annotated[str, "Label of a format of floats, or with rounded inputs."]]
    module: NotRequired[Annotated[str, "Name that engines know it by, where it differs; plan.json only."]]
    transposed: NotRequired[Annotated[Literal[True], "Set where the original stores it transposed; plan.json only."]]


class Engine(TypedDict):
    """Whether an inference engine loads the result."""

    engine: Annotated[str, "Engine."]
    minimum_version: Annotated[str, "Versions from which on this is said."]
    loads: Annotated[bool | None, "Whether it loads the result; null where that was to be tried and was not."]
    reason: Annotated[str, "Why, and how this is known."]
    tried: Annotated[bool, "Whether the result was loaded to know it."]
    gain: NotRequired[Annotated[str, "What a smaller file gains there: on the disk, in memory, in speed."]]


class GoodSize(TypedDict):
    """A size that is predicted to be good."""

    grade: Annotated[Grade, "Grade that is expected of it."]
    bpw_linears: Annotated[float, "Stored bits per weight of the linears."]
    bytes: Annotated[int, "Bytes of the weight files, at most."]


class Verdict(TypedDict):
    """What the figures mean, by the limits of docs/evaluation.md."""

    grade: Annotated[Grade, "`near lossless`, `usable` or `damaged`: the worst of all measures."]
    grades: Annotated[dict[str, Grade], "Grade by measure."]
    measures: Annotated[dict[str, float], "`kl`, `changed_top`, `perplexity_rise`, `embedding_error`, as far as known."]
    few_rows: Annotated[bool, "Whether the report rows are too few to be sure."]
    good: Annotated[GoodSize | None, "The smallest size that is predicted to be a grade better, where scores tell."]


class LayerRecord(TypedDict):
    """How one linear was rounded; errors are relative squared errors."""

    output_error: Annotated[float | None, "Error of the outputs on the calibration rows; null where there were none."]
    rtn_error: Annotated[float | None, "The same for plain rounding on the same scales."]
    predicted_error: Annotated[float | None, "What compensated rounding leaves when nothing clips."]
    weight_error: Annotated[float, "Error of the weights."]
    clip_rate: Annotated[float, "Share of weights outside the grid."]
    damping: Annotated[float, "Share of the mean diagonal added to the Gram matrix."]
    damping_retries: Annotated[int, "Times that the damping had to be raised."]
    dead_inputs: Annotated[int, "Inputs that are always zero."]
    num_tokens: Annotated[int, "Calibration tokens that reached it."]
    seconds: Annotated[float, "Seconds that rounding took."]
    fallback: Annotated[str | None, "What replaced missing statistics."]
    kernel: Annotated[str | None, "Kernel of the column loop; null for plain rounding."]
    beta: Annotated[float, "FOEM's feedback."]
    target_shift: Annotated[float, "Share of the input drift that is corrected."]
    scales_refitted: Annotated[bool, "Whether scales were fitted again after rounding."]
    feedback_ratio: Annotated[float, "Loss that output feedback is predicted to leave, relative; 1 where it is off."]
    feedback_damping: Annotated[float | None, "Damping of output feedback; null without feedback."]
    feedback_blocks: Annotated[int, "Blocks of rows of output feedback; 0 without feedback."]
    gram_gain: Annotated[float | None, "Share of the held-out error that learning from the Gram matrix took off."]
    copied: Annotated[bool, "Whether it lay on the grid of its format, so that codes and scales are the original's."]
    format: Annotated[str, "Label of the format."]


class Training(TypedDict, total=False):
    """What learning changed; empty where nothing was learned."""

    error_before: Annotated[float, "Held-out error before."]
    error_after: Annotated[float, "Held-out error after."]
    best_step: Annotated[int, "Step whose result was kept; 0 for none."]
    steps: Annotated[int, "Steps that were done."]
    reproducible: Annotated[bool, "Whether a rerun gives the same bits."]
    seconds: Annotated[float, "Seconds that it took."]


class RoundingResult(TypedDict):
    """What rounding by a plan gave; saved for a run that resumes."""

    layers: Annotated[dict[str, LayerRecord], "How each linear was rounded."]
    refinement: Annotated[dict[str, Training], "What refinement changed, by block."]
    distillation: Annotated[Training, "What distillation changed."]
    seconds: Annotated[float, "Seconds that it took."]
    total_bytes: Annotated[int, "Bytes of all weight files."]


class RowSet(TypedDict):
    """One set of rows."""

    source: Annotated[str, "Where the rows come from."]
    count: Annotated[int, "Rows."]
    kind: Annotated[str, "What a row is: tokens, images, sounds, images with tokens or sounds with tokens."]
    shape: Annotated[
        list[int], "Shape of a row: tokens; channels, height and width; samples; frames and bands; tokens first of two."
    ]
    fingerprint: Annotated[str, "SHA-256 of the rows."]


class RowSets(TypedDict):
    """The four disjoint sets of rows."""

    calibration: Annotated[RowSet | None, "Rows that rounding sees; null where it sees none, as all that follow."]
    scoring: Annotated[RowSet | None, "Rows that sensitivity is measured on."]
    selection: Annotated[RowSet | None, "Rows that the shipped plan is chosen by."]
    report: Annotated[RowSet | None, "Rows that the figures are of."]
    overlap: Annotated[int, "Rows that stand in two sets: 0."]
    report_in_domain: Annotated[bool, "Whether the report rows come from the calibration sources."]


class Gate(TypedDict):
    """A limit and what was found."""

    name: Annotated[str, "Setting that states the limit, or `regression_` and what may rise."]
    sense: Annotated[str, "`at most` or `at least`."]
    limit: Annotated[float, "The limit."]
    found: Annotated[float, "What was found."]
    passed: Annotated[bool, "Whether the limit is kept; NaN keeps none."]
    baseline: NotRequired[Annotated[float, "The earlier value; of regressions."]]


class SearchTrial(TypedDict):
    """A plan that the search for a quality target tried."""

    stored_bytes: Annotated[int, "Bytes of the linears."]
    bpw_linears: Annotated[float, "Stored bits per weight."]
    divergence: Annotated[dict[str, float], "Measured divergence by set of rows."]


class Search(TypedDict):
    """The search for the smallest plan that meets `target_kl`."""

    bound: Annotated[float, "The target."]
    met: Annotated[bool, "Whether a plan meets it."]
    largest_that_misses: Annotated[SearchTrial | None, "The next smaller plan that was tried, which misses it."]
    trials: Annotated[list[SearchTrial], "All plans in the order in which they were tried."]


class KeptRow(TypedDict):
    """Matrices that are kept for one reason and whose names differ in numbers only."""

    reason: Annotated[str, "Why, in fixed words."]
    count: Annotated[int, "Matrices."]
    bytes: Annotated[int, "Stored bytes."]
    pattern: Annotated[str, "Their names, with `*` for numbers."]
    example: Annotated[str, "The first name."]


class Kept(TypedDict):
    """Matrices that stay as they are whatever the settings."""

    bytes: Annotated[int, "Stored bytes, embeddings and head aside."]
    share: Annotated[float, "Their share of all tensor bytes of the original."]
    rows: Annotated[list[KeptRow], "By reason and pattern, embeddings and head too; the largest first."]


class MeasurementOrigin(TypedDict):
    """Where the scores come from."""

    source: Annotated[str, "`run`, `shared` (the folder of measurements) or `file`."]
    fingerprint: Annotated[str | None, "Name in the folder of measurements."]
    seconds: Annotated[float | None, "Seconds that measuring took, whenever that was."]


class KvCache(TypedDict):
    """How an engine caches keys and values by the scales in the file."""

    format: Annotated[str, "`fp8`, one scale a layer for keys and one for values, or `fp8-head`, one a head."]
    attentions: Annotated[int, "Attentions that have scales."]
    bytes_per_token: Annotated[int, "Bytes that a token adds to the cache."]
    bytes_per_token_16_bit: Annotated[int, "Bytes that it adds to one of 16 bits."]
    kl: Annotated[float, "KL in nats per token of the original with such a cache, queries rounded too, in float32."]
    rows: Annotated[int, "Rows that this was measured on."]


class RotationKind(TypedDict):
    """What a rotation of the residual stream is made from; the source and this give every tensor again."""

    kind: Annotated[str, "`hadamard`: random signs and a Hadamard matrix."]
    seed: Annotated[int, "Seed of the signs."]
    version: Annotated[int, "Version of the numbers that a seed stands for."]
    channels: Annotated[int, "Channels of the residual stream."]


class RotationCheck(RotationKind):
    """A rotation and how the rotated original, before any rounding, compares with the original."""

    difference: Annotated[float, "Largest relative difference of a block's outputs before weights are stored."]
    kl: Annotated[float, "KL in nats per token after that, in float32: what storing rotated weights costs."]
    rows: Annotated[int, "Rows that this was measured on."]


class ManifestLink(TypedDict):
    """The manifest of the folder."""

    file: Annotated[str, "Its name."]
    sha256: Annotated[str, "Its SHA-256."]


class Report(TypedDict):
    """What a run did and what came of it (report.json)."""

    schema: Annotated[str, "`hawqtool.report/2`."]
    model: Annotated[str, "Name of the original."]
    model_revision: Annotated[str | None, "Commit of the original on the hub."]
    source_format: Annotated[str | None, "How a quantized original is stored; it is dequantized on reading."]
    architecture: Annotated[str, "Class of the model in transformers."]
    hawqtool_version: Annotated[str, "Version that wrote this."]
    command: Annotated[str, "The command line, or the call."]
    config: Annotated[dict[str, Any], "Every setting as it was resolved; paths are shortened to their last part."]
    sizes: Annotated[Sizes, "Bytes and bits per weight."]
    plan: Annotated[list[PlanEntry], "Format of every linear."]
    kept: Annotated[Kept, "Matrices that stay as they are."]
    predicted_loss: Annotated[float | None, "Predicted loss of the plan; null for uniform plans and plan files."]
    metric: Annotated[str | None, "Scores that the prediction is in."]
    solver: Annotated[str | None, "How the plan was found: `hull` or `exact`."]
    gap: Annotated[float | None, "Most by which the predicted loss may exceed the optimum, relative to it."]
    cost: Annotated[float | None, "Second cost of the plan."]
    max_cost: Annotated[float | None, "Limit of the second cost."]
    engines: Annotated[list[Engine], "Which engines load the result."]
    layers: Annotated[dict[str, LayerRecord], "How each linear was rounded."]
    refinement: Annotated[dict[str, Training], "What refinement changed, by block."]
    distillation: Annotated[Training, "What distillation changed."]
    fallbacks: Annotated[int, "Linears that needed a fallback."]
    experts: Annotated[dict[str, list[int]], "Calibration tokens of every expert, by block."]
    rows: Annotated[RowSets, "The sets of rows."]
    batch_size: Annotated[int, "Rows per forward pass."]
    tasks: NotRequired[Annotated[list[TaskResult], "Accuracy on the tasks that were asked for."]]
    evaluation: Annotated[PlanComparison | None, "All plans that were tried, and the original; null under `--no-eval`."]
    shipped: Annotated[Shipped, "Which of the two was written."]
    verdict: Annotated[Verdict | None, "What the figures mean; null where nothing was evaluated."]
    timings: Annotated[dict[str, float], "Seconds by stage."]
    peak_memory_bytes: Annotated[dict[str, int], "Most bytes in use, by place."]
    device: Annotated[str, "Device that computed."]
    warnings: Annotated[list[str], "What the user should know."]
    search: Annotated[Search | None, "The search for a quality target."]
    gates: Annotated[list[Gate], "Limits that were set."]
    starts: Annotated[int, "Times that the run was begun: more than 1 after an interruption."]
    config_fingerprint: Annotated[str, "SHA-256 of settings and input files; batches compare it."]
    measurement: Annotated[MeasurementOrigin | None, "Where the scores come from."]
    rotation_choice: NotRequired[Annotated[str, "Whether the residual stream was rotated, `on` or `off`, and why."]]
    rotation: NotRequired[Annotated[RotationCheck, "How the residual stream was rotated; absent where it was not."]]
    kv_cache: NotRequired[Annotated[KvCache, "The KV cache; absent where it stays in 16 bits."]]
    manifest: NotRequired[Annotated[ManifestLink, "Hashes of all files of the folder."]]


def shipped_plan(report: Report) -> PlanQuality | None:
    """The plan that was written, as it was evaluated; None where nothing was."""
    evaluation = report["evaluation"]
    return None if evaluation is None else shipped_of(evaluation, report["shipped"])


def layer_error(layer: LayerRecord) -> float:
    """Relative error of a layer's outputs, or of its weights where no outputs were looked at."""
    return layer["weight_error"] if layer["output_error"] is None else layer["output_error"]


def named_rows(report: Report) -> dict[str, RowSet]:
    """The four sets of rows by name."""
    rows = report["rows"]
    names: tuple[Literal["calibration", "scoring", "selection", "report"], ...]
    names = ("calibration", "scoring", "selection", "report")
    return {name: found for name in names if (found := rows[name]) is not None}
