"""``hawqtool config``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
import yaml

from hawqtool.cli import options as o
from hawqtool.cli.session import print_json, session
from hawqtool.report.escape import one_line

CONFIG_SCHEMA = "hawqtool.config/1"
DEFAULT, FILE, FLAG, MISSING = "default", "file", "flag", "missing"


def config(
    model: o.Model = None,
    output: o.Output = None,
    target_bpw: o.TargetBpw = None,
    target_size: o.TargetSize = None,
    target_kl: o.TargetKl = None,
    plan: o.Plan = None,
    costs: o.Costs = None,
    max_cost: o.MaxCost = None,
    max_kl: o.MaxKl = None,
    max_ppl_increase: o.MaxPplIncrease = None,
    min_same_top: o.MinSameTop = None,
    max_size: o.MaxSize = None,
    max_fallbacks: o.MaxFallbacks = None,
    baseline: o.Baseline = None,
    max_regression: o.MaxRegression = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    extra_group_sizes: o.ExtraGroupSizes = None,
    symmetric: o.Symmetric = None,
    profile: o.Profile = None,
    pin: o.Pin = None,
    ignore: o.Ignore = None,
    quantize_lm_head: o.QuantizeLmHead = None,
    calibration: o.Calibration = None,
    num_samples: o.NumSamples = None,
    seq_len: o.SeqLen = None,
    eval_data: o.EvalData = None,
    eval_samples: o.EvalSamples = None,
    sensitivity: o.Sensitivity = None,
    shortlist: o.Shortlist = None,
    swaps: o.Swaps = None,
    measurements: o.Measurements = None,
    extra_metrics: o.ExtraMetrics = None,
    probes: o.Probes = None,
    eigenvalues: o.Eigenvalues = None,
    solver: o.Solver = None,
    rounding: o.Rounding = None,
    foem_beta: o.FoemBeta = None,
    gptaq_alpha: o.GptaqAlpha = None,
    target_shift: o.TargetShift = None,
    scale_refit: o.ScaleRefit = None,
    refine_steps: o.RefineSteps = None,
    sensitivity_steps: o.SensitivitySteps = None,
    distill_steps: o.DistillSteps = None,
    distill_codes: o.DistillCodes = None,
    token_importance: o.TokenImportance = None,
    damping: o.Damping = None,
    scale_sign: o.ScaleSign = None,
    device: o.Device = None,
    batch_size: o.BatchSize = None,
    max_memory: o.MaxMemory = None,
    seed: o.Seed = None,
    trust_remote_code: o.TrustRemoteCode = None,
    overwrite: o.Overwrite = None,
    resume: o.Resume = None,
    config: o.Config = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="A JSON schema of the YAML file, for editors.", rich_help_panel=o.RUN)
    ] = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Print the settings that quantize would take, as YAML, each with its origin: default, file or flag.

    null means that the run decides, by the device or the target, as the help of the flag says.

    Example: hawqtool config -c configs/balanced.yaml --seed 1

    Example: hawqtool config --schema > hawqtool.schema.json
    """
    values: dict[str, Any] = {k: v for k, v in locals().items() if k not in _NOT_CONFIG}
    with session(debug=debug, json=json):
        if schema:
            print_json(config_schema())
            return
        document = resolved(config, values)
        if json:
            print_json(document)
        else:
            print(_as_yaml(document))


_NOT_CONFIG = {"config", "schema", "json", "debug"}


def resolved(path: Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Every key with its value and origin; a recipe needs no model here.

    Raises:
        UsageError: If file or flags are wrong.
    """
    from hawqtool.config import load_config, read_yaml

    given = {key: value for key, value in flags.items() if value is not None}
    from_file = {} if path is None else read_yaml(path)
    missing = {"model": MISSING} if "model" not in given.keys() | from_file.keys() else {}
    values = load_config(path, given | missing).model_dump(mode="json")
    values |= dict.fromkeys(missing)
    origin = dict.fromkeys(values, DEFAULT) | dict.fromkeys(from_file, FILE) | dict.fromkeys(given, FLAG) | missing
    return {"schema": CONFIG_SCHEMA, "file": None if path is None else str(path), "config": values, "origin": origin}


def _as_yaml(document: Mapping[str, Any]) -> str:
    """A file for ``-c`` that gives the same configuration; origins are comments."""
    origin = {FILE: f"file {one_line(document['file'])}", MISSING: "not given; quantize needs it"}
    lines = {key: _line(key, value) for key, value in document["config"].items()}
    # What is missing must not be taken for a value.
    lines |= {key: f"# {key}:" for key, source in document["origin"].items() if source == MISSING}
    width = min(max(map(len, lines.values())), 40)
    return "\n".join(
        f"{line:{width}}  # {origin.get(document['origin'][key], document['origin'][key])}"
        for key, line in lines.items()
    )


def _line(key: str, value: object) -> str:
    """``key: value`` in one line."""
    # Only double quotes keep a line break of a text in one line.
    broken = any("\n" in item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))
    text: str = yaml.safe_dump(
        [value], default_flow_style=True, default_style='"' * broken or None, width=float("inf"), allow_unicode=True
    )
    return f"{key}: {text.strip()[1:-1]}"


def config_schema() -> dict[str, Any]:
    """JSON schema of a configuration file; what a key means is the help of its flag."""
    from hawqtool.config import RunConfig

    document = RunConfig.model_json_schema()
    # Any key may be given as a flag instead.
    document.pop("required")
    hints = get_type_hints(config, include_extras=True)
    for key, entry in document["properties"].items():
        entry.pop("title")
        (option,) = hints[key].__metadata__
        entry["description"] = option.help.replace("\\[", "[")
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hawqtool run"}
    return about | {key: value for key, value in document.items() if key != "title"}
