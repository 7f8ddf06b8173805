"""The settings that the configuration leaves to the device and the model, resolved once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hawqtool.config import SETTINGS, RunConfig
from hawqtool.rounding.method import RoundingMethod
from hawqtool.rounding.statistics import SETTINGS_HELD_OUT_EVERY


@dataclass(frozen=True)
class ResolvedSettings:
    """What the stages work with, where the configuration may say null or auto.

    Args:
        num_samples: Calibration rows.
        seq_len: Tokens per row.
        sampled_share: Share of the calibration rows that the model writes, beside texts.
        selection_samples: Rows that choose between plans.
        eval_samples: Rows to report on; 0 where nothing is evaluated.
        batch_size: Rows per forward pass; 0 until the memory is known.
        shortlist: Mixed plans to compare at a budget.
        swaps: Rounds of measured swaps at the best mixed plan.
        metric: Scores that allocation compares.
        method: Rounding method.
        uses_token_importance: Whether tokens count by their gradients.
        output_feedback: Layers with output feedback: off, auto, a name or a pattern.
        refine_error: What refinement lowers: the error of a block's output, or what that costs the loss.
        proof: How plans are compared: full, layerwise or predicted.
    """

    num_samples: int
    seq_len: int
    sampled_share: float
    selection_samples: int
    eval_samples: int
    batch_size: int
    shortlist: int
    swaps: int
    metric: str
    method: RoundingMethod
    uses_token_importance: bool
    output_feedback: str
    refine_error: Literal["output", "loss"]
    proof: str


FEWEST_REPORT_ROWS, MOST_REPORT_ROWS = 8, 32
"""Rows to report on where nothing is asked for, at least and at most."""

SAMPLED_SHARE = 0.5
"""Share of the calibration rows that a GPU's run has its model write beside texts, where nothing is asked for.

3 bits in groups of 64, 128 rows of 2048 tokens, C4 alone and with a quarter and half of them sampled, KL on
encyclopedia, code and manual (one draw): SmolLM2 0.275, 0.518, 0.400; 0.271, 0.354, 0.310; 0.270, 0.315, 0.281; its
off-lattice copy 0.272, 0.467, 0.340 and with half 0.268, 0.296, 0.254; that of Qwen2.5-Coder-0.5B with a quarter 0.101,
0.140, 0.168, with half 0.109, 0.119, 0.146.
"""

DEFAULT_SHIFT = 0.5
"""Share of the target shift where nothing is asked for.

SmolLM2's off-lattice copy, groups of 64, 128 x 2048 C4 tokens, three draws, KL on text that was not looked at before:
off 0.154, half 0.139, whole 0.144 at 4 bits; 0.613, 0.530, 0.584 at 3 bits; 2.43, 2.21, 2.81 at 2 bits.
"""


def resolve_settings(
    config: RunConfig, device_type: str, longest: int | None, has_experts: bool = False
) -> ResolvedSettings:
    """Settings of a run on a kind of device.

    Args:
        config: The configuration.
        device_type: ``cpu`` or ``cuda``.
        longest: Positions of the model, which bound the default length of rows; None where nothing does.
        has_experts: Whether layers of the model see part of the tokens, others after rounding than before.
    """
    seq_len = _default("seq_len", device_type)
    corrections = (config.gptaq_alpha, _target_shift(config, has_experts), config.scale_refit)
    wanted = config.token_importance
    num_samples = config.num_samples or _default("num_samples", device_type)
    # Plain rounding compensates no errors, so that no token can count for more in it.
    weighted = wanted == "gradient" or (wanted == "auto" and config.rounding != "rtn")
    return ResolvedSettings(
        num_samples,
        config.seq_len or min(seq_len, longest or seq_len),
        _sampled_share(config, device_type),
        config.selection_samples or _default("selection_samples", device_type),
        _eval_samples(config, num_samples),
        config.batch_size or 0,
        _shortlist(config, device_type),
        _swaps(config, device_type),
        config.metric,
        RoundingMethod(
            config.rounding,
            config.foem_beta,
            config.both_signs,
            config.damping,
            *corrections,
            paper_form=config.rounding == "foem" and config.foem_form == "paper",
        ),
        weighted,
        _output_feedback(config, weighted and device_type == "cuda" and num_samples > SETTINGS_HELD_OUT_EVERY),
        config.refine_error or "output",
        _proof(config, device_type),
    )


def _sampled_share(config: RunConfig, device_type: str) -> float:
    """Share of the calibration rows that the model writes: half on a GPU; to a CPU it takes longer than rounding."""
    if config.sampled_share is not None:
        return config.sampled_share
    return SAMPLED_SHARE if device_type == "cuda" else 0.0


def _proof(config: RunConfig, device_type: str) -> str:
    """How plans are compared: by default layerwise where that costs far less than carrying all of them out."""
    if config.proof is not None:
        return config.proof
    if any(fmt.activations for fmt in config.special_formats):
        return "full"  # layers compared by themselves see their inputs as they are
    budget = config.target_bpw is not None or config.target_size is not None
    cheap = device_type == "cuda" and budget and not config.learns and not _swaps(config, device_type)
    return "layerwise" if cheap else "full"


def _output_feedback(config: RunConfig, worthwhile: bool) -> str:
    """Layers with output feedback: by default all that pay, where that is cheap and was measured.

    SmolLM2 and its off-lattice copy on an H200, groups of 64, 128 x 2048 C4 tokens: KL on three texts falls by 10 to
    15 % at 3 bits and by 10 to 19 % at 4, in 4 times the seconds of rounding. What is learned afterwards goes on from
    there. Rows of a CPU run are few.
    """
    if config.output_feedback is not None:
        return config.output_feedback
    return "auto" if worthwhile and config.rounding in ("gptq", "foem") else "off"


def _eval_samples(config: RunConfig, num_samples: int) -> int:
    """Rows to report on: by default as many as calibrate, so that judging a plan costs no more than making it.

    A row that calibrates goes through the model four times and more (importance there and back, rounding on the
    prefix, the original's inputs beside it), one that judges twice and through the output head.
    """
    if not config.evaluates:
        return 0
    return config.eval_samples or min(max(num_samples, FEWEST_REPORT_ROWS), MOST_REPORT_ROWS)


def _target_shift(config: RunConfig, has_experts: bool) -> float | Literal["auto"]:
    if config.target_shift is not None:
        return config.target_shift
    return 0.0 if config.rounding in ("rtn", "gptaq") or has_experts else DEFAULT_SHIFT


def _shortlist(config: RunConfig, device_type: str) -> int:
    if not config.evaluates:
        return 1
    return config.shortlist or _default("shortlist", device_type)


def _swaps(config: RunConfig, device_type: str) -> int:
    # Without evaluation nothing tells plans apart. Swaps know neither quality targets nor second budgets.
    if config.target_kl is not None or config.has_second_budget or not config.evaluates:
        return 0
    return _default("swaps", device_type) if config.swaps is None else config.swaps


def _default(name: str, device_type: str) -> int:
    by_device = SETTINGS[name].by_device
    assert by_device is not None, name
    return by_device.on(device_type)
