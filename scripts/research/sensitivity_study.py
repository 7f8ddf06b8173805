"""Which sensitivity metric predicts what happens, what is a better one worth, and what does it cost?

    python scripts/research/sensitivity_study.py MODEL OUT --calibration A.txt --eval-data B.txt \
        [--parts scores,plans,cost]

scores: every metric on the scoring rows beside the measured divergence on held-out rows with one unit quantized and
all else original, by unit and width: rank correlation with a bootstrap interval, and predicted over measured.
plans: at each budget the plan of every metric, swaps at one, uniform plans, permuted and reversed scores and the
first/last-blocks rule, each rounded on the calibration rows and judged on the held-out rows, paired with uniform plans
of equal bytes.
cost: seconds and peak memory of each metric, and as a multiple of a plain forward and backward pass over its rows.

OUT/study.json is written after each step; a run that was cut goes on where it stopped, with the same settings.
Beside it: scores.csv, plans.csv, study.md, and scatter.png, spearman.png and plans.png. The metric kl
and the truth hold the whole model on the device.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hawqtool.errors import HawqError, UsageError
from hawqtool.records import SCORE_METRICS, SWEEP_METRICS
from hawqtool.runtime.malloc import configure_allocators
from study.cost import forward_backward
from study.plans import study_plans
from study.scores import EXTRAS, compare, measure_scores, measure_truth
from study.setting import Findings, Setting, prepare_setting
from study.tables import PLAIN, write_tables

PARTS = ("scores", "plans", "cost")
_SECONDS_BETWEEN_LINES = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, judge, write.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    configure_allocators()  # as the command does
    options = _parse(arguments)
    try:
        run(options)
    except HawqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path, help="folder for the results; made where it is missing")
    parser.add_argument("--calibration", required=True, help="source of the calibration and scoring rows, or self")
    parser.add_argument("--eval-data", help="source of the held-out rows (default: further calibration rows)")
    parser.add_argument("--parts", type=_names(PARTS), default=PARTS, help="which of scores,plans,cost")
    parser.add_argument("--metrics", type=_names(SCORE_METRICS), default=(*SWEEP_METRICS, "kl"), help="comma list")
    parser.add_argument("--bits", type=_numbers(int), default=(2, 3, 4, 5, 6, 8))
    parser.add_argument("--budgets", type=_numbers(float), default=(2.75, 3.25, 3.75), help="stored bits per weight")
    parser.add_argument("--reference", choices=SCORE_METRICS, help="metric to permute and reverse (default: auto's)")
    parser.add_argument("--swaps", type=int, default=0, help="rounds of swaps (default: 0)")
    parser.add_argument("--random-plans", type=int, default=5, help="permutations of the scores (default: 5)")
    parser.add_argument("--num-samples", type=int, default=64, help="calibration rows (default: 64)")
    parser.add_argument("--scoring-samples", type=int, default=64, help="scoring rows (default: 64)")
    parser.add_argument("--scoring-len", type=int, help="tokens of a scoring row (default: --seq-len)")
    parser.add_argument("--eval-samples", type=int, default=64, help="held-out rows (default: 64)")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--extra-group-sizes", default=(), help="as `hawqtool quantize` has it")
    parser.add_argument("--rounding", default="gptq")
    parser.add_argument("--target-shift", default="off", help="as `hawqtool quantize` has it")
    parser.add_argument("--token-importance", default="auto", help="as `hawqtool quantize` has it")
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--ignore", action="append", default=[], help="layers to leave as they are; repeatable")
    parser.add_argument("--probes", type=int, default=4, help="probes per row of hawq")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


def _names(known: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        found = tuple(part.strip() for part in text.split(","))
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}")
        return found

    return parse


def _numbers(kind: type) -> Any:
    return lambda text: tuple(sorted({kind(part) for part in text.split(",")}))


class Narrator:
    """Progress on stderr, a line now and then."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()

    def say(self, text: str) -> None:
        """One line."""
        print(f"[{time.perf_counter() - self.start:7.1f} s] {text}", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """One line."""
        self.say(f"warning: {text}")

    def progress(self, stage: str, done: int, total: int) -> None:
        """One line where the last is long ago."""
        if time.perf_counter() - self.last > _SECONDS_BETWEEN_LINES:
            self.last = time.perf_counter()
            self.say(f"{stage} {done}/{total}")


def run(options: argparse.Namespace) -> None:
    """Carry out the parts that were asked for.

    Raises:
        HawqError: For settings or inputs that do not fit.
    """
    values = {
        key: getattr(options, key)
        for key in (
            "model", "calibration", "eval_data", "num_samples", "seq_len", "eval_samples", "group_size",
            "extra_group_sizes", "rounding", "target_shift", "token_importance", "profile", "ignore", "probes",
            "batch_size", "seed", "device",
        )
    }  # fmt: skip
    narrator = Narrator()
    length = options.scoring_len or options.seq_len
    setting = prepare_setting(values, options.bits, options.scoring_samples, length, narrator)
    reference = options.reference or setting.job.settings.metric
    if "plans" in options.parts and reference not in options.metrics:
        raise UsageError(f"--reference {reference} is not among --metrics; add it")
    options.out.mkdir(parents=True, exist_ok=True)
    findings = Findings(options.out / "study.json", setting.identity)
    narrator.say(f"{setting.job.source.name}: {len(setting.job.units)} units, widths {options.bits}")
    for part in options.parts:
        carry_out(part, options, setting, reference, findings, narrator)
        write_tables(options.out, findings.data)
    from study.plots import write_plots

    write_plots(options.out, findings.data)
    print((options.out / "study.md").read_text(encoding="utf-8"), end="")


def carry_out(
    part: str, options: argparse.Namespace, setting: Setting, reference: str, findings: Findings, narrator: Narrator
) -> None:
    """One part, with the scores that it needs."""
    measure_scores(setting, options.metrics, findings, narrator)
    if part == "scores":
        measure_truth(setting, findings, narrator)
        compare(findings, setting.job.config.seed)
    elif part == "plans":
        rounds = options.swaps
        study_plans(setting, options.budgets, reference, options.random_plans, rounds, findings, narrator)
    elif PLAIN not in findings.data["cost"]:
        findings.data["cost"][PLAIN] = forward_backward(setting.job, setting.scoring)
        findings.save()


if __name__ == "__main__":
    assert set(EXTRAS) == set(SCORE_METRICS) - set(SWEEP_METRICS), "a metric has no way to be measured here"
    raise SystemExit(main())
