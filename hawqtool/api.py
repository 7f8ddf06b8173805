"""Public functions: what the commands do, for Python programs.

They write nothing to the terminal, and every expected failure is a `hawqtool.errors.HawqError`. Settings are those of
the configuration (`hawqtool.config.RunConfig`), checked as the command line checks them: paths or texts, sequences or
texts with commas; ``preset`` names settings to begin with.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hawqtool.config import RunConfig, load_config
from hawqtool.report.documents import EvaluationDocument, PlanDocument, SensitivityDocument
from hawqtool.report.schema import Report
from hawqtool.runtime.reporter import Silent

if TYPE_CHECKING:
    from hawqtool.export.verify import VerifyReport

Location = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]
"""Called with a stage, the steps of it that are done, and all of them."""


@dataclass(frozen=True)
class Result:
    """A quantized checkpoint.

    Args:
        folder: Where it lies: weights, model card, ``report.json``, ``report.html``, ``reproduce/``.
        report: The content of ``report.json`` (docs/output.md).
        plan: The content of ``reproduce/plan.json``: format and bytes of every layer.
    """

    folder: Path
    report: Report
    plan: PlanDocument

    @property
    def passed(self) -> bool:
        """Whether all quality gates that were set are passed."""
        return all(gate["passed"] for gate in self.report["gates"])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the result."""
        return tuple(self.report["warnings"])


def quantize(model: Location, output: Location, *, progress: Progress | None = None, **settings: Any) -> Result:
    """Quantize a checkpoint: measure, allocate, round, write, evaluate and verify.

    Args:
        model: Folder of the original checkpoint, or its name on the hub.
        output: Folder to create.
        progress: Called as the work goes on.
        settings: Further settings, one target among them (``target_bpw``, ``target_size``, ``target_kl`` or ``plan``).

    Returns:
        The result. A gate that fails is no error: see `Result.passed`.

    Raises:
        HawqError: If a setting, the model or the text cannot be used, or memory, disk or numbers fail.
    """
    config = _config(model=model, output=output, **settings)
    from hawqtool.pipeline.quantize import run_quantize
    from hawqtool.pipeline.run.files import PLAN_SCHEMA, read_json

    report = run_quantize(config, _call("quantize", config), _Callback(progress), lambda _: None)
    folder = Path(output)
    plan = cast(PlanDocument, read_json(folder / "reproduce" / "plan.json", PLAN_SCHEMA))
    return Result(folder, report, plan)


def measure(
    model: Location, output: Location, *, progress: Progress | None = None, **settings: Any
) -> SensitivityDocument:
    """Measure the sensitivity of every unit to every format.

    Args:
        model: Folder of the original checkpoint, or its name on the hub.
        output: File to write, such as ``sensitivity.json``.
        progress: Called as the work goes on.
        settings: Further settings, such as ``bits`` and ``calibration``.

    Returns:
        The content of the file (docs/output.md).

    Raises:
        HawqError: As for `quantize`.
    """
    config = _config(model=model, **settings)
    from hawqtool.pipeline.measure import run_measure

    return run_measure(config, Path(output), _Callback(progress))


def allocate(sensitivity: Location, output: Location, **settings: Any) -> PlanDocument:
    """Allocate bits within a budget by a saved measurement; the model is not needed.

    Args:
        sensitivity: File that `measure` wrote.
        output: File to write, such as ``plan.json``, which `quantize` takes as ``plan``.
        settings: Further settings, ``target_bpw`` or ``target_size`` among them.

    Returns:
        The content of the file (docs/output.md).

    Raises:
        HawqError: If the budget cannot be met, or the file or a setting cannot be used.
    """
    config = _config(model=sensitivity, **settings)
    from hawqtool.pipeline.allocate import run_allocate

    return run_allocate(config, Path(sensitivity), Path(output), Silent())


def evaluate(
    folder: Location, model: Location, eval_data: Location, *, progress: Progress | None = None, **settings: Any
) -> EvaluationDocument:
    """Evaluate a quantized checkpoint against its original: divergence, perplexity, agreement of the likeliest token.

    Args:
        folder: What `quantize` wrote.
        model: The original.
        eval_data: Text that was not used for calibration.
        progress: Called as the work goes on.
        settings: Further settings, such as ``eval_samples`` and ``seq_len``.

    Returns:
        The figures of both (docs/output.md).

    Raises:
        HawqError: If the folder is of another model, or there is too little text.
    """
    config = _config(model=model, eval_data=eval_data, **settings)
    from hawqtool.pipeline.evaluate import run_evaluate

    return run_evaluate(config, Path(folder), _Callback(progress))


def verify(folder: Location, against: Location | None = None) -> VerifyReport:
    """Verify a quantized checkpoint: every tensor, its sizes, its checksums and its configuration.

    Args:
        folder: What `quantize` wrote.
        against: The original, whose tensors that were copied must be the same.

    Returns:
        The problems that were found, as ``problems``, and what was looked at.

    Raises:
        HawqError: If one of the two is no checkpoint.
    """
    from hawqtool.checkpoint.source import locate
    from hawqtool.export.verify import verify_folder

    return verify_folder(Path(folder), None if against is None else locate(os.fspath(against)).folder)


class _Callback(Silent):
    """Hands progress to a callback, and says nothing."""

    def __init__(self, progress: Progress | None) -> None:
        super().__init__()
        self._progress = progress

    def progress(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, total)


def _config(preset: str | None = None, **settings: Any) -> RunConfig:
    return load_config(None, {name: _plain(value) for name, value in settings.items()}, preset)


def _plain(value: Any) -> Any:
    """A setting as the configuration has it: paths are texts there."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _call(function: str, config: RunConfig) -> str:
    """The call as the report states it, without the folders of paths, which say where a machine keeps its files."""
    given = config.model_dump(mode="json", include=config.model_fields_set)
    return f"hawqtool.{function}({', '.join(f'{name}={_short(value)!r}' for name, value in given.items())})"


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(part) for part in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value
