"""What a study works on, and the file in which it keeps what it has found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hawqtool.config import RunConfig
from hawqtool.data.tokens import fingerprint as rows_fingerprint
from hawqtool.errors import InputError, UsageError
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.files import read_json, write_json
from hawqtool.pipeline.run.identity import model_fingerprint
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.run.menu import format_menu
from hawqtool.pipeline.stages.rows import gather_rows
from hawqtool.pipeline.stages.token_importance import with_token_importance
from hawqtool.records import Menu, Rows
from hawqtool.runtime.reporter import Reporter, Silent

SCHEMA = "hawqtool.study/2"
"""``[unit][format label]``."""


@dataclass(frozen=True)
class Setting:
    """Model, rows and formats.

    Args:
        job: The model.
        calibration: Rows behind the rounding.
        scoring: Rows behind the scores.
        heldout: Rows on which predictions and plans are judged; neither of the others.
        bits: Widths.
    """

    job: Job
    calibration: Rows
    scoring: Rows
    heldout: Rows
    bits: tuple[int, ...]

    @cached_property
    def menu(self) -> Menu:
        """Formats by unit, by rising width."""
        return format_menu(self.job.units, self.bits, self.job.config)

    @property
    def identity(self) -> dict[str, Any]:
        """What results depend on; others may not be mixed with them."""
        config = self.job.config
        return {
            "model": self.job.source.name,
            "model_fingerprint": model_fingerprint(self.job.index, Silent()),
            "device": self.job.device.type,
            "dtype": str(self.job.dtype).removeprefix("torch."),
            "bits": list(self.bits),
            "group_size": config.group_size,
            "extra_group_sizes": list(config.extra_group_sizes),
            "rounding": config.rounding,
            "target_shift": self.job.settings.method.shift,
            "token_importance": self.job.settings.uses_token_importance,
            "profile": config.profile,
            "ignore": list(config.ignore),
            "seed": config.seed,
            "probes": config.probes,
            "batch_size": self.job.settings.batch_size,
            "rows": {
                role: {"source": rows.source, "shape": list(rows.tokens.shape), "fingerprint": rows.fingerprint}
                for role, rows in (
                    ("calibration", self.calibration),
                    ("scoring", self.scoring),
                    ("heldout", self.heldout),
                )
            },
        }


def prepare_setting(
    values: Mapping[str, Any], bits: tuple[int, ...], scoring: int, scoring_len: int, reporter: Reporter
) -> Setting:
    """Model and rows of a study.

    Args:
        values: Keys of the configuration; ``num_samples`` are the calibration rows.
        bits: Widths to study.
        scoring: Scoring rows, which come from the calibration source too.
        scoring_len: Tokens of one; at most those of a calibration row.
        reporter: Narration.
    """
    wanted = int(values["num_samples"])
    length = int(values["seq_len"])
    # A run keeps rows to score and to select by; here they are scored on, with further calibration rows as needed.
    others = -(-scoring * scoring_len // length)
    extra = max(0, others - 2 * max(8, wanted // 16))
    job = prepare(RunConfig(**{**values, "num_samples": wanted + extra}), reporter)
    sets = gather_rows(RunContext(job, reporter))
    source, tokens = sets["calibration"].source, sets["calibration"].tokens
    rest = torch.cat([tokens[wanted:], sets["scoring"].tokens, sets["selection"].tokens])
    parts = tokens[:wanted], rest.reshape(-1, scoring_len)[:scoring]
    calibration, judged = (Rows(part.clone(), source, rows_fingerprint(part)) for part in parts)
    return Setting(job, with_token_importance(RunContext(job, reporter), calibration), judged, sets["report"], bits)


class Findings:
    """``study.json``: everything found so far, written after each step so that a run may be cut and repeated.

    Args:
        path: The file.
        identity: What its results depend on.

    Raises:
        UsageError: If the file holds results of other settings.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "settings": json.loads(json.dumps(identity)),
            "scores": {},
            "truth": None,
            "measure": None,
            "agreement": {},
            "cost": {},
            "plans": {},
            "evaluations": {},
            "swapped": {},
        }
        if not path.exists():
            return
        found = read_json(path, SCHEMA)
        wanted = self.data["settings"]
        other = sorted(key for key in wanted if found.get("settings", {}).get(key) != wanted[key])
        if other:
            raise UsageError(f"{path} holds results of other settings ({', '.join(other)}); choose another folder")
        if found.keys() != self.data.keys():
            raise InputError(f"{path} is damaged; remove it")
        self.data = found

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, self.data)
