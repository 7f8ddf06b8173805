"""Settings that say what comes out: model, output, budget and gates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from hawqtool.settings.metadata import GATES, MODEL, OUTPUT, TARGET, Affects, Setting

NEED_EVALUATION = (
    "target_kl", "max_kl", "max_kl_p99", "max_flips", "max_ppl_increase", "min_same_top", "baseline",
)  # fmt: skip
"""Settings that judge by what the evaluation measures."""


# fmt: off
class TargetFields(BaseModel):
    """Model, output, budget and gates."""

    model_config = ConfigDict(defer_build=True)  # help pages need no validators

    model: Annotated[str, Setting(
        help="Checkpoint: a folder (config.json and safetensors) or a hub id org/name[@revision].",
        detail="A relative path starts at the current folder; what a hub id names is fetched.",
        panel=MODEL, affects=Affects.MODEL, commands=("measure",), example="path/to/model",
    )] = Field(min_length=1)
    output: Annotated[str | None, Setting(
        help="Folder to create.", detail="It must not exist or must be empty.", panel=OUTPUT, affects=Affects.PLACE,
        metavar="DIR", flags=("--output", "-o"), example="path/to/output", in_batch="name",
    )] = Field(default=None, min_length=1)
    to: Annotated[Literal["compressed-tensors", "gguf"], Setting(
        help="compressed-tensors (a folder) or gguf (one file for llama.cpp, with --template).",
        detail="For gguf formats are block types, and the output is a file.", panel=OUTPUT, affects=Affects.FORMATS,
    )] = "compressed-tensors"
    template: Annotated[str | None, Setting(
        help="The model as llama.cpp's converter writes it (--outtype bf16), for --to gguf.",
        detail="Metadata, tokenizer and all that is not quantized are copied from it.", panel=OUTPUT,
        affects=Affects.FORMATS, metavar="FILE", names="file",
    )] = Field(default=None, min_length=1)
    tensor_types: Annotated[str | None, Setting(
        help="Write the types as the list that llama-quantize takes, for --to gguf.", panel=OUTPUT,
        affects=Affects.PLACE, metavar="FILE", expert=True,
    )] = Field(default=None, min_length=1)
    imatrix: Annotated[str | None, Setting(
        help="Write the importance matrix of the calibration rows as llama-quantize reads it, for --to gguf.",
        panel=OUTPUT, affects=Affects.PLACE, metavar="FILE", expert=True,
    )] = Field(default=None, min_length=1)
    base_model: Annotated[str | None, Setting(
        help="Hub id of the original for the model card, org/name.",
        default="that of a model fetched from a hub, else what its own card states", panel=OUTPUT,
        affects=Affects.PLACE, metavar="ORG/NAME",
    )] = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    overwrite: Annotated[bool, Setting(
        help="Replace a folder that hawqtool made.", detail="Its report.json says whether hawqtool did.",
        panel=OUTPUT, affects=Affects.PLACE, in_batch="--overwrite",
    )] = False
    restart: Annotated[bool, Setting(
        help="Discard an unfinished run into the same output; without this a rerun goes on with it.",
        detail="The result is equal to that of an undisturbed run. Where settings, versions or rows are others, a "
        "rerun is refused.", panel=OUTPUT, affects=Affects.PLACE, commands=("measure",),
        flags=("--restart/--resume",),
    )] = False

    target_bpw: Annotated[float | None, Setting(
        help="Stored bits per weight of the quantized linears, scales included.",
        panel=TARGET, affects=Affects.TARGET, commands=("allocate",), example=3.5,
    )] = Field(default=None, gt=0, le=64, allow_inf_nan=False)
    target_size: Annotated[str | None, Setting(
        help="Size of the weight files, such as 90MB or 3.2GiB.", detail="Headers count.",
        panel=TARGET, affects=Affects.TARGET, commands=("allocate",),
    )] = None
    target_kl: Annotated[float | None, Setting(
        help="Find the smallest size whose measured KL in nats per token (relative error for embedding models) is at "
        "most this; exit code 3 if none is.", detail="It holds on the selection rows; the report rows choose nothing.",
        panel=TARGET, affects=Affects.TARGET,
    )] = Field(default=None, gt=0, allow_inf_nan=False)
    plan: Annotated[str | None, Setting(
        help="A plan.json to carry out.", detail="It comes from hawqtool allocate, or is edited by hand.",
        panel=TARGET, affects=Affects.TARGET, metavar="FILE", names="file",
    )] = None
    costs: Annotated[str | None, Setting(
        help="A second cost, such as microseconds: a CSV or JSON file that has one for every unit and format, or "
        "hardware with the tokens of a step, such as hopper:64.", detail="Hardware: ampere, ada, hopper, blackwell.",
        panel=TARGET, expert=True, affects=Affects.PLAN, metavar="FILE|HARDWARE:TOKENS", names="file",
        commands=("allocate",),
    )] = None
    max_cost: Annotated[float | None, Setting(
        help="Most that the second costs may add up to.", detail="It is needed with costs.",
        panel=TARGET, expert=True, affects=Affects.PLAN, commands=("allocate",),
    )] = Field(default=None, ge=0, allow_inf_nan=False)

    max_active: Annotated[str | None, Setting(
        help="Most bytes of quantized weights that one token reads, such as 1.2GB: of routed experts the share that a "
        "token is routed to.", detail="A second budget beside the target, for mixtures of experts, in place of costs.",
        panel=TARGET, expert=True, affects=Affects.PLAN, metavar="SIZE",
    )] = None

    max_kl: Annotated[float | None, Setting(
        help="Most KL to the original on the report rows, in nats per token (relative error for embedding models).",
        panel=GATES, affects=Affects.GATES,
    )] = Field(default=None, gt=0, allow_inf_nan=False)
    max_ppl_increase: Annotated[float | None, Setting(
        help="Most that perplexity may rise over the original's: 5% or 0.05.",
        panel=GATES, affects=Affects.GATES, metavar="SHARE", as_text=True,
    )] = Field(default=None, ge=0, allow_inf_nan=False)
    min_same_top: Annotated[float | None, Setting(
        help="Least share of outputs whose likeliest token (or class) is the original's: 90% or 0.9.",
        panel=GATES, affects=Affects.GATES, metavar="SHARE", as_text=True,
    )] = Field(default=None, ge=0, le=1)
    max_kl_p99: Annotated[float | None, Setting(
        help="Most KL of the worst hundredth of the outputs of the report rows: the value at which it begins.",
        detail="Long texts and tool calls break at their worst token first.",
        panel=GATES, expert=True, affects=Affects.GATES,
    )] = Field(default=None, gt=0, allow_inf_nan=False)
    max_flips: Annotated[float | None, Setting(
        help="Most changed likeliest tokens (or classes) among those that the original gives 90 % or more: 1% or 0.01.",
        panel=GATES, expert=True, affects=Affects.GATES, metavar="SHARE", as_text=True,
    )] = Field(default=None, ge=0, le=1)
    max_task_drop: Annotated[float | None, Setting(
        help="Most that the accuracy on any of the tasks may fall, in points: 2% or 0.02.",
        detail="It is needed with tasks.", panel=GATES, expert=True, affects=Affects.GATES, metavar="SHARE",
        as_text=True,
    )] = Field(default=None, ge=0, le=1)
    max_size: Annotated[str | None, Setting(
        help="Most bytes of the weight files, such as 90MB or 3.2GiB.",
        panel=GATES, affects=Affects.GATES, metavar="SIZE",
    )] = None
    max_fallbacks: Annotated[int | None, Setting(
        help="Most layers that may need a fallback: experts that too few calibration tokens reach.",
        panel=GATES, expert=True, affects=Affects.GATES,
    )] = Field(default=None, ge=0)
    max_kept: Annotated[float | None, Setting(
        help="Most of the weights that may stay as they are beside embeddings and head: 5% or 0.05. Known before the "
        "work, so that exit code 2 says it.",
        panel=GATES, expert=True, affects=Affects.GATES, metavar="SHARE", as_text=True,
    )] = Field(default=None, ge=0, le=1)
    baseline: Annotated[str | None, Setting(
        help="report.json of an earlier run on the same report rows; needs --max-regression.",
        panel=GATES, expert=True, affects=Affects.GATES, metavar="FILE", names="file",
    )] = Field(default=None, min_length=1)
    max_regression: Annotated[float | None, Setting(
        help="Most that KL, perplexity and size may each rise over the baseline's: 5% or 0.05.",
        detail="It is needed with baseline.", panel=GATES, expert=True,
        affects=Affects.GATES, metavar="SHARE", as_text=True,
    )] = Field(default=None, ge=0, allow_inf_nan=False)
