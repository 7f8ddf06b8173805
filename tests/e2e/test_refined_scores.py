"""Scores of roundings as refinement leaves them: the errors are those of a refined block, and scores fall."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hawqtool.formats import QuantFormat
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job
from hawqtool.pipeline.stages import measure as stage
from hawqtool.pipeline.stages.refine import FormatRefiner, fitting_rows, split_rows
from hawqtool.records import MeasurementRows, Menu, Rows
from hawqtool.rounding.learned.block import Schedule, output_error
from hawqtool.sensitivity.measure import SweepSettings, measure, rounding_errors
from hawqtool.sensitivity.measured_kl import single_unit_divergence
from hawqtool.streaming.block import advance
from tests.e2e.test_refinement import job_of
from tests.support.runs import Run, read
from tests.support.tiny_zoo import calibration_inputs, kind_named, save_kind

STEPS = 20


class _SeenError(Exception):
    """Ends a measurement that was looked at."""


def rows_of(count: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 128, (count, 32), generator=torch.Generator().manual_seed(seed))


def menu_of(job: Job, *widths: int) -> Menu:
    return {unit.name: tuple(QuantFormat(bits, 32, job.config.symmetric) for bits in widths) for unit in job.units}


def refiner_of(job: Job, rows: Tensor, steps: int = STEPS) -> FormatRefiner:
    return FormatRefiner(job, job.stream(), rows, Schedule(steps))


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mixtral"])
def test_errors_are_those_of_a_block_with_a_smaller_output_error(name: str, tmp_path: Path) -> None:
    kind = kind_named(name)
    job = job_of(save_kind(kind, tmp_path / "source"), refine_steps=0)
    rows = torch.cat([calibration_inputs(kind, seed) for seed in range(4, 10)])
    menu, stream, held = menu_of(job, 2, 3), job.stream(), split_rows(rows)[1]
    known, seen = stream.embed(split_rows(rows)[0], 16), stream.embed(held, len(held))
    linears = job.structure.blocks[0].linears
    with stream.block(0) as block, torch.no_grad():
        originals = {linear: block.weight(linear).clone() for linear in linears}
        target = block.run(seen.hidden[0], seen.calls[0][0])
        for label in ("w2g32", "w3g32"):
            found = []
            for refiner in (None, refiner_of(job, rows)):
                errors = rounding_errors(block, known, job.rounding(menu, refiner))
                assert all(torch.equal(block.weight(linear), w) for linear, w in originals.items())
                with block.with_weights({m.name: w + errors[m.name][label] for m, w in originals.items()}):
                    found.append(float(output_error(block.run(seen.hidden[0], seen.calls[0][0]), target)))
                assert all(torch.equal(block.weight(linear), w) for linear, w in originals.items())
            assert found[1] < found[0]


def test_no_steps_change_nothing(place: Path) -> None:
    job = job_of(place / "model", refine_steps=0)
    rows, stream, menu = rows_of(8), job.stream(), menu_of(job, 3)
    known = stream.embed(split_rows(rows)[0], 4)
    with stream.block(1) as block:
        plain, same = (
            rounding_errors(block, known, job.rounding(menu, refiner)) for refiner in (None, refiner_of(job, rows, 0))
        )
    assert all(torch.equal(plain[name]["w3g32"], same[name]["w3g32"]) for name in plain)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_what_is_scored_are_those_errors(place: Path, batch_size: int) -> None:
    """In the sweeps, with Gram matrices kept or found again, and one unit at a time."""
    job = job_of(place / "model", refine_steps=0)
    calibration, scoring, menu = rows_of(16), rows_of(4, 2), menu_of(job, 2)
    fitting = fitting_rows(Rows(calibration, "test", "-"))
    rows, stream = MeasurementRows(fitting, scoring, batch_size), job.stream()
    known, norms = stream.embed(fitting.tokens, batch_size), dict[str, float]()
    with torch.no_grad():
        for spec in job.structure.blocks:
            with stream.block(spec.index) as block:
                refiner = refiner_of(job, calibration)
                errors = rounding_errors(block, known, job.rounding(menu, refiner))
                norms |= {name: float(by_label["w2g32"].square().sum()) for name, by_label in errors.items()}
                advance(block, known)
    found = [
        measure(job.stream(), rows, job.rounding(menu, some), SweepSettings(0), lambda *_: None)
        for some in (refiner_of(job, calibration), None)
    ]
    for name, expected in norms.items():
        assert found[0].error_norms[name]["w2g32"] == pytest.approx(expected, rel=1e-5)
    single = [
        single_unit_divergence(job.stream(), rows, job.rounding(menu, some), lambda *_: None)
        for some in (refiner_of(job, calibration), None)
    ]
    # Where no step is better, a block keeps its rounding; not so in every block of this model.
    assert any(found[1].error_norms[name]["w2g32"] != pytest.approx(norms[name], rel=1e-3) for name in norms)
    assert any(single[0][unit]["w2g32"].value != single[1][unit]["w2g32"].value for unit in menu)


def test_held_out_rows_only_stop_the_learning(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Gram matrix and no score has seen them."""
    job = job_of(place / "model", refine_steps=2, sensitivity_steps=2)
    calibration = Rows(rows_of(16), "test", "-", {name: torch.ones(16, 32) for name in job.structure.linears})
    seen: list[MeasurementRows] = []

    def noted(_stream: object, rows: MeasurementRows, *_: object) -> None:
        seen.append(rows)
        raise _SeenError

    monkeypatch.setattr(stage, "measure", noted)
    monkeypatch.setattr(stage, "single_unit_divergence", noted)
    sets = {"calibration": calibration, "scoring": Rows(rows_of(4, 2), "test", "-")}
    with pytest.raises(_SeenError):
        stage.measure_job(RunContext(job), menu_of(job, 2), sets)
    with pytest.raises(_SeenError):
        stage.single_unit_scores(RunContext(job), menu_of(job, 2), calibration, sets["scoring"])
    fitting, held = split_rows(calibration.tokens)
    for rows in seen:
        assert torch.equal(rows.calibration.tokens, fitting) and rows.calibration.importance is not None
        assert all(len(part) == len(fitting) for part in rows.calibration.importance.values())
    stream, refiner = job.stream(), refiner_of(job, calibration.tokens)
    walked = stream.embed(held, refiner.batch_rows)
    for spec, states in zip(job.structure.blocks, refiner.held_out, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(states, walked.hidden, strict=True))
        with stream.block(spec.index) as block:
            advance(block, walked)


def test_a_whole_run(run: Run, place: Path) -> None:
    folder, report = run(bits="2,4", target_bpw=4.0, refine_steps=8, sensitivity_steps=4)
    assert read(folder / "reproduce/sensitivity.json")["settings"]["sensitivity_steps"] == 4
    assert report["evaluation"]["mixed"]["kl"] > 0
