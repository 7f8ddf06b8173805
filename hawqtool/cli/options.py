"""The one source of the command line's options; names equal the keys of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

MODEL, TARGET, CALIBRATION, METHOD, OUTPUT, RUN = "Model", "Target", "Calibration", "Method", "Output", "Run"
GATES = "Gates (they judge the result; exit code 3 if it fails one, and the output is kept)"


def _option(*names: str, help: str, panel: str, metavar: str | None = None) -> object:
    # Square brackets are markup to the help page, which would swallow "[default: 128]".
    return typer.Option(
        *names, help=help.replace("[", "\\["), rich_help_panel=panel, metavar=metavar, show_default=False
    )


Model = Annotated[
    Optional[str],
    typer.Argument(
        help="Checkpoint: a folder (config.json and safetensors) or a hub id org/name[@revision].", show_default=False
    ),
]
Output = Annotated[Optional[str], _option("--output", "-o", help="Folder to create.", panel=OUTPUT, metavar="DIR")]
Overwrite = Annotated[Optional[bool], _option("--overwrite", help="Replace a folder that hawqtool made.", panel=OUTPUT)]
Resume = Annotated[
    Optional[bool],
    _option("--resume", help="Go on with an unfinished run into the same output, if there is one.", panel=OUTPUT),
]
TargetBpw = Annotated[
    Optional[float],
    _option("--target-bpw", help="Stored bits per weight of the quantized linears, scales included.", panel=TARGET),
]
TargetSize = Annotated[
    Optional[str], _option("--target-size", help="Size of the weight files, such as 90MB or 3.2GiB.", panel=TARGET)
]
TargetKl = Annotated[
    Optional[float],
    _option(
        "--target-kl",
        help="Find the smallest size whose measured KL in nats per token (relative error for embedding models) is at "
        "most this; exit code 3 if none is.",
        panel=TARGET,
    ),
]
Plan = Annotated[Optional[str], _option("--plan", help="A plan.json to carry out.", panel=TARGET, metavar="FILE")]
Costs = Annotated[
    Optional[str],
    _option("--costs", help="CSV or JSON of a second cost, such as microseconds.", panel=TARGET, metavar="FILE"),
]
MaxCost = Annotated[
    Optional[float], _option("--max-cost", help="Most that the second costs may add up to.", panel=TARGET)
]
MaxKl = Annotated[
    Optional[float],
    _option(
        "--max-kl",
        help="Most KL to the original on the report rows, in nats per token (relative error for embedding models).",
        panel=GATES,
    ),
]
MaxPplIncrease = Annotated[
    Optional[str],
    _option(
        "--max-ppl-increase",
        help="Most that perplexity may rise over the original's: 5% or 0.05.",
        panel=GATES,
        metavar="SHARE",
    ),
]
MinSameTop = Annotated[
    Optional[str],
    _option(
        "--min-same-top",
        help="Least share of outputs whose likeliest token (or class) is the original's: 90% or 0.9.",
        panel=GATES,
        metavar="SHARE",
    ),
]
MaxSize = Annotated[
    Optional[str],
    _option("--max-size", help="Most bytes of the weight files, such as 90MB or 3.2GiB.", panel=GATES, metavar="SIZE"),
]
MaxFallbacks = Annotated[
    Optional[int],
    _option(
        "--max-fallbacks",
        help="Most layers that may need a fallback: experts that too few calibration tokens reach.",
        panel=GATES,
    ),
]
Baseline = Annotated[
    Optional[str],
    _option(
        "--baseline",
        help="report.json of an earlier run on the same report rows; needs --max-regression.",
        panel=GATES,
        metavar="FILE",
    ),
]
MaxRegression = Annotated[
    Optional[str],
    _option(
        "--max-regression",
        help="Most that KL, perplexity and size may each rise over the baseline's: 5% or 0.05.",
        panel=GATES,
        metavar="SHARE",
    ),
]
Bits = Annotated[
    Optional[str],
    _option(
        "--bits", help="Widths to choose from [default: 4,8 where the target allows it, else 2,3,4,8].", panel=TARGET
    ),
]
GroupSize = Annotated[
    Optional[str],
    _option(
        "--group-size",
        help="Inputs per scale: 128, 64, 32 or channel, with --profile transformers any multiple of 16; falls to the "
        "largest smaller one of these that divides a layer [default: 128].",
        panel=TARGET,
    ),
]
ExtraGroupSizes = Annotated[
    Optional[str],
    _option("--extra-group-sizes", help="Further ones that a plan may give to units: 32,channel.", panel=TARGET),
]
Symmetric = Annotated[
    Optional[bool],
    _option(
        "--symmetric/--asymmetric",
        help="Grids without or with zero points; asymmetric needs --profile vllm [default: symmetric].",
        panel=TARGET,
    ),
]
Profile = Annotated[
    Optional[str],
    _option(
        "--profile",
        help="auto, portable (4 and 8 bit, positive scales), vllm, transformers (q, k, v apart) [default: auto].",
        panel=TARGET,
    ),
]
Pin = Annotated[
    Optional[list[str]],
    _option(
        "--pin",
        help="Fix a width: 're:.*down_proj=8' or a layer's name; repeatable.",
        panel=TARGET,
        metavar="NAME=BITS",
    ),
]
Ignore = Annotated[
    Optional[list[str]],
    _option("--ignore", help="Layers to leave as they are; repeatable.", panel=TARGET, metavar="NAME"),
]
QuantizeLmHead = Annotated[
    Optional[bool],
    _option(
        "--quantize-lm-head", help="Quantize the output head too, where it is not tied to the embedding.", panel=TARGET
    ),
]
Calibration = Annotated[
    Optional[list[str]],
    _option(
        "--calibration",
        help="Text, .jsonl or .parquet file, folder of them, hub dataset NAME[:CONFIG][:SPLIT][@REVISION], or self: "
        "rows sampled from the model; repeatable, SOURCE=2 gives twice the rows [default: self].",
        panel=CALIBRATION,
        metavar="SOURCE[=WEIGHT]",
    ),
]
NumSamples = Annotated[
    Optional[int], _option("--num-samples", help="Calibration rows [default: 128, on a CPU 16].", panel=CALIBRATION)
]
SeqLen = Annotated[
    Optional[int], _option("--seq-len", help="Tokens per row [default: 2048, on a CPU 256].", panel=CALIBRATION)
]
EvalData = Annotated[
    Optional[str],
    _option(
        "--eval-data",
        help="Text to evaluate on, of any kind but self [default: further rows of the calibration sources].",
        panel=CALIBRATION,
        metavar="SOURCE",
    ),
]
EvalSamples = Annotated[
    Optional[int], _option("--eval-samples", help="Evaluation rows [default: 32].", panel=CALIBRATION)
]
Sensitivity = Annotated[
    Optional[str],
    _option(
        "--sensitivity",
        help="auto (fisher for rtn, else projection), fisher, kron, projection, "
        "hawq-ggn, hawq, kl, or a saved sensitivity.json [default: auto].",
        panel=METHOD,
    ),
]
MeasuredMetric = Annotated[
    Optional[str],
    _option("--sensitivity", help="fisher, kron, projection or hawq-ggn alone [default: all four].", panel=METHOD),
]
Measurements = Annotated[
    Optional[str],
    _option(
        "--measurements",
        help="Folder of measurements that runs share: taken from it where one of the same model, rows and settings is "
        "there, else measured (in all widths that any budget may use) and kept [default: none].",
        panel=METHOD,
        metavar="DIR",
    ),
]
Shortlist = Annotated[
    Optional[int],
    _option(
        "--shortlist",
        help="Mixed plans to round and evaluate, the metric's own among them; the best on the selection rows competes "
        "with uniform [default: 4, on a CPU 2].",
        panel=METHOD,
    ),
]
Swaps = Annotated[
    Optional[int],
    _option(
        "--swaps",
        help="Rounds that improve the best mixed plan: the divergence of moving every unit one width up or down is "
        "measured at the plan, and the best moves are taken, each round from the last one's plan and measurements; the "
        "best of all is kept; holds the whole model on the device "
        "[default: 2, on a CPU 0].",
        panel=METHOD,
        metavar="ROUNDS",
    ),
]
ExtraMetrics = Annotated[
    Optional[str],
    _option(
        "--extra-metrics",
        help="Scores to measure beside the four cheap ones: hawq (true Hessian), kl (measured, one unit at a time; "
        "holds the whole model on the device) [default: none].",
        panel=METHOD,
        metavar="NAMES",
    ),
]
Probes = Annotated[
    Optional[int], _option("--probes", help="Random probes per row of a Hessian's trace [default: 4].", panel=METHOD)
]
Eigenvalues = Annotated[
    Optional[int],
    _option(
        "--eigenvalues",
        help="Lanczos iterations for the top Hessian eigenvalue of each unit; slow [default: 0, none].",
        panel=METHOD,
        metavar="ITERATIONS",
    ),
]
Solver = Annotated[
    Optional[str],
    _option(
        "--solver",
        help="hull (the frontier, fast at any size), exact (HiGHS, optimum to 1e-4), auto (exact up to 500 units, "
        "or with --costs) [default: auto].",
        panel=METHOD,
    ),
]
Rounding = Annotated[
    Optional[str], _option("--rounding", help="rtn, gptq, foem or gptaq [default: gptq].", panel=METHOD)
]
FoemBeta = Annotated[
    Optional[str],
    _option(
        "--foem-beta",
        help="FOEM's pull towards the original weights, or auto: by held-out rows, layer by layer [default: 0.1].",
        panel=METHOD,
        metavar="FLOAT|auto",
    ),
]
GptaqAlpha = Annotated[
    Optional[float],
    _option("--gptaq-alpha", help="GPTAQ's share of the correction for rounded inputs [default: 0.25].", panel=METHOD),
]
TargetShift = Annotated[
    Optional[str],
    _option(
        "--target-shift",
        help="Share of each weight's shift towards the original output on rounded inputs: auto (by held-out rows, "
        "layer by layer), a number from 0 to 1, or off [default: off].",
        panel=METHOD,
        metavar="auto|FLOAT|off",
    ),
]
ScaleRefit = Annotated[
    Optional[bool],
    _option("--scale-refit", help="Refit scales after rounding where held-out rows gain by it.", panel=METHOD),
]
TokenImportance = Annotated[
    Optional[str],
    _option(
        "--token-importance",
        help="gradient: tokens count in rounding by the loss's gradient; none: all alike [default: gradient; none for "
        "rtn].",
        panel=METHOD,
    ),
]
Damping = Annotated[
    Optional[float],
    _option(
        "--damping", help="Fraction of the mean diagonal [default: 0.05, 0.2 below 8 tokens per column].", panel=METHOD
    ),
]
RefineSteps = Annotated[
    Optional[int],
    _option(
        "--refine-steps",
        help="Learn rounding, scales and norm gains of every block in so many steps after rounding it [default: 0].",
        panel=METHOD,
    ),
]
SensitivitySteps = Annotated[
    Optional[int],
    _option(
        "--sensitivity-steps",
        help="Learn the rounding of every block and width in so many steps before scoring it, for plans that are "
        "carried out with --refine-steps [default: 0].",
        panel=METHOD,
    ),
]
DistillSteps = Annotated[
    Optional[int],
    _option(
        "--distill-steps",
        help="Learn scales and norm gains of the whole rounded model in so many steps, on its divergence from the "
        "original [default: 0].",
        panel=METHOD,
    ),
]
DistillCodes = Annotated[
    Optional[bool],
    _option(
        "--distill-codes",
        help="Let distillation move codes too, by two at most; takes 28 bytes of the device's memory per weight.",
        panel=METHOD,
    ),
]
ScaleSign = Annotated[
    Optional[str], _option("--scale-sign", help="both or positive [default: by profile].", panel=METHOD)
]
Device = Annotated[Optional[str], _option("--device", help="auto, cpu or cuda [default: auto].", panel=RUN)]
BatchSize = Annotated[
    Optional[int],
    _option(
        "--batch-size",
        help="Rows per forward pass; lower it when memory is short [default: the most of 128, 64 and 32 that fit into "
        "--max-memory, on a CPU 16].",
        panel=RUN,
    ),
]
MaxMemory = Annotated[
    Optional[str],
    _option(
        "--max-memory",
        help="Memory to use, such as 12GiB: hidden states that do not fit beside the work lie in the host's memory "
        "(beside a GPU), then on the disk, but for refinement, distillation, swaps and kl; changes no result "
        "but through the default of --batch-size [default: auto, 90 % of a GPU; on a CPU no limit].",
        panel=RUN,
        metavar="SIZE",
    ),
]
Seed = Annotated[Optional[int], _option("--seed", help="Seed of rows and sampled labels [default: 0].", panel=RUN)]
TrustRemoteCode = Annotated[
    Optional[bool],
    _option("--trust-remote-code", help="Execute code that the checkpoint brings along; read it first.", panel=RUN),
]
Config = Annotated[
    Optional[Path], _option("--config", "-c", help="YAML file; flags win over it.", panel=RUN, metavar="FILE")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show what would be done, from headers alone; write nothing.", rich_help_panel=RUN),
]
Junit = Annotated[
    Optional[Path],
    typer.Option(
        "--junit",
        help="Write a JUnit report: a test case for the run and one per gate; also when the run fails.",
        rich_help_panel=RUN,
        metavar="FILE",
        show_default=False,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout, also for a failure.", rich_help_panel=RUN)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No narration and no progress.", rich_help_panel=RUN)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of expected errors.", rich_help_panel=RUN)]
