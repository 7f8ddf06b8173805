"""Types of the other JSON documents, with the meaning of every key; docs/output.md is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from hawqtool.report.plan_comparison import Measure, Measured, Quality, Shipped, TaskResult
from hawqtool.report.schema import Kept, PlanEntry, RotationKind, Search


class MemberRecord(TypedDict):
    """One linear of a unit."""

    name: Annotated[str, "Linear."]
    out_features: Annotated[int, "Rows of the weight."]
    in_features: Annotated[int, "Columns of the weight."]
    block: Annotated[int, "Number of its block."]
    unit: Annotated[str, "Unit that it belongs to."]
    scale_bytes: Annotated[int, "Bytes of a stored scale."]
    module: Annotated[str | None, "Name that engines know it by, where it differs."]
    transposed: Annotated[bool, "Whether the original stores it transposed."]


class SensitivityDocument(TypedDict):
    """Scores of every unit in every format (sensitivity.json)."""

    schema: Annotated[str, "`hawqtool.sensitivity/1`."]
    model: Annotated[str, "Name of the original."]
    model_fingerprint: Annotated[str, "SHA-256 of its config and of every byte of its weights."]
    rounding: Annotated[str, "Rounding whose errors were scored."]
    symmetric: Annotated[bool, "Whether grids had no zero points."]
    settings: Annotated[Mapping[str, float | int | str | bool], "What else the scores depend on, and `seconds`."]
    rows: Annotated[dict[str, str], "Fingerprint of each set of rows."]
    unquantized_bytes: Annotated[int, "Bytes of the output files that no plan changes."]
    units: Annotated[dict[str, list[MemberRecord]], "Linears of every unit."]
    scores: Annotated[
        dict[str, dict[str, dict[str, list[float | None]]]],
        "Metric, unit and format label to score and standard error (null for one row).",
    ]
    projections: Annotated[dict[str, dict[str, list[float]]], "Projection of every row's gradient, by unit and format."]
    curvature: Annotated[dict[str, dict[str, float | None]], "Input Fisher, traces and eigenvalues of every unit."]
    warnings: Annotated[list[str], "What the user should know of the scores."]
    fingerprint: NotRequired[Annotated[str, "Name in the folder of measurements."]]
    checksum: NotRequired[Annotated[str, "SHA-256 of all else, in a folder of measurements."]]


class StackedTensor(TypedDict):
    """A tensor of the original that holds the same part of all experts of a layer."""

    experts: Annotated[str, "Name that the experts have in the files."]
    linears: Annotated[list[str], "Linears of an expert that share the tensor."]
    transposed: Annotated[bool, "Whether an expert's matrix is `[in, out]`."]
    concatenated: Annotated[bool, "Whether the rows of a linear lie together, not in turns."]
    leaf: Annotated[str, "`weight` or `bias`."]


class CachePlan(TypedDict):
    """Which scales of an FP8 KV cache a folder has."""

    format: Annotated[str, "`fp8` or `fp8-head`."]
    heads: Annotated[dict[str, int], "Heads of keys and values by name of the attention."]


class PlanDocument(TypedDict):
    """Formats of all linears (plan.json); may be edited by hand and given as `--plan`."""

    schema: Annotated[str, "`hawqtool.plan/1`."]
    bpw_linears: Annotated[float, "Stored bits per weight of the linears."]
    stored_bytes: Annotated[int, "Bytes of codes, scales and zero points."]
    budget_bytes: Annotated[int | None, "Most such bytes that the target allowed."]
    predicted_loss: Annotated[float | None, "Predicted loss; null for a uniform plan."]
    metric: Annotated[str | None, "Scores that the prediction is in."]
    solver: Annotated[str | None, "`hull` or `exact`."]
    lower_bound: Annotated[float | None, "Proved lower bound of the loss within the budget."]
    gap: Annotated[float | None, "Most by which the loss may exceed the optimum, relative to it."]
    seconds: Annotated[float | None, "Seconds that the solver took."]
    cost: Annotated[float | None, "Second cost of the plan."]
    max_cost: Annotated[float | None, "Limit of the second cost."]
    layers: Annotated[list[PlanEntry], "Format of every linear."]
    other_linears: Annotated[list[str], "Linears that stay as they are."]
    total_bytes: NotRequired[Annotated[int, "Bytes of all weight files; of a written folder."]]
    transformers_obstacle: NotRequired[Annotated[str | None, "Why transformers cannot load the folder."]]
    stacked_experts: NotRequired[
        Annotated[
            dict[str, StackedTensor],
            "Tensors of the original that hold all experts of a layer, and how: what `verify --against` reads them by.",
        ]
    ]
    rotation: NotRequired[Annotated[RotationKind, "How the residual stream is rotated; of a written folder."]]
    kv_cache: NotRequired[Annotated[CachePlan, "Scales of the KV cache; absent where it stays in 16 bits."]]


class FrontierPoint(TypedDict):
    """One plan of the frontier."""

    kind: Annotated[str, "`frontier` or `uniform`."]
    bits: Annotated[int | None, "Width of a uniform plan."]
    stored_bytes: Annotated[int, "Bytes of the linears."]
    bpw_linears: Annotated[float, "Stored bits per weight."]
    predicted_loss: Annotated[float, "Predicted loss."]
    formats: NotRequired[Annotated[dict[str, str], "Format of every linear; JSON only."]]


class FrontierDocument(TypedDict):
    """Plans of least predicted loss for every budget (`hawqtool allocate --frontier`)."""

    schema: Annotated[str, "`hawqtool.frontier/1`."]
    metric: Annotated[str, "Scores that the predictions are in."]
    points: Annotated[list[FrontierPoint], "The frontier by size, then uniform plans."]


class EvaluatedRows(TypedDict):
    """Rows of an evaluation."""

    source: Annotated[str, "Where they come from."]
    fingerprint: Annotated[str, "SHA-256 of the rows."]
    count: Annotated[int, "Rows."]


class EvaluationDocument(Measured):
    """Quality of a written folder against its original (`hawqtool evaluate --json`)."""

    schema: Annotated[str, "`hawqtool.evaluation/1`."]
    rows: Annotated[EvaluatedRows, "Rows that were evaluated."]
    quantized: Annotated[Quality, "The quantized model."]
    tasks: NotRequired[Annotated[list[TaskResult], "Accuracy on the tasks that were asked for."]]


class ComparedResult(TypedDict):
    """One of two results."""

    path: Annotated[str, "Folder or report as it was given."]
    model: Annotated[str, "Name of the original."]
    measure: Annotated[Measure | None, "What the divergence is: `kl` or `embedding_error`; null where it is unknown."]
    shipped: Annotated[Shipped, "Which plan was written."]
    formats: Annotated[list[str], "Labels of the formats of the plan."]
    bpw_linears: Annotated[float, "Stored bits per weight of the linears."]
    quantized_bytes: Annotated[int, "Bytes of the written weight files."]
    original_bytes: Annotated[int, "Bytes of the original's weight files."]
    quality: Annotated[Quality | None, "Quality on the report rows; null where nothing was evaluated."]
    seconds: Annotated[float, "Seconds of all stages."]


class ComparedLayer(TypedDict):
    """One linear in both results; null where a result does not have it."""

    name: Annotated[str, "Linear."]
    formats: Annotated[list[str | None], "Label of the format in each."]
    bytes: Annotated[list[int | None], "Stored bytes in each."]
    output_error: Annotated[list[float | None], "Relative error of the outputs on the calibration rows of each."]


class ComparisonDocument(TypedDict):
    """Two results side by side (`hawqtool compare --json`)."""

    schema: Annotated[str, "`hawqtool.comparison/1`."]
    results: Annotated[list[ComparedResult], "The two results."]
    same_model: Annotated[bool, "Whether both were made of one original."]
    same_rows: Annotated[bool, "Whether their figures are of the same report rows."]
    settings: Annotated[dict[str, list[Any]], "Settings that differ, with the value of each."]
    layers: Annotated[list[ComparedLayer], "All linears."]


class Phase(TypedDict):
    """A part of a run."""

    name: Annotated[str, "Beginning of what it is called in the progress."]
    seconds: Annotated[float, "Seconds that it may take."]


class Estimate(TypedDict):
    """What a run may take, within a factor of two or so."""

    phases: Annotated[list[Phase], "Parts in their order; plans that turn out alike are tried once."]
    seconds: Annotated[float, "Of all phases."]
    memory_bytes: Annotated[int, "Most bytes of the device's memory."]
    disk_bytes: Annotated[int, "Most bytes on the disk, the model aside."]


class DryRun(TypedDict):
    """What a run would do (`hawqtool quantize --dry-run --json`)."""

    schema: NotRequired[Annotated[str, "`hawqtool.dryrun/1`."]]
    model: Annotated[str, "The original as it was given."]
    source_format: Annotated[str | None, "How a quantized original is stored; it is dequantized on reading."]
    left_unquantized: Annotated[list[str], "Units that a quantized original left in 16 bits, which they keep."]
    blocks: Annotated[int, "Transformer blocks."]
    linears: Annotated[int, "Linears that are quantized."]
    units: Annotated[int, "Units of the plan."]
    quantized_weights: Annotated[int, "Weights of these linears."]
    widths: Annotated[list[int], "Bits to choose from."]
    menu: Annotated[list[str], "Formats to choose from, of all units together."]
    symmetric: Annotated[bool, "Whether grids have no zero points."]
    kept: Annotated[Kept, "Matrices that stay as they are."]
    group_falls: Annotated[list[str], "Group sizes that do not divide, and what takes their place."]
    achievable_bpw: Annotated[list[float], "Least and most stored bits per weight."]
    target_kl: Annotated[float | None, "Quality target."]
    budget_bpw: Annotated[float | None, "Budget in stored bits per weight."]
    original_bytes: Annotated[int, "Bytes of the original's weight files."]
    expected_bytes: Annotated[int, "Bytes of the files to be written."]
    expected_is_exact: Annotated[bool, "Whether that is exact, not an upper bound."]
    best_uniform: Annotated[str | None, "Best uniform plan within the budget."]
    device: Annotated[str, "Device that would compute."]
    uniform_bits: Annotated[int | None, "The one width that was asked for, where there is no other target."]
    uniform_format: Annotated[str | None, "The one format that was asked for, where there is no target."]
    calibration: Annotated[str, "Rows in words."]
    evaluation: Annotated[str, "Rows that the result is judged on, in words."]
    rounding: Annotated[str, "Rounding in words."]
    rotation: Annotated[str, "Whether the residual stream is rotated, and why."]
    kv_cache: Annotated[str | None, "Format and bytes of the KV cache; null where it stays in 16 bits."]
    seed: Annotated[int, "Seed."]
    estimate: NotRequired[Annotated[Estimate, "What it may take; on the command line."]]


class VerifyDocument(TypedDict):
    """What `hawqtool verify --json` found."""

    schema: Annotated[str, "`hawqtool.verify/1`."]
    problems: Annotated[list[str], "What is wrong; empty if all is well."]
    tensors: Annotated[int, "Tensors that were looked at."]


class PushDocument(TypedDict):
    """What was uploaded (`hawqtool push --json`)."""

    schema: Annotated[str, "`hawqtool.push/1`."]
    repository: Annotated[str, "Repository of the hub."]
    revision: Annotated[str, "Branch."]
    commit: Annotated[str, "Commit that holds the folder."]
    url: Annotated[str, "Page of the repository."]
    files: Annotated[int, "Files of the folder."]
    bytes: Annotated[int, "Bytes of these files."]


class ErrorDocument(TypedDict):
    """What a command with `--json` prints when it fails."""

    schema: Annotated[Literal["hawqtool.error/1"], "`hawqtool.error/1`."]
    error: Annotated[str, "What was found, what was expected, what to do next."]
    exit_code: Annotated[int, "Exit code of the command."]


class GgufQuality(TypedDict):
    """Original and file on the report rows."""

    original: Annotated[Quality, "The original."]
    quantized: Annotated[
        Quality, "The file, its weights dequantized in float32, on a GPU then rounded to the model's dtype."
    ]


class GgufMatrix(TypedDict):
    """Where a matrix of the original lies in the file."""

    tensor: Annotated[str, "Tensor that holds it."]
    first_row: Annotated[int, "Its first row there; others than 0 in experts."]
    rows: Annotated[list[int] | None, "Row of the original that each row is; null where they are in order."]
    transposed: Annotated[bool, "Whether the original stores it transposed."]
    weight_error: Annotated[float, "Squared error over squared weights."]


class GgufDocument(TypedDict):
    """Record of a GGUF file, printed and written beside it (FILE.gguf.json)."""

    schema: Annotated[str, "`hawqtool.gguf/1`."]
    model: Annotated[str, "Name of the original."]
    template: Annotated[str, "Name of the template's file."]
    output: Annotated[str, "Name of the file."]
    bytes: Annotated[int, "Its size."]
    sha256: Annotated[str, "SHA-256 of the file."]
    bpw: Annotated[float, "Stored bits per weight of the tensors that the plan is about."]
    num_weights: Annotated[int, "Their weights."]
    metric: Annotated[str | None, "Scores that chose the types; null where there was no choice."]
    predicted_loss: Annotated[float | None, "Sum of the chosen scores, nats per token."]
    types: Annotated[dict[str, str], "Type of every quantized tensor, embedding and output among them."]
    kept: Annotated[dict[str, str], "Why each other matrix stays as the template has it."]
    matrices: Annotated[dict[str, GgufMatrix], "Matrices of the original that were quantized, by their tensors' names."]
    output_error: Annotated[dict[str, float], "Squared error of a linear's outputs over their squares."]
    rounded_to_nearest: Annotated[list[str], "Linears that compensation made worse on held-out rows, and go without."]
    quality: Annotated[GgufQuality | None, "Judgement on held-out rows; null where nothing was evaluated."]
    search: Annotated[Search | None, "The search for the smallest file that meets `--target-kl`; null without one."]
    seconds: Annotated[float, "Time of the run."]
