"""``hawqtool measure``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hawqtool.cli import options as o
from hawqtool.cli.session import decide_hub_access, print_json, session


def measure(
    model: o.Model = None,
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")] = "sensitivity.json",
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
    rounding: o.Rounding = None,
    foem_beta: o.FoemBeta = None,
    sensitivity: o.MeasuredMetric = None,
    measurements: o.Measurements = None,
    gptaq_alpha: o.GptaqAlpha = None,
    target_shift: o.TargetShift = None,
    scale_refit: o.ScaleRefit = None,
    sensitivity_steps: o.SensitivitySteps = None,
    extra_metrics: o.ExtraMetrics = None,
    probes: o.Probes = None,
    eigenvalues: o.Eigenvalues = None,
    token_importance: o.TokenImportance = None,
    damping: o.Damping = None,
    scale_sign: o.ScaleSign = None,
    device: o.Device = None,
    batch_size: o.BatchSize = None,
    max_memory: o.MaxMemory = None,
    seed: o.Seed = None,
    trust_remote_code: o.TrustRemoteCode = None,
    resume: o.Resume = None,
    config: o.Config = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Score every unit in every width with fisher, kron, projection and hawq-ggn; write sensitivity.json.

    It chooses nothing: --extra-metrics adds hawq and kl, as does sensitivity: hawq or kl in a file of -c.

    Example: hawqtool measure ./model -o sensitivity.json --bits 2,3,4,8 --group-size 64

    Example: hawqtool measure ./model --extra-metrics hawq --probes 16 --eigenvalues 20
    """
    values: dict[str, Any] = {
        k: v for k, v in locals().items() if k not in {"output", "config", "json", "quiet", "debug"}
    }
    with session(quiet, debug, json) as terminal:
        from hawqtool.config import load_config

        settings = load_config(config, values)
        decide_hub_access(settings.data_sources)

        from hawqtool.pipeline.measure import run_measure

        document = run_measure(settings, Path(output), terminal)
        terminal.close()
        if json:
            print_json(document)
        else:
            print(f"{len(document['units'])} units scored with {', '.join(document['scores'])}: {output}")
