"""What `hawqtool quantize` ships at a budget by default, beside its rivals, on texts that chose nothing.

    python scripts/research/study_mixed.py MODEL OUT.jsonl --calibration A.txt --text wiki=B.txt --text code=C.txt \
        --budgets 2.25,2.5,3 --seeds 0,1
    python scripts/research/study_mixed.py --table OUT1.jsonl OUT2.jsonl

Per seed the rows are drawn and the importance of their tokens is found once, as both are the same for all budgets. At
each budget scores are measured, plans compared and one carried out, by the functions of the command; --eval-data is the
first text, which chooses nothing. --set gives further keys of a run, such as ``--set batch_size=8``; the value is YAML.

On the same rows are carried out: the best uniform plan that fits, the plan of the rule that people use where it is
another one, and --anchors, larger uniform plans that with it make the uniform curve. Every plan is judged by its
written folder, in a temporary place, so that all come to their figures in one way; equal plans are carried out once per
seed. OUT.jsonl gets a line per plan and use; what it has is not done again. --table prints it as Markdown.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import yaml

from hawqtool.allocation.problem import stored_bytes
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.config import load_config
from hawqtool.errors import HawqError
from hawqtool.formats import QuantFormat, parse_label
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.run.menu import budget_bytes, job_menu
from hawqtool.pipeline.search.planner import Planner, make_planner
from hawqtool.pipeline.search.selection import Selection, _largest_uniform, choose, try_plans
from hawqtool.pipeline.search.shortlist import RULE
from hawqtool.pipeline.search.trials import TrialRunner, formats_key
from hawqtool.pipeline.stages.evaluate import Evaluator
from hawqtool.pipeline.stages.rows import evaluation_rows, gather_rows
from hawqtool.pipeline.stages.token_importance import with_token_importance
from hawqtool.pipeline.stages.write import round_to_folder
from hawqtool.records import BitPlan
from hawqtool.runtime.malloc import configure_allocators
from hawqtool.runtime.reporter import Reporter
from hawqtool.runtime.stage_timer import Timings
from hawqtool.runtime.store import NOTHING_SAVED
from hawqtool.streaming.kept_roundings import KeptRoundings
from sensitivity_study import Narrator
from study import mixed_tables
from study.ledger import Ledger

_BUDGETS = "2.25,2.5,2.75,3,3.25,3.5,4,4.5"
_NEEDED = ("model", "out", "calibration", "text")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is missing, or print the table.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    configure_allocators()  # as the command does
    options = _parse(arguments)
    try:
        if options.table:
            print(mixed_tables.tables(options.table), end="")
        else:
            run(options, Narrator())
    except HawqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("out", type=Path, nargs="?", help="file for the results, a line each")
    parser.add_argument("--table", type=Path, nargs="+", help="print these results and do nothing else")
    parser.add_argument("--calibration", help="source of the calibration rows")
    parser.add_argument("--text", type=_pair, action="append", help="NAME=PATH of a text to judge on; repeatable")
    parser.add_argument("--budgets", type=_list_of(float), default=_BUDGETS, help=f"bits (default: {_BUDGETS})")
    parser.add_argument("--seeds", type=_list_of(int), default="0", help="draws of the rows (default: 0)")
    parser.add_argument("--set", type=_pair, action="append", default=[], help="KEY=VALUE of a run; repeatable")
    parser.add_argument("--judge-rows", type=int, default=24, help="rows of each text (default: 24)")
    parser.add_argument("--anchors", type=_list_of(str), default="w3ch,w4ch", help="uniform plans of the curve")
    parser.add_argument("--no-rivals", action="store_true", help="judge what is shipped alone, without anchors too")
    options = parser.parse_args(arguments)
    missing = [name for name in _NEEDED if not getattr(options, name)]
    if missing and not options.table:
        parser.error(f"{missing[0]} is missing; give {', '.join(_NEEDED)}, or --table")
    return options


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError("expected NAME=VALUE")
    return name, value


def _list_of(kind: type) -> Any:
    return lambda text: list(dict.fromkeys(kind(part) for part in text.split(",") if part))


def run(options: argparse.Namespace, reporter: Reporter) -> None:
    """Everything that is missing, seed by seed.

    Raises:
        HawqError: For settings or inputs that do not fit.
    """
    overrides = {key: yaml.safe_load(value) for key, value in options.set}
    settings = {
        "model": Path(options.model).name,
        "calibration": Path(options.calibration).name,
        "texts": {name: Path(path).name for name, path in options.text},
        "judge_rows": options.judge_rows,
        "set": overrides,
    }
    ledger, rivals = Ledger(options.out, settings), not options.no_rivals
    for seed in options.seeds:
        todo = {budget: ledger.missing(seed, budget, rivals) for budget in options.budgets}
        todo = {budget: roles for budget, roles in todo.items() if roles}
        anchors = ledger.missing_anchors(seed, options.anchors) if rivals else []
        if not todo and not anchors:
            continue
        with tempfile.TemporaryDirectory(prefix="study-mixed-") as scratch:
            draw = Draw(options, seed, ledger, reporter, Path(scratch))
            for budget, roles in todo.items():
                draw.carry_out(budget, roles)
            for label in anchors:
                draw.anchor(label)
        del draw
        _free()


def _seemed(selection: Selection) -> dict[str, list[float]]:
    """The mixed plan less uniform on the rows that choose, and its error, as shares of uniform's divergence."""
    carried_out = replace(selection, proof=None).minus_uniform
    layerwise = None if selection.proof is None else selection.proof.minus_uniform(selection.best)
    found = {"layerwise": layerwise, "carried out": carried_out}
    return {name: [one.value / one.base, one.stderr / one.base] for name, one in found.items() if one is not None}


def _free() -> None:
    """Give back what a plan took of a GPU, which other work may share."""
    if torch.cuda.is_available():
        gc.collect()  # first, or what refers to itself keeps its memory
        torch.cuda.empty_cache()


class Draw:
    """Rows of one seed, and plans that are carried out on them.

    The rows, and what is found on them before scores are measured, depend on a budget being given, not on which: no
    stage before the menu reads ``target_bpw``.

    Args:
        options: Command line.
        seed: Draws the rows.
        ledger: Takes the lines.
        reporter: Progress.
        scratch: Existing folder to work in.
    """

    def __init__(
        self, options: argparse.Namespace, seed: int, ledger: Ledger, reporter: Reporter, scratch: Path
    ) -> None:
        self.seed, self.ledger, self.scratch = seed, ledger, scratch
        self.seconds: dict[str, float] = {}
        given = {"model": options.model, "calibration": options.calibration, "eval_data": options.text[0][1]}
        given |= ledger.settings["set"] | {"seed": seed, "target_bpw": options.budgets[0]}
        job = prepare(load_config(None, given), reporter, states=scratch)
        self.context = RunContext(job, reporter)
        with self._timed("rows"):
            self.sets = gather_rows(self.context)
        with self._timed("importance"):
            calibration = with_token_importance(self.context, self.sets["calibration"], for_feedback=True)
            self.sets["calibration"] = calibration
        texts = {name: evaluation_rows(job, path, options.judge_rows) for name, path in options.text}
        self.judge = Evaluator(self.context, texts)
        self._measured: dict[Any, Planner] = {}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start
        _free()

    def carry_out(self, target: float, roles: set[str]) -> None:
        """The shipped plan of a budget and its rivals, as far as they are asked for."""
        job = self.context.job
        job = replace(job, config=job.config.model_copy(update={"target_bpw": target}))
        context = replace(self.context, job=job, roundings=KeptRoundings())
        context.reporter.say(f"{target:g} bits, seed {self.seed}")
        budget = budget_bytes(job.config, job.units, 0, job.pins)  # what is not quantized counts in file sizes alone
        with self._timed("measure"):
            planner = self._planner(context, budget)
        plans = planner.shortlist(budget)
        uniform = _largest_uniform(job, next(iter(plans.values())))
        rivals = {"rule": (RULE, plans[RULE])} if RULE in plans else {}
        rivals |= {"uniform": uniform} if uniform else {}
        if "shipped" in roles:
            self._ship(context, target, planner, plans, rivals)
            roles = self.ledger.missing(self.seed, target, rivals=len(roles) > 1)
        for role in sorted(roles, reverse=True):  # uniform before the rule, as the more important one
            name, plan = rivals[role]
            self._round(target, role, name.removeprefix("uniform "), plan)

    def _planner(self, context: RunContext, budget: int) -> Planner:
        """Scores of the budget's menu; of equal menus those that were measured before."""
        menu = tuple(sorted(job_menu(context.job, budget).items()))
        if menu not in self._measured:
            self._measured[menu] = make_planner(context, self.sets)
        return replace(self._measured[menu], context=context)

    def _ship(
        self,
        context: RunContext,
        target: float,
        planner: Planner,
        plans: dict[str, BitPlan],
        rivals: dict[str, tuple[str, BitPlan]],
    ) -> None:
        """Try the plans as the command does, and judge the one that it would ship."""
        with self._timed("try"):
            runner = TrialRunner(context, self.sets, self.scratch, Timings(NOTHING_SAVED))
            selection = try_plans(runner, plans, planner.scores)
            shipped = choose(context.job, selection)
            trial = selection.uniform if shipped == "uniform" else selection.mixed[selection.best]
            assert trial is not None  # otherwise no uniform plan were shipped
            folder = runner.folder(trial)
            runner.keep_only([trial])
            seemed = _seemed(selection)
            del runner, selection  # and with them the original's states on the rows that choose
        beside = [role for role, (_, plan) in rivals.items() if role == "uniform" or plan.formats != trial.plan.formats]
        more = {"kind": shipped, "beside": beside, "seemed": seemed}
        self._add(target, "shipped", trial.name.removeprefix("uniform "), trial.plan, self._judged(folder), **more)
        del self.seconds["try"]

    def anchor(self, label: str) -> None:
        """A uniform plan of the curve."""
        job, wanted = self.context.job, parse_label(label)
        assert isinstance(wanted, QuantFormat)
        formats = uniform_formats(job.units, wanted.bits, wanted.group_size, job.config.symmetric)
        weights = sum(unit.num_weights for unit in job.units)
        self.seconds.pop("measure", None)
        self._round(None, "anchor", label, BitPlan(formats, stored_bytes(job.units, formats), weights))

    def _round(self, target: float | None, role: str, label: str, plan: BitPlan) -> None:
        """Carry out a plan and judge it, unless one of the same formats was."""
        texts, folder = self.ledger.known(self.seed, plan), self.scratch / role
        if texts is None:
            with self._timed("round"):
                round_to_folder(self.context, plan, self.sets["calibration"], folder, label)
            texts = self._judged(folder)
        self._add(target, role, label, plan, texts, kind=role)

    def _judged(self, folder: Path) -> dict[str, Any]:
        """Divergence of a written folder on each text; the folder is removed."""
        with self._timed("judge"):
            found = self.judge.evaluate(folder, "plan")
            shutil.rmtree(folder)
        return {
            name: {"kl": quality.divergence, "stderr": quality.stderr, "rows": list(quality.row_divergence)}
            for name, quality in found.items()
        }

    def _add(
        self, target: float | None, role: str, label: str, plan: BitPlan, texts: dict[str, Any], **more: Any
    ) -> None:
        line = {"seed": self.seed, "budget": target, "role": role, "label": label, **more}
        line |= {"bpw": plan.bpw, "stored_bytes": plan.stored_bytes, "plan": formats_key(plan.formats)}
        line |= {"formats": Counter(fmt.label for fmt in plan.formats.values()), "texts": texts}
        self.ledger.add(line | {"seconds": dict(self.seconds)})
        for part in ("round", "judge"):  # those of this plan alone
            self.seconds.pop(part, None)


if __name__ == "__main__":
    raise SystemExit(main())
