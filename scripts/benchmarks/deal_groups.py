"""How well do column loops spread over ranks? Input groups are dealt by cost, and times of a real run are added up.

    python scripts/benchmarks/deal_groups.py OUT MODEL [--ranks 1,2,4,8]

Reads the seconds of every layer from OUT/report.json, that of a run on one rank, and the groups from MODEL. What can be
rounded at the same time is dealt as a run with so many ranks deals it, once by the costs that it knows beforehand and
once by the recorded seconds themselves; a stage takes as long as its busiest rank. Forward passes and Gram matrices,
which share rows, are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hawqtool.config import RunConfig
from hawqtool.pipeline.run.job import prepare
from hawqtool.records import BlockSpec
from hawqtool.runtime.ranks import owners_by_cost
from hawqtool.streaming.dealt import rounding_cost
from hawqtool.streaming.input_statistics import stages


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, deal, print a table.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder that hawqtool wrote")
    parser.add_argument("model", type=Path, help="its original")
    parser.add_argument("--ranks", default="1,2,4,8", help="[default: 1,2,4,8]")
    options = parser.parse_args(arguments)
    report = json.loads((options.output / "report.json").read_text(encoding="utf-8"))
    seconds = {name: values["seconds"] for name, values in report["layers"].items()}
    blocks = prepare(RunConfig(model=str(options.model), device="cpu"), writes=False).structure.blocks
    alone = sum(seconds.values())
    print(f"{len(seconds)} layers of {len(blocks)} blocks, {alone:.2f} s on one rank")
    print(f"{'ranks':>5} {'by cost':>9} {'speedup':>8} {'by seconds':>11} {'speedup':>8}")
    for ranks in (int(part) for part in options.ranks.split(",")):
        known, best = (sum(spent(block, seconds, ranks, by_cost) for block in blocks) for by_cost in (True, False))
        print(f"{ranks:5} {known:9.2f} {alone / known:8.2f} {best:11.2f} {alone / best:8.2f}")
    return 0


def spent(block: BlockSpec, seconds: dict[str, float], ranks: int, by_cost: bool) -> float:
    """Seconds of a block: those of the busiest rank, stage by stage."""
    total = 0.0
    for stage in stages(block):
        # With importances of their own, as by default, linears are dealt one by one; experts have none.
        parts = [part for group in stage for part in ([group] if len(stage) > 1 else [[linear] for linear in group])]
        times = [sum(seconds.get(linear.name, 0.0) for linear in part) for part in parts]
        owners = owners_by_cost([rounding_cost(part) for part in parts] if by_cost else times, ranks)
        total += max(_load(rank, owners, times) for rank in range(ranks))
    return total


def _load(rank: int, owners: Sequence[int], times: Sequence[float]) -> float:
    return sum(time for owner, time in zip(owners, times, strict=True) if owner == rank)


if __name__ == "__main__":
    sys.exit(main())
