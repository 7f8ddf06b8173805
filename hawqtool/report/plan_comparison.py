"""Types of what a report says of models and plans: quality, accuracy on tasks, every plan beside the original."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

Measure = Literal["kl", "embedding_error"]
Shipped = Literal["mixed", "uniform"]


class Divergence(TypedDict):
    """Divergence from the original, or the paired difference of two such on the same rows."""

    kl: NotRequired[Annotated[float, "Mean KL divergence, nats per output; models with logits."]]
    kl_stderr: NotRequired[Annotated[float, "Standard error of `kl` over rows."]]
    embedding_error: NotRequired[Annotated[float, "Squared error of the embedding over its square; encoders."]]
    embedding_error_stderr: NotRequired[Annotated[float, "Standard error of `embedding_error` over rows."]]


class Quality(Divergence):
    """Quality of one model on a set of rows, against the original."""

    num_tokens: Annotated[int, "Positions of all rows."]
    perplexity: NotRequired[Annotated[float, "Perplexity of the next token; language models, if finite."]]
    same_top: NotRequired[Annotated[float, "Share of outputs whose likeliest class is the original's; logits."]]
    cosine: NotRequired[Annotated[float, "Mean cosine to the original's embedding; encoders."]]
    kl_p99: NotRequired[Annotated[float, "KL that one output of a hundred reaches; logits."]]
    kl_p999: NotRequired[Annotated[float, "KL that one output of a thousand reaches; logits."]]
    flips: NotRequired[
        Annotated[float, "Share of another likeliest class where the original gives its own 90 % or more; logits."]
    ]


class TaskResult(TypedDict):
    """Accuracy on one multiple-choice task; a choice is taken by its log-probability after the input."""

    name: Annotated[str, "Name of the file."]
    questions: Annotated[int, "Questions."]
    original: Annotated[float, "Accuracy of the original."]
    original_stderr: Annotated[float, "Standard error over questions."]
    quantized: Annotated[float, "Accuracy of the quantized model."]
    quantized_stderr: Annotated[float, "Standard error over questions."]
    difference: Annotated[float, "Quantized less original."]
    difference_stderr: Annotated[float, "Its standard error, paired by question."]
    same: Annotated[float, "Share of questions to which both give the same answer, right or wrong."]


class PlanSize(TypedDict):
    """What a plan stores."""

    formats: Annotated[list[str], "Labels of the formats that the plan uses, such as `w4g32`."]
    stored_bytes: Annotated[int, "Bytes of codes, scales and zero points of the linears."]
    bpw_linears: Annotated[float, "Stored bits per weight of the linears."]


class PlanQuality(Quality, PlanSize):
    """A plan that was rounded, written and evaluated; the figures are those of the report rows."""

    total_bytes: Annotated[int, "Bytes of all weight files."]
    rounding_seconds: Annotated[float, "Seconds that rounding and writing took."]
    selection: NotRequired[
        Annotated[Quality, "Quality on the selection rows, which plans are chosen by; where any is."]
    ]
    predicted: Annotated[dict[str, float], "Predicted loss by metric, where all scores are known."]
    chosen_by: NotRequired[Annotated[str, "Name of the plan among `tried`; of `mixed` only."]]
    minus_uniform: NotRequired[Annotated[dict[str, Divergence], "Difference to uniform by set of rows; of `tried`."]]
    predicted_loss: NotRequired[Annotated[float | None, "Predicted loss in the scores that made it; of `tried`."]]


class SourceDifference(TypedDict):
    """A difference of two plans."""

    difference: Annotated[float, "Mean difference in divergence."]
    stderr: Annotated[float, "Its paired standard error."]


class SelectionDifference(TypedDict):
    """The best mixed plan less the uniform one on the selection rows; layerwise where that decided."""

    mixed_minus_uniform: Annotated[float, "Mean difference in divergence, each source of rows counting alike."]
    stderr: Annotated[float, "Its paired standard error."]
    errors_needed: Annotated[
        float | None,
        "Standard errors, `stderr` and `draw_stderr` taken together, by which the mixed plan must be better to be "
        "shipped; null: no number is enough.",
    ]
    draw_stderr: Annotated[float, "Standard error by the draw of calibration rows: 4 % of uniform's divergence."]
    plans: Annotated[int, "Mixed plans that were tried, for which that number is corrected (Holm)."]
    by_source: Annotated[dict[str, SourceDifference], "The difference on the rows of each source."]


class SwapAttempt(TypedDict):
    """A plan that swaps by gradient tried, put together of roundings that lay ready."""

    round: Annotated[int, "Round, from 1; each takes one gradient, at the plan that the last one led to."]
    share: Annotated[float, "Most of the stored bytes that might move."]
    moves: Annotated[int, "Units with another format than in the round's plan."]
    stored_bytes: Annotated[int, "Bytes of codes, scales and zero points of the linears."]
    predicted: Annotated[float, "Predicted change of the divergence."]
    predicted_stderr: Annotated[float, "Its standard error over the scoring rows."]
    measured: Annotated[float, "Measured change on the selection rows."]
    measured_stderr: Annotated[float, "Its paired standard error."]
    accepted: Annotated[bool, "Whether the next round went on from it."]


class Measured(TypedDict):
    """What models are compared by, and the original's own quality."""

    measure: Annotated[Measure, "What the divergence is: `kl` or `embedding_error`."]
    original: Annotated[Quality, "The original model."]


class UnroundedRival(PlanSize):
    """A plan that was not carried out, for its predicted loss or a layerwise comparison was proof enough."""

    ratio: NotRequired[Annotated[float, "Its predicted loss relative to the mixed plan's; nothing was measured."]]
    minus_shipped: NotRequired[
        Annotated[SourceDifference, "Less the shipped plan on the selection rows, layers of both rounded one by one."]
    ]


class PlanComparison(Measured):
    """Every plan that was tried, beside the original."""

    mixed: Annotated[PlanQuality, "The best mixed plan."]
    uniform: Annotated[PlanQuality | None, "The largest uniform plan within the budget."]
    tried: Annotated[dict[str, PlanQuality], "All mixed plans by name."]
    not_rounded: NotRequired[Annotated[dict[str, UnroundedRival], "Rivals that were not carried out, by name."]]
    mixed_minus_uniform: NotRequired[Annotated[Divergence, "Difference of the two on the report rows."]]
    selection: NotRequired[Annotated[SelectionDifference, "Difference of the two on the selection rows."]]
    swaps: NotRequired[Annotated[list[SwapAttempt], "Plans that swaps by gradient tried, in order."]]


def shipped_of(evaluation: PlanComparison, shipped: Shipped) -> PlanQuality:
    """The record of the plan that was written."""
    found = evaluation[shipped]
    assert found is not None  # only what was tried is shipped
    return found
