"""The allocate stage on a saved measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hawqtool.allocation.problem import resolve_ignored, resolve_pins
from hawqtool.allocation.uniform import uniform_formats
from hawqtool.config import RunConfig
from hawqtool.pipeline.artifacts import check_writable, metric_scores, plan_document, read_sensitivity, write_json
from hawqtool.pipeline.planning import allocate, budget_bytes, format_menu, score_warnings, widths
from hawqtool.pipeline.progress import Reporter, Silent


def run_allocate(
    config: RunConfig, sensitivity: Path, output: Path, reporter: Reporter | None = None
) -> dict[str, Any]:
    """``hawqtool allocate``: write plan.json for a budget without touching the model.

    Raises:
        UsageError: If the budget is infeasible or a format was not measured.
    """
    config.require_one_target()
    check_writable(output)
    table, units, unquantized = read_sensitivity(sensitivity)
    config = config.model_copy(update={"rounding": table.rounding, "symmetric": table.symmetric})
    ignored = resolve_ignored(config.ignore, units)
    # Ignored layers stay in the file at full size, so a size target must count them.
    for unit in units:
        if unit.name in ignored:
            unquantized += sum(m.num_weights * m.scale_bytes for m in unit.members)
    units = tuple(unit for unit in units if unit.name not in ignored)
    sizes = {name: fmt.group_size for name, fmt in uniform_formats(units, 8, config.group_size).items()}
    budget = budget_bytes(config, units, unquantized)
    menu = format_menu(units, widths(config, units, budget), config.group_size, config.symmetric)
    metric = config.metric(bool(table.settings.get("per_row")))
    scores = metric_scores(table, metric, sensitivity)
    for text in score_warnings({metric: scores}):
        (reporter or Silent()).warn(text)
    pins = resolve_pins(config.pin, units, sizes, config.symmetric)
    plan = allocate(units, menu, scores, pins, budget, metric, config.solver)
    ignored_linears = tuple(
        m.name for unit in read_sensitivity(sensitivity)[1] if unit.name in ignored for m in unit.members
    )
    document = plan_document(plan, units, ignored_linears)
    write_json(output, document)
    return document
