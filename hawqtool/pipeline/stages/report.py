"""report.json and the reproduce folder of a run."""

from __future__ import annotations

import platform
import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from hawqtool import __version__
from hawqtool.allocation.exact import plan_warnings
from hawqtool.allocation.roofline import names_hardware
from hawqtool.checkpoint.fusion import expert_of
from hawqtool.data.sources import public_name
from hawqtool.data.tokens import overlap
from hawqtool.formats import PACK_QUANTIZED, SHAPE_TENSOR_BYTES, parse_label
from hawqtool.model.kept import EXPECTED, LOUD_SHARE, KeptTensor, kept_share
from hawqtool.parsing import ParseError, load_json
from hawqtool.pipeline.load_trial.checks import result_engines
from hawqtool.pipeline.run.files import REPORT_SCHEMA, plan_entry, write_json
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.stages.sampled_rows import recorded_share
from hawqtool.records import BitPlan, Rows
from hawqtool.report.card import model_card
from hawqtool.report.documents import SensitivityDocument
from hawqtool.report.plan_comparison import PlanComparison, Shipped
from hawqtool.report.schema import Kept, LayerRecord, Report, RoundingResult, RowSet, RowSets

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "pydantic", "PyYAML", "typer", "rich")
_KIB = 1024
_MAX_README_BYTES = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What a run ships.

    Args:
        plan: Formats by unit.
        rounding: What rounding by the plan gave.
        evaluation: The plans that were tried; None where nothing was evaluated.
        shipped: Which of them is written.
    """

    plan: BitPlan
    rounding: RoundingResult
    evaluation: PlanComparison | None
    shipped: Shipped


def build_report(job: Job, sets: dict[str, Rows], outcome: Outcome, timings: dict[str, float], command: str) -> Report:
    """The report of the shipped plan; the caller adds what is null, empty or 1 here."""
    plan, rounding, total = outcome.plan, outcome.rounding, outcome.rounding["total_bytes"]
    layers = [plan_entry(m, plan.formats[unit.name]) for unit in job.units for m in unit.members]
    packed = job.layer_formats(plan.formats).values()
    return {
        "schema": REPORT_SCHEMA,
        "model": job.source.name,
        "model_revision": job.source.revision,
        "source_format": job.index.source_format,
        "architecture": type(job.skeleton).__name__,
        "hawqtool_version": __version__,
        "command": command,
        "config": public_config(job),
        "sizes": {
            "original_bytes": job.index.total_bytes,
            "quantized_bytes": total,
            "stored_bytes_linears": plan.stored_bytes,
            "shape_tensor_bytes": SHAPE_TENSOR_BYTES * sum(fmt.layout == PACK_QUANTIZED for fmt in packed),
            "bpw_linears": plan.bpw,
            "bpw_file": 8 * total / _num_parameters(job),
            "effective_bits": _effective_bits(job, plan),
        },
        "plan": layers,
        "kept": kept_record(job),
        "predicted_loss": plan.predicted_loss,
        "metric": plan.metric,
        "solver": plan.solver,
        "gap": plan.gap,
        "cost": plan.cost,
        "max_cost": plan.max_cost,
        "engines": result_engines(job, plan),
        "layers": rounding["layers"],
        "refinement": rounding["refinement"],
        "distillation": rounding["distillation"],
        "fallbacks": sum(metrics["fallback"] is not None for metrics in rounding["layers"].values()),
        "experts": routed_tokens(rounding["layers"]),
        "rows": _row_sets(job, sets),
        "batch_size": job.settings.batch_size,
        "evaluation": outcome.evaluation,
        "shipped": outcome.shipped,
        "verdict": None,
        "timings": timings,
        "peak_memory_bytes": _peak_memory(job),
        "device": str(job.device),
        "warnings": plan_warnings(plan) + warnings(job, outcome),
        "search": None,
        "gates": [],
        "starts": 1,
        "config_fingerprint": "",
        "measurement": None,
    }


def _row_sets(job: Job, sets: dict[str, Rows]) -> RowSets:
    found: dict[str, RowSet] = {
        name: {
            "source": rows.source,
            "count": len(rows.tokens),
            "kind": job.row_format.kind,
            "shape": list(rows.tokens.shape[1:]),
            "fingerprint": rows.fingerprint,
        }
        for name, rows in sets.items()
    }
    return {
        "calibration": found.get("calibration"),
        "scoring": found.get("scoring"),
        "selection": found.get("selection"),
        "report": found.get("report"),
        "overlap": overlap(sets),
        "report_in_domain": "report" in found and job.config.eval_data is None,
    }


def warnings(job: Job, outcome: Outcome) -> list[str]:
    """What the user should know: raised damping, experts without tokens, odd shapes, a mixed plan that did not pay."""
    rounding = outcome.rounding
    found = [*job.source.warnings, *_source_warnings(job), *kept_warnings(kept_record(job))]
    retried = [n for n, m in rounding["layers"].items() if m["damping_retries"]]
    if retried:
        found.append(f"damping had to be raised for {len(retried)} layers, first {retried[0]}")
    found += routing_warnings(rounding["layers"])
    odd = [m.name for u in job.units for m in u.members if m.out_features % 32 or m.in_features % 32]
    if odd:
        found.append(
            f"layers with a dimension that is no multiple of 32: {len(odd)} (first {odd[0]}); vLLM may refuse them"
        )
    if job.config.profile == "transformers" and not all(
        parse_label(m["format"]).symmetric for m in rounding["layers"].values()
    ):
        found.append(
            "asymmetric layers load in transformers 5.17, but transformers 5.23 with compressed-tensors up to 0.20 "
            "fails on their zero points"
        )
    return found + _comparison_warnings(outcome)


def _comparison_warnings(outcome: Outcome) -> list[str]:
    """That the mixed plan did not pay, or that what was asked for kept a better one out."""
    evaluation, shipped, found = outcome.evaluation, outcome.shipped, list[str]()
    if evaluation is None:
        return found
    uniform = evaluation["uniform"]
    if shipped == "uniform" and uniform is not None and evaluation["mixed"]["formats"] != uniform["formats"]:
        found.append("the mixed plan was not better than the uniform one on the selection rows, so uniform was shipped")
    selection = evaluation.get("selection")
    if shipped == "mixed" and selection and selection["mixed_minus_uniform"] > 0:
        found.append(
            "a uniform plan was better on the selection rows, but plan, pins, bits, group size or profile exclude it"
        )
    return found


def _source_warnings(job: Job) -> list[str]:
    """How a quantized original was read, and what stayed in 16 bits because it had left that so."""
    if job.index.source_format is None:
        return []
    kept = f"; {len(job.left_units)} units that it left in 16 bits stay so" if job.left_units else ""
    return [
        f"source: {job.index.source_format}, dequantized on reading: the original that quality is measured against is "
        f"that model{kept}"
    ]


def _effective_bits(job: Job, plan: BitPlan) -> float:
    """Bits per weight of the linears as ModelOpt counts its budget, for comparison with its recipes."""
    weights = {unit: unit.num_weights for unit in job.units}
    return sum(n * plan.formats[unit.name].effective_bits for unit, n in weights.items()) / sum(weights.values())


def public_config(job: Job) -> dict[str, Any]:
    """The resolved configuration; paths are shortened to their last part."""
    values = job.config.model_dump(mode="json", exclude={"restart"})
    for key in ("output", "plan", "sensitivity", "baseline"):
        if values[key]:
            values[key] = Path(values[key]).name
    values["measurements"] = None  # the report's "measurement" says where it comes from; a rerun needs no such folder
    if values["costs"] and not names_hardware(values["costs"]):
        values["costs"] = _costs_name(values["costs"])
    # What follows a source's name is its weight.
    weighted = zip(job.config.calibration, job.config.calibration_weights, strict=True)
    values["calibration"] = [public_name(name) + given.removeprefix(name) for given, name in weighted]
    values["selection_data"] = [*map(public_name, job.config.selection_data)]
    values["eval_data"] = public_name(job.config.eval_data) if job.config.eval_data else None
    resolved = {
        "model": job.source.spec,
        "num_samples": job.settings.num_samples,
        "seq_len": job.settings.seq_len,
        "sampled_share": recorded_share(job),
        "selection_samples": job.settings.selection_samples,
        "eval_samples": job.settings.eval_samples or None,
        "eval": job.config.evaluates,
        "batch_size": job.settings.batch_size,
    }
    return values | resolved | {"device": job.device.type}


def _costs_name(path: str) -> str:
    """Name of the copy in ``reproduce/``, which must not be that of another record."""
    return "costs.csv" if path.lower().endswith(".csv") else "costs.json"


def write_reproduce(job: Job, folder: Path, sensitivity: SensitivityDocument | None) -> None:
    """Add config.yaml, sensitivity.json, the file of costs and package versions to ``reproduce/``."""
    target = folder / "reproduce"
    # The baseline is no part of the output, and without it a regression cannot be judged.
    left_out = {"baseline", "max_regression"}
    config = {k: v for k, v in public_config(job).items() if v is not None and k not in left_out}
    (target / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if job.config.costs is not None and not names_hardware(job.config.costs):
        shutil.copyfile(job.config.costs, target / _costs_name(job.config.costs))
    if sensitivity is not None:
        write_json(target / "sensitivity.json", sensitivity)
    versions = {name: metadata.version(name) for name in _PACKAGES}
    write_json(
        target / "packages.json",
        {"hawqtool": __version__, "python": platform.python_version(), "machine": platform.machine(), **versions},
    )


def write_card(source: Path, folder: Path, report: Report) -> None:
    """Write ``README.md``: the model card, with what the source's own card states."""
    found = sorted(path for path in source.iterdir() if path.name.lower() == "readme.md" and path.is_file())
    readme = None
    if found:
        with found[0].open("rb") as stream:
            readme = stream.read(_MAX_README_BYTES).decode("utf-8", errors="replace")
    (folder / "README.md").write_text(model_card(report, readme), encoding="utf-8")


def is_our_folder(folder: Path) -> bool:
    """Whether a folder holds a report of our schema."""
    try:
        document = load_json(folder / "report.json")
    except ParseError:
        return False
    return isinstance(document, dict) and document.get("schema") == REPORT_SCHEMA


def _num_parameters(job: Job) -> int:
    total = 0
    for info in job.index.tensors.values():
        count = 1
        for extent in info.shape:
            count *= extent
        total += count
    return total


def _peak_memory(job: Job) -> dict[str, int]:
    unit = 1 if sys.platform == "darwin" else _KIB
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if job.device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(job.device)
    if job.offload is not None:
        peak |= {f"hidden states ({place})": size for place, size in job.offload.peak_bytes.items()}
    return peak


def routed_tokens(layers: Mapping[str, LayerRecord]) -> dict[str, list[int]]:
    """Calibration tokens that the router sent to every expert, by block; empty for dense models.

    Args:
        layers: Metrics by layer, as in report.json.

    Returns:
        Name such as ``model.layers.0.mlp.experts`` to the tokens of expert 0, 1, ...
    """
    found: dict[str, dict[int, int]] = {}
    for name, metrics in layers.items():
        expert = expert_of(name)
        if expert:
            found.setdefault(expert[0], {})[expert[1]] = metrics["num_tokens"]
    return {name: [tokens[number] for number in sorted(tokens)] for name, tokens in found.items()}


def routing_warnings(layers: Mapping[str, LayerRecord]) -> list[str]:
    """One line on the experts that lacked calibration tokens, one on those that saw none at all."""
    counts = routed_tokens(layers)
    total = sum(map(len, counts.values()))
    lacking = dict.fromkeys(expert_of(name) for name, metrics in layers.items() if metrics["fallback"])
    unseen = [(name, number) for name, tokens in counts.items() for number, count in enumerate(tokens) if not count]
    warnings = []
    if lacking:
        warnings.append(
            f"{len(lacking)} of {total} experts (first {_first(lacking)}) were routed fewer calibration tokens than "
            "they have input columns, so tokens that were routed to other experts filled up their statistics; more "
            "calibration rows help"
        )
    if unseen:
        warnings.append(
            f"{len(unseen)} of {total} experts (first {_first(unseen)}) were routed no calibration token at all; they "
            "were rounded by the statistics of other experts' tokens alone"
        )
    return warnings


def _first(experts: Any) -> str:
    return ".".join(map(str, next(iter(experts))))


def kept_record(job: Job) -> Kept:
    """The matrices that are kept whatever the settings, by reason and pattern of their names, large ones first."""
    found: dict[tuple[str, str], list[KeptTensor]] = {}
    tables = {table.tensor for table in job.tables}
    for tensor in (tensor for tensor in job.structure.kept if tensor.name not in tables):
        found.setdefault((tensor.reason, tensor.pattern), []).append(tensor)
    return {
        "bytes": sum(t.num_bytes for t in job.structure.kept if t.reason not in EXPECTED),
        "share": kept_share(job.structure.kept, job.index),
        "rows": [
            {
                "reason": reason,
                "count": len(tensors),
                "bytes": sum(t.num_bytes for t in tensors),
                "pattern": pattern,
                "example": tensors[0].name,
            }
            for (reason, pattern), tensors in sorted(
                found.items(), key=lambda item: (-sum(t.num_bytes for t in item[1]), item[0])
            )
        ],
    }


def kept_warnings(kept: Kept) -> list[str]:
    """One line where more of the checkpoint is kept than a user expects."""
    if kept["share"] <= LOUD_SHARE:
        return []
    row = next(row for row in kept["rows"] if row["reason"] not in EXPECTED)
    return [
        f"{100 * kept['share']:.1f} % of the checkpoint stays as it is beside embeddings and head, most of it "
        f"{row['pattern']} ({row['reason']}); --max-kept sets a limit"
    ]
