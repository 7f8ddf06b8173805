"""ablation.py on a tiny model: it measures what a written folder gives and goes on where it was cut."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hawqtool.allocation.problem import stored_bytes
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import prepare
from hawqtool.pipeline.stages.evaluate import Evaluator
from hawqtool.pipeline.stages.rows import evaluation_rows, gather_rows
from hawqtool.pipeline.stages.write import round_to_folder
from hawqtool.records import BitPlan
from hawqtool.runtime.reporter import Silent
from tests.support.runs import settings

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/research"
CONFIGURATIONS = "plain: {}\nrefined: {refine_steps: 20, schedule: {latent_rate: 0.004}}\nwide: {bits: 4}\n"


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import ablation

    return ablation


def arguments(place: Path, folder: Path, text: str, *more: str) -> list[str]:
    (folder / "configurations.yaml").write_text(text)
    paths = [str(place / "model"), str(folder / "out.json"), str(folder / "configurations.yaml")]
    data = ["--calibration", str(place / "text.txt"), "--eval-data", str(place / "other.txt"), "--group-size", "32"]
    return [*paths, *data, "--num-samples", "16", "--seq-len", "32", "--eval-samples", "4", "--device", "cpu", *more]


def test_an_ablation_measures_what_folders_give_and_does_only_what_is_missing(
    ablation: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation.main(arguments(place, tmp_path, CONFIGURATIONS)) == 0
    assert "| refined | " in capsys.readouterr().out
    found = {r["name"]: r for r in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert found["plain"]["bpw"] == found["refined"]["bpw"] == found["wide"]["bpw"] - 1
    assert found["refined"]["row_divergence"] != found["plain"]["row_divergence"]
    assert all(block["error_after"] <= block["error_before"] for block in found["refined"]["refinement"].values())

    config = settings(place, eval_data=place / "other.txt", eval_samples=4)
    job = prepare(config)
    formats = ablation.uniform_formats(job.units, 3, 32, True)
    plan = BitPlan(formats, stored_bytes(job.units, formats), sum(unit.num_weights for unit in job.units))
    bench = ablation.Bench(ablation._parse(arguments(place, tmp_path, CONFIGURATIONS)), Silent())
    rows = bench._rows(bench.job)
    assert len(gather_rows(RunContext(job))["calibration"].tokens) == len(rows.tokens)
    with torch.no_grad():
        round_to_folder(RunContext(job), plan, rows, tmp_path / "plan", "plan")
        evaluator = Evaluator(RunContext(job), {"report": evaluation_rows(job, str(place / "other.txt"), 4)})
        written = evaluator.evaluate(tmp_path / "plan", "plan")["report"]
    assert found["plain"]["row_divergence"] == pytest.approx(written.row_divergence, rel=1e-5)

    rounded: list[str] = []
    measure = ablation.Bench.measure

    def count(self: Any, name: str, *rest: Any) -> Any:
        rounded.append(name)
        return measure(self, name, *rest)

    monkeypatch.setattr(ablation.Bench, "measure", count)
    more = CONFIGURATIONS + "nearest: {rounding: rtn}\n"
    assert ablation.main(arguments(place, tmp_path, more)) == 0
    assert rounded == ["nearest"]
    assert ablation.main(arguments(place, tmp_path, "plain: {rounding: rtn}\n")) == 2
    assert "other keys" in capsys.readouterr().err
    assert ablation.main(arguments(place, tmp_path, CONFIGURATIONS, "--bits", "2")) == 2
    assert "other settings (bits)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "does not map names to keys"),
        ("a: {roundin: rtn}\n", "sets roundin"),
        ("a: {schedule: {rate: 1}}\n", "sets rate"),
        ("a: {seed: 1}\n", "sets seed"),
        ("a: {rounding: awq}\n", "rounding"),
    ],
)
def test_configurations_that_cannot_be(
    ablation: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert ablation.main(arguments(place, tmp_path, text)) == 2
    assert said in capsys.readouterr().err


TOOL = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
model, rows, out = map(Path, sys.argv[1:4])
assert torch.load(rows).shape == (16, 32)
state = load_file(model / "model.safetensors")
state |= {name: tensor * 1.05 for name, tensor in state.items() if name.endswith("down_proj.weight")}
if "state" in sys.argv:
    torch.save(state, f"{out}.pt")
else:
    out.mkdir()
    (out / "config.json").write_text((model / "config.json").read_text())
    save_file(state, out / "model.safetensors", {"format": "pt"})
print("done" if "state" in sys.argv else '{"seconds": 7.5}')
"""


def test_another_tool_is_judged_on_the_same_rows(
    ablation: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tool.py").write_text(TOOL)
    call = f"{sys.executable} {tmp_path / 'tool.py'} {{model}} {{rows}} {{out}}"
    text = f'plain: {{}}\nfolder: {{tool: "{call}"}}\nstate: {{tool: "{call} state"}}\n'
    assert ablation.main(arguments(place, tmp_path, text)) == 0
    table = capsys.readouterr().out
    found = {r["name"]: r for r in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert found["folder"]["seconds"] == 7.5 and found["state"]["seconds"] > 0
    assert found["folder"]["row_divergence"] == found["state"]["row_divergence"]
    assert 0 < found["folder"]["divergence"] != found["plain"]["divergence"]
    assert "| folder | 3.500 | " in table


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("tool {model}", "has no {out}"),
        ("no-such-tool {out}", "no-such-tool cannot be run"),
        (f"{sys.executable} -c \"raise SystemExit('broken')\" {{out}}", "failed with code 1: broken"),
        (f"{sys.executable} -c pass {{out}}", "nothing was written"),
    ],
)
def test_what_is_wrong_with_a_tool_is_said(
    ablation: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    text = f"peer:\n  tool: {json.dumps(command)}\n"
    assert ablation.main(arguments(place, tmp_path, text)) != 0
    assert message in capsys.readouterr().err
