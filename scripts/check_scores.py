"""Do sensitivity scores predict what happens? One unit at a time at few bits, the others at many, and measure.

    python scripts/check_scores.py MODEL --calibration A.txt --eval-data B.txt [--units REGEX] [--json FILE]

For every unit the measured divergence of that plan (from the written files, on the evaluation text) stands beside
what each metric predicts for it, and their ratio. Below the table: geometric mean and range of the ratios, the rank
correlation, and the same for all units at few bits, where the sum of the scores is the prediction.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from hawqtool.config import RunConfig
from hawqtool.formats import QuantFormat
from hawqtool.pipeline.evaluating import Evaluator
from hawqtool.pipeline.job import Job, prepare
from hawqtool.pipeline.measuring import measure_job
from hawqtool.pipeline.planning import format_menu, stored_bytes
from hawqtool.pipeline.progress import Silent
from hawqtool.pipeline.rounding import round_to_folder
from hawqtool.pipeline.rows import gather_rows
from hawqtool.records import SWEEP_METRICS, BitPlan, Rows

ALL = "(all units)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, compare, print.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    options = _parse(arguments)
    values: dict[str, Any] = {
        "model": str(options.model), "calibration": str(options.calibration), "eval_data": str(options.eval_data),
        "num_samples": options.num_samples, "seq_len": options.seq_len, "eval_samples": options.eval_samples,
        "group_size": options.group_size, "rounding": options.rounding, "device": "cpu",
    }  # fmt: skip
    config = RunConfig(**values)
    result = check_scores(prepare(config), options.low, options.high, options.units)
    print("\n".join(lines(result)))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--eval-data", type=Path, required=True)
    parser.add_argument("--units", default="", help="regular expression that a unit's name must contain")
    parser.add_argument("--low", type=int, default=2, help="bits of the unit that is looked at")
    parser.add_argument("--high", type=int, default=8, help="bits of all others")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounding", default="gptq")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def check_scores(job: Job, low: int, high: int, pattern: str = "") -> dict[str, Any]:
    """Predicted and measured divergence of single-unit plans.

    Returns:
        ``measure`` and ``units``: per unit ``measured`` and the prediction of each metric.
    """
    config = job.config
    menu = format_menu(job.units, (low, high), config.group_size, config.symmetric)
    sets = gather_rows(job, Silent())
    scores = measure_job(job, menu, sets, Silent())["scores"]
    evaluator = Evaluator(job, {"report": sets["report"]}, Silent())
    chosen = [(unit.name, {unit.name}) for unit in job.units if re.search(pattern, unit.name)]
    chosen.append((ALL, {unit.name for unit in job.units}))
    found: dict[str, dict[str, float]] = {}
    measure = ""
    for name, lowered in chosen:
        formats = {unit: fmts[0] if unit in lowered else fmts[1] for unit, fmts in menu.items()}
        evaluation = _evaluate(job, formats, sets["calibration"], evaluator)
        measure = evaluation.measure
        found[name] = {"measured": evaluation.divergence} | {
            metric: sum(scores[metric][unit][fmt.label][0] for unit, fmt in formats.items()) for metric in SWEEP_METRICS
        }
        print(f"{name}: {evaluation.divergence:.6f}", file=sys.stderr)
    return {"measure": measure, "low": low, "high": high, "units": found}


def _evaluate(job: Job, formats: dict[str, QuantFormat], rows: Rows, evaluator: Evaluator) -> Any:
    plan = BitPlan(formats, stored_bytes(job.units, formats), sum(unit.num_weights for unit in job.units))
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        round_to_folder(job, plan, rows, Path(scratch) / "plan", Silent(), "plan")
        return evaluator.evaluate(Path(scratch) / "plan", "plan")["report"]


def lines(result: dict[str, Any]) -> list[str]:
    """The table, and per metric how far the predictions are off."""
    units = result["units"]
    text = [f"one unit at {result['low']} bits, others at {result['high']}; {result['measure']}, predicted/measured"]
    text.append(f"{'unit':48s} {'measured':>10s}" + "".join(f" {metric:>10s}" for metric in SWEEP_METRICS))
    for name, values in units.items():
        ratios = "".join(f" {values[metric] / values['measured']:10.2f}" for metric in SWEEP_METRICS)
        text.append(f"{name[-48:]:48s} {values['measured']:10.5f}{ratios}")
    single = [values for name, values in units.items() if name != ALL]
    measured = torch.tensor([values["measured"] for values in single])
    for metric in SWEEP_METRICS:
        predicted = torch.tensor([values[metric] for values in single])
        logs = (predicted / measured).log()
        spread = f"{math.exp(logs.min()):.2f} to {math.exp(logs.max()):.2f}"
        text.append(
            f"{metric}: ratio {math.exp(logs.mean()):.2f} ({spread}), rank correlation "
            f"{rank_correlation(predicted, measured):.2f}"
        )
    return text


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Spearman's coefficient of ``[n]`` values; NaN for fewer than two."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1]) if len(first) > 1 else math.nan


if __name__ == "__main__":
    raise SystemExit(main())
