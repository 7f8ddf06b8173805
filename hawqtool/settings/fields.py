"""Every setting of a run, each with all that is said of it; `hawqtool.config` has the rules between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from hawqtool.settings.metadata import CALIBRATION, FORMATS, METHOD, RUN, Affects, ByDevice, Setting
from hawqtool.settings.targets import TargetFields

SELF = "self"
"""Calibration source: rows sampled from the model."""


# fmt: off
class Fields(TargetFields):
    """Each field is a flag of the same name and a key in YAML: those of `TargetFields`, then how it is done."""

    model_config = ConfigDict(defer_build=True)  # help pages need no validators

    bits: Annotated[tuple[int, ...] | None, Setting(
        help="Widths to choose from, from 2 to 8; one alone is a target too: uniform at that width.",
        default="4,8 where the target allows it, else 2,3,4,8",
        detail="Profile portable takes 4 and 8 only.",
        panel=FORMATS, affects=Affects.FORMATS, as_text=True, commands=("measure", "allocate"),
    )] = None
    group_size: Annotated[int | None, Setting(
        help="Inputs per scale: 128, 64, 32 or channel, with --profile transformers any multiple of 16; falls to the "
        "largest smaller one of these that divides a layer.",
        default="all that engines load, the plan chooses; 128 for one width and for pins",
        detail="Channel is the whole row. The run says where it falls.",
        panel=FORMATS, affects=Affects.FORMATS, as_text=True, commands=("measure", "allocate", "inspect"),
    )] = None
    extra_group_sizes: Annotated[tuple[int, ...], Setting(
        help="Further ones that a plan may give to units, beside --group-size: 32,channel.",
        detail="They give a finer choice of sizes between two widths, for more measuring. Pins keep to group_size.",
        panel=FORMATS, expert=True,
        affects=Affects.FORMATS, as_text=True, commands=("measure", "allocate"),
    )] = ()
    formats: Annotated[tuple[str, ...] | None, Setting(
        help="The menu, label by label, in place of --bits and --group-size: w2g32,w3g64,w4ch; w4 alone is 4 bits in "
        "every group size that engines load; fp8-a8f, w8ch-a8i, nvfp4 and others are floats or round inputs too; 16 "
        "leaves a unit as it is; hopper, blackwell, ampere, cpu and transformers are menus.",
        default="by bits and group_size",
        detail="Labels are those that reports print; w4g64a has zero points and needs --asymmetric. One label without "
        "a target is a uniform plan.",
        panel=FORMATS, affects=Affects.FORMATS, metavar="LABELS", as_text=True, commands=("measure", "allocate"),
    )] = None
    symmetric: Annotated[bool, Setting(
        help="Grids without or with zero points; asymmetric needs --profile vllm.", default="symmetric",
        detail="Symmetric is scale * code. Asymmetric is scale * (code - zero): smaller errors for one zero point more "
        "per scale. Profile transformers takes it too, for transformers 5.17.", panel=FORMATS, affects=Affects.FORMATS,
        flags=("--symmetric/--asymmetric",), commands=("measure",),
    )] = True
    profile: Annotated[Literal["auto", "portable", "vllm", "transformers"], Setting(
        help="auto, portable (4 and 8 bit, positive scales), vllm, transformers (q, k, v apart).",
        detail="It says where the result shall load. Serving engines fuse q, k, v and gate, up, which then share a "
        "format; transformers does not.",
        panel=FORMATS, affects=Affects.FORMATS, commands=("measure", "allocate"),
    )] = "auto"
    scale_sign: Annotated[Literal["auto", "both", "positive"], Setting(
        help="both (a little more exact) or positive.", default="by profile",
        detail="Asymmetric grids have positive scales.",
        panel=FORMATS, expert=True, affects=Affects.FORMATS, commands=("measure",),
    )] = "auto"
    pin: Annotated[tuple[str, ...], Setting(
        help="Fix a width: 're:.*down_proj=8' or a layer's name; repeatable.",
        detail="A pin on one of a fused set (q, k, v or gate, up) pins the set.", panel=FORMATS,
        affects=Affects.FORMATS, metavar="NAME=BITS", commands=("measure", "allocate"),
    )] = ()
    ignore: Annotated[tuple[str, ...], Setting(
        help="Layers to leave as they are; repeatable.", detail="Names, or patterns that begin with re:.",
        panel=FORMATS, affects=Affects.FORMATS, metavar="NAME", commands=("measure", "allocate"),
    )] = ()
    block_types: Annotated[tuple[str, ...], Setting(
        help="Types to choose from with --to gguf: Q3_K,Q4_K,Q6_K; one alone needs no target.",
        default="Q2_K to Q8_0 and IQ4_XS, for rows that no 256 divides IQ4_NL to Q8_0",
        detail="Types whose blocks do not divide a tensor's rows are left out there.",
        panel=FORMATS, affects=Affects.FORMATS, as_text=True,
    )] = ()
    embedding_type: Annotated[str, Setting(
        help="Type of embedding and output with --to gguf, auto or keep.",
        detail="Auto chooses by what they lose; without a target it is Q6_K, or Q8_0 where no 256 divides the rows. "
        "Keep leaves them as the template has them.",
        panel=FORMATS, affects=Affects.FORMATS, metavar="TYPE", expert=True,
    )] = "auto"
    embedding_bits: Annotated[int | None, Setting(
        help="Bits of the token embedding, and of a head that is tied to it: 16 leaves it as it is; 8 stores a byte a "
        "number and a scale a row, which transformers alone loads (--profile transformers).",
        default="8 with --target-size and --profile transformers, else 16",
        detail="Under a target size the bytes go to the linears: of small models the table is half of the file.",
        panel=FORMATS, affects=Affects.FORMATS,
    )] = None
    kv_cache: Annotated[Literal["none", "fp8", "fp8-head"], Setting(
        help="Scales for the engine's KV cache: fp8 stores keys and values in 8-bit floats, one scale a layer for "
        "each; fp8-head has one a head; none leaves it in 16 bits.",
        detail="They are calibrated on the rows of calibration. vLLM then caches so by itself; transformers rounds by "
        "them, in 16 bits. Half the memory a token.", panel=FORMATS, affects=Affects.WEIGHTS,
    )] = "none"
    quantize_lm_head: Annotated[bool, Setting(
        help="Quantize the output head too, where it is not tied to the embedding.",
        panel=FORMATS, affects=Affects.FORMATS, commands=("measure",),
    )] = False

    quantize_vision: Annotated[bool, Setting(
        help="Quantize the vision tower of a multimodal model too; rows are images with captions.",
        panel=FORMATS, affects=Affects.FORMATS, commands=("measure",),
    )] = False

    calibration: Annotated[tuple[str, ...], Setting(
        help="Text, .jsonl or .parquet file, folder of them, hub dataset NAME[:CONFIG][:SPLIT][@REVISION], or self: "
        "rows sampled from the model; repeatable, SOURCE=2 gives twice the rows.",
        detail="Records of .jsonl and .parquet files hold text, messages or input_ids.",
        panel=CALIBRATION, affects=Affects.ROWS, metavar="SOURCE[=WEIGHT]", names="source",
        commands=("measure", "inspect"),
    )] = (SELF,)
    sampled_share: Annotated[float | None, Setting(
        help="Share of the calibration rows that the model itself writes, beside the texts of --calibration; 0: none.",
        default="0.5 on a GPU where the whole model fits into its memory, else 0",
        detail="No text has all that the model will meet, and what a text lacks is rounded worst: beside web text code "
        "and manuals lose a quarter to a half of their divergence by it. A lower share keeps closer to the texts.",
        panel=CALIBRATION, affects=Affects.ROWS, metavar="SHARE", commands=("measure", "inspect"),
    )] = Field(default=None, ge=0, lt=1)
    num_samples: Annotated[int | None, Setting(
        help="Calibration rows.", by_device=ByDevice(cuda=128, cpu=16),
        panel=CALIBRATION, affects=Affects.ROWS, commands=("measure", "inspect"),
    )] = Field(default=None, ge=1)
    seq_len: Annotated[int | None, Setting(
        help="Tokens per row.", by_device=ByDevice(cuda=2048, cpu=256),
        panel=CALIBRATION, affects=Affects.ROWS, commands=("measure", "evaluate", "inspect"),
    )] = Field(default=None, ge=8)
    eval_data: Annotated[str | None, Setting(
        help="Text to evaluate on, of any kind but self.", default="further rows of the calibration sources",
        detail="The report calls further rows of the calibration sources in-domain.", panel=CALIBRATION,
        affects=Affects.ROWS, metavar="SOURCE", names="source",
    )] = None
    tasks: Annotated[tuple[str, ...], Setting(
        help="Multiple-choice questions that original and result are asked: .jsonl file of input, choices, answer "
        "(the index); repeatable.", detail="Accuracies and their paired difference are in the report.",
        panel=CALIBRATION, affects=Affects.GATES, metavar="FILE", names="source", commands=("evaluate",),
    )] = ()
    eval_samples: Annotated[int | None, Setting(
        help="Evaluation rows: more give surer figures and take longer.",
        default="as many as calibration rows, from 8 to 32; of evaluate 32",
        detail="There are fewer where the text is shorter.", panel=CALIBRATION, affects=Affects.ROWS,
        commands=("evaluate",),
    )] = Field(default=None, ge=2)
    selection_samples: Annotated[int | None, Setting(
        help="Rows that choose between the plans that are tried: more resolve smaller differences.",
        by_device=ByDevice(cuda=64, cpu=32), detail="They have at most 256 tokens, and each source gives as many. "
        "32 rows resolve 3 to 5 % of the divergence, 2 % takes 64 and more.", panel=CALIBRATION, expert=True,
        affects=Affects.ROWS,
    )] = Field(default=None, ge=2)
    selection_data: Annotated[tuple[str, ...], Setting(
        help="Where these rows come from; repeatable. Sources as for --calibration, self among them.",
        default="the calibration sources; beside a single text also self, where the model fits into memory",
        detail="What one text gains another must not lose. Rows of a calibration source are further ones.",
        panel=CALIBRATION, expert=True, affects=Affects.ROWS, metavar="SOURCE", names="source",
    )] = ()
    eval: Annotated[bool | None, Setting(
        help="Judge the result on held-out rows, or leave that out: then the first plan is shipped as it is.",
        default="on, but for one width with --rounding rtn and no flag of data: that reads no data",
        detail="Without it nothing is known of the quality, and gates of quality, target_kl, shortlist and swaps "
        "have nothing to go by.", panel=CALIBRATION, affects=Affects.PLAN, flags=("--eval/--no-eval",),
    )] = None

    sensitivity: Annotated[str, Setting(
        help="auto (fisher for rtn, else projection), fisher, kron, projection, hawq-ggn, hawq, kl, or a saved "
        "sensitivity.json.", detail="Allocation compares these scores.",
        panel=METHOD, affects=Affects.METRICS, names="file",
    )] = "auto"
    measurements: Annotated[str | None, Setting(
        help="Folder of measurements that runs share: taken from it where one of the same model, rows and settings is "
        "there, else measured (in all widths that any budget may use) and kept.", default="none", panel=METHOD,
        expert=True, affects=Affects.PLACE, metavar="DIR", commands=("measure",), in_batch="measurements at the top",
    )] = Field(default=None, min_length=1)
    shortlist: Annotated[int | None, Setting(
        help="Mixed plans to compare: the metric's own, the rule that people use, then those of other metrics; the "
        "best on the selection rows competes with uniform.", by_device=ByDevice(cuda=2, cpu=2),
        detail="1 is the metric's own alone, which takes the fewest roundings.",
        panel=METHOD, expert=True, affects=Affects.PLAN,
    )] = Field(default=None, ge=1)
    proof: Annotated[Literal["full", "layerwise", "predicted"] | None, Setting(
        help="full: uniform and the rule that people use are carried out too; layerwise: all plans are measured with "
        "layers rounded one by one, and a mixed one that is better for sure is carried out alone; predicted: "
        "as full, without those far above.",
        default="layerwise on a GPU, unless it learns, swaps or has no budget; else full",
        detail="The report says what was compared how. Layerwise leaves out output feedback, and corrections of one "
        "layer by another, alike in all plans.", panel=METHOD, expert=True, affects=Affects.PLAN,
    )] = None
    swaps: Annotated[int | None, Setting(
        help="Rounds that improve the best mixed plan: the divergence of moving every unit one width up or down is "
        "measured at the plan, and the best moves are taken, each round from the last one's plan and measurements; the "
        "best of all is kept; holds the whole model on the device, but with --swap-scores gradient.",
        by_device=ByDevice(cuda=0, cpu=0), detail="With target_kl or max_cost there are none.", panel=METHOD,
        expert=True, affects=Affects.PLAN, metavar="ROUNDS",
    )] = Field(default=None, ge=0)
    swap_scores: Annotated[Literal["measured", "gradient"], Setting(
        help="What --swaps goes by: measured (each unit in each format run alone), or gradient (one reverse sweep at "
        "the plan for all units; many moves at a time, each round judged by the real divergence, one block on the "
        "device at a time).", panel=METHOD, expert=True, affects=Affects.PLAN,
    )] = "measured"
    extra_metrics: Annotated[tuple[str, ...], Setting(
        help="Scores to measure beside the four cheap ones: hawq (true Hessian), kl (measured, one unit at a time; "
        "holds the whole model on the device).", default="none",
        detail="hawq takes sweeps of its own, kl a part of a forward pass per unit and format.",
        panel=METHOD, expert=True, affects=Affects.METRICS, metavar="NAMES", as_text=True, commands=("measure",),
    )] = ()
    probes: Annotated[int, Setting(
        help="Random probes per row of a Hessian's trace.", detail="They estimate the traces of hawq.",
        panel=METHOD, expert=True, affects=Affects.SCORES, commands=("measure",),
    )] = Field(default=4, ge=1)
    eigenvalues: Annotated[int, Setting(
        help="Lanczos iterations for the top Hessian eigenvalue of each unit; slow.", default="0, none",
        panel=METHOD, expert=True, affects=Affects.SCORES, metavar="ITERATIONS", commands=("measure",),
    )] = Field(default=0, ge=0)
    solver: Annotated[Literal["auto", "hull", "exact"], Setting(
        help="hull (the frontier, fast at any size), exact (HiGHS, optimum to 1e-4), auto (exact up to 500 units, "
        "or with --costs).", detail="exact stops after 60 s.",
        panel=METHOD, expert=True, affects=Affects.PLAN, commands=("allocate",),
    )] = "auto"
    rotate: Annotated[Literal["auto", "off", "on"], Setting(
        help="on: rotate the residual stream by a random Hadamard matrix before rounding; the model computes the same, "
        "a tied head gets a weight of its own. auto: where that costs no bytes and was seen to pay.",
        detail="Norm gains go into the linears behind, and nothing is added at run time. The seed chooses the signs. "
        "auto leaves out tied heads, experts, quantized originals, rtn, menus above 4 bits and what cannot be rotated; "
        "on is refused for the last alone.",
        panel=METHOD, expert=True, affects=Affects.SCORES, metavar="auto|off|on", commands=("measure",),
    )] = "auto"
    rounding: Annotated[Literal["rtn", "gptq", "foem", "gptaq"], Setting(
        help="rtn, gptq, foem or gptaq.",
        detail="rtn is to nearest, gptq compensates errors, foem is gptq with a first-order term, gptaq is gptq with a "
        "correction for inputs that differ from the original's because the layers before are rounded.",
        panel=METHOD, affects=Affects.SCORES, commands=("measure",),
    )] = "gptq"
    foem_beta: Annotated[float | Literal["auto"], Setting(
        help="FOEM's pull towards the original weights, or auto: by held-out rows, layer by layer.",
        detail="It is from 0 to 1; auto tries 0, 0.05, 0.1, 0.2 and 0.4 on every fourth calibration row. Only foem "
        "uses it.", panel=METHOD, expert=True,
        affects=Affects.SCORES, metavar="FLOAT|auto", as_text=True, commands=("measure",),
    )] = 0.1
    foem_form: Annotated[Literal["code", "paper"], Setting(
        help="FOEM as its authors' code has it, which pulls a column once, just before it is rounded, or as its paper "
        "has it, which pulls all later columns of a block of 128 at each step.",
        detail="Only foem uses it; paper needs a foem_beta below 1.",
        panel=METHOD, expert=True, affects=Affects.SCORES, commands=("measure",),
    )] = "code"
    gptaq_alpha: Annotated[float, Setting(
        help="GPTAQ's share of the correction for rounded inputs.", detail="Only gptaq uses it.",
        panel=METHOD, expert=True, affects=Affects.SCORES, commands=("measure",),
    )] = Field(default=0.25, ge=0, le=1)
    target_shift: Annotated[float | Literal["auto"] | None, Setting(
        help="Share of each weight's shift towards the original output on rounded inputs: auto (by held-out rows, "
        "layer by layer), a number from 0 to 1, or off.",
        default="0.5; off for rtn, gptaq and models with experts", panel=METHOD, expert=True, affects=Affects.SCORES,
        metavar="auto|FLOAT|off", as_text=True, commands=("measure",),
    )] = None
    scale_refit: Annotated[bool, Setting(
        help="Refit scales after rounding where held-out rows gain by it.",
        detail="Every fourth calibration row is held out.",
        panel=METHOD, expert=True, affects=Affects.SCORES, commands=("measure",),
    )] = False
    token_importance: Annotated[Literal["auto", "gradient", "none"], Setting(
        help="gradient: tokens count in rounding by the loss's gradient; none: all alike.",
        default="gradient; none for rtn",
        detail="The gradient is that at the layer's output; it takes one more pass over the calibration rows forwards "
        "and backwards.", panel=METHOD, expert=True, affects=Affects.SCORES, commands=("measure",),
    )] = "auto"
    output_feedback: Annotated[str | None, Setting(
        help="Let rows of a layer make up for each other's rounding errors, by the gradients at its output: off, auto "
        "(layers with at most twice as many outputs as inputs), a layer's name or a pattern such as "
        "'re:.*[qk]_proj$'.",
        default="auto on a GPU where token importance is known and matrices take at most 8 GiB; else off",
        detail="Each layer goes without where held-out rows predict a gain of less than 3 %. Experts and an output "
        "head have none, nor have scores. The host's memory holds half a square matrix of its outputs per layer.",
        panel=METHOD, expert=True, affects=Affects.WEIGHTS, metavar="off|auto|NAME",
    )] = Field(default=None, min_length=1)
    damping: Annotated[float | None, Setting(
        help="Fraction of the mean diagonal that is added to the Gram matrix.",
        default="0.05, 0.2 below 8 tokens per column",
        panel=METHOD, expert=True, affects=Affects.SCORES, commands=("measure",),
    )] = Field(default=None, gt=0, allow_inf_nan=False)
    gram_steps: Annotated[int, Setting(
        help="Learn codes and scales of every layer in so many steps after rounding it, from the Gram matrix of its "
        "inputs alone: no forward passes.",
        detail="Every fourth calibration row says layer by layer whether and how far. Layers with output feedback stay "
        "as they are. 200 steps give most of it.",
        panel=METHOD, expert=True, affects=Affects.WEIGHTS,
    )] = Field(default=0, ge=0)
    refine_steps: Annotated[int, Setting(
        help="Learn rounding, scales and norm gains of every block in so many steps after rounding it.",
        detail="Its output then comes closer to the original's. One calibration row of 8 is held out.",
        panel=METHOD, affects=Affects.WEIGHTS,
    )] = Field(default=0, ge=0)
    refine_learner: Annotated[Literal["adam", "gumbel"], Setting(
        help="How --refine-steps learn codes: adam moves offsets by gradients, gumbel anneals a noisy choice among "
        "codes at most two away, for long runs at 2 and 3 bits.",
        detail="gumbel takes 64 bytes of the device's memory per weight of a block, adam 28.",
        panel=METHOD, expert=True, affects=Affects.WEIGHTS,
    )] = "adam"
    refine_error: Annotated[Literal["output", "loss"] | None, Setting(
        help="What --refine-steps lower: output, the error of a block's output relative to it; loss, what that error "
        "costs the model's loss, by the gradients at the output.",
        default="output",
        detail="loss takes the pass of token importance; the host's memory holds half a square matrix of the hidden "
        "width per block.",
        panel=METHOD, expert=True, affects=Affects.WEIGHTS,
    )] = None
    sensitivity_steps: Annotated[int, Setting(
        help="Learn the rounding of every block and width in so many steps before scoring it, for plans that are "
        "carried out with --refine-steps.", detail="Layers that refinement rescues then count as rescued.",
        panel=METHOD, expert=True, affects=Affects.SCORES, commands=("measure",),
    )] = Field(default=0, ge=0)
    distill_steps: Annotated[int, Setting(
        help="Learn scales and norm gains of the whole rounded model in so many steps, on its divergence from the "
        "original.", detail="It holds the model on the device, and one calibration row of 8 out.",
        panel=METHOD, affects=Affects.WEIGHTS,
    )] = Field(default=0, ge=0)
    distill_codes: Annotated[bool, Setting(
        help="Let distillation move codes too, by two at most; takes 28 bytes of the device's memory per weight.",
        panel=METHOD, expert=True, affects=Affects.WEIGHTS,
    )] = False

    device: Annotated[Literal["auto", "cpu", "cuda"], Setting(
        help="auto (cuda where there is one), cpu or cuda.",
        panel=RUN, affects=Affects.MACHINE, commands=("measure", "evaluate", "inspect"),
    )] = "auto"
    gpus: Annotated[int, Setting(
        help="GPUs of this machine that share the work, a process each.",
        detail="Several machines: start the command by torchrun on each.",
        panel=RUN, affects=Affects.MACHINE, commands=("measure", "evaluate"),
    )] = Field(default=1, ge=1)
    batch_size: Annotated[int | None, Setting(
        help="Rows per forward pass; lower it when memory is short.",
        default="the most of 128, 64 and 32 that fit into --max-memory, on a CPU 16",
        detail="It changes floating-point sums and so some codes, which is why free memory does not decide it.",
        panel=RUN, expert=True, affects=Affects.MACHINE, commands=("measure", "evaluate"),
    )] = Field(default=None, ge=1)
    max_memory: Annotated[str, Setting(
        help="Memory to use, such as 12GiB: hidden states that do not fit beside the work lie in the host's memory "
        "(beside a GPU), then on the disk, but for refinement, distillation, swaps and kl; changes no result "
        "but through the default of --batch-size.", default="auto, 90 % of a GPU; on a CPU no limit",
        detail="In the host's memory lie at most 6 GiB and half of this.",
        panel=RUN, affects=Affects.PLACE, metavar="SIZE", commands=("measure", "evaluate"),
    )] = "auto"
    seed: Annotated[int, Setting(
        help="Seed of rows and sampled labels.",
        panel=RUN, affects=Affects.SCORES, commands=("measure", "inspect"),
    )] = Field(default=0, ge=0, lt=2**63)
    trust_remote_code: Annotated[bool, Setting(
        help="Execute code that the checkpoint brings along; read it first.",
        panel=RUN, affects=Affects.MODEL, commands=("measure", "evaluate"),
    )] = False
