"""The command line: exit codes, streams, and what is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hawqtool import __version__
from hawqtool.cli.app import app
from tests.support.forked import Forks
from tests.support.tiny import tiny_llama

COMMANDS = ("quantize", "measure", "allocate", "evaluate", "verify", "inspect", "report", "config")
SMALL = (
    *("--num-samples", "8", "--seq-len", "16", "--group-size", "32", "--device", "cpu"),
    *("--eval-samples", "4", "--selection-samples", "8"),
)
TARGET = ("--bits", "4", "--target-bpw", "4.5")
INSTALLED = Path(sys.executable).parent / "hawqtool"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    generator = random.Random(0)
    for name in ("text.txt", "other.txt"):
        (folder / name).write_text("".join(generator.choices("abcdefgh ", k=1200)))
    tiny_llama(folder / "model")
    return folder


@pytest.fixture(scope="module")
def packed(place: Path) -> Path:
    """A quantized folder that nobody may change."""
    result = quantize(place, place / "packed", *TARGET)
    assert result.exit_code == 0, result.stderr
    return place / "packed"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def quantize(place: Path, output: Path, *options: object) -> Result:
    text = place / "text.txt"
    return invoke("quantize", place / "model", "-o", output, "--calibration", text, *SMALL, *options)


def installed(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([INSTALLED, *map(str, arguments)], capture_output=True, text=True, timeout=900, check=False)


def tampered(folder: Path, target: Path) -> Path:
    """A copy with one scale changed."""
    subprocess.run(["cp", "-r", folder, target], check=True)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"][0, 0] *= 1.5
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


# The installed command.


def test_an_unknown_key_names_the_nearest(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("target_bwp: 4.5\nnum_sample: 3\n")
    done = installed("quantize", place / "model", "-o", tmp_path / "out", "-c", tmp_path / "run.yaml")
    assert done.returncode == 2
    assert "'target_bwp'" in done.stderr and "did you mean 'target_bpw'" in done.stderr
    assert "did you mean 'num_samples'" in done.stderr
    assert done.stdout == ""


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    done = installed("quantize", tmp_path / "nowhere", "-o", tmp_path / "out", "--target-bpw", "4.5")
    assert done.returncode == 4
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ") and "nowhere" in done.stderr


def test_help_starts_without_torch() -> None:
    code = "import sys; import hawqtool.cli.app; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing_behind(
    place: Path, tmp_path: Path, forks: Forks, number: signal.Signals, code: int
) -> None:
    model = tiny_llama(tmp_path / "model", layers=40)
    output = tmp_path / "work" / "out"
    output.parent.mkdir()
    command = forks.start("quantize", model, "-o", output, "--calibration", place / "text.txt", *SMALL, *TARGET)
    # The temporary folder appears when rounding begins: the run is then in the middle of its work.
    while not list(output.parent.iterdir()) and not command.ended:
        time.sleep(0.005)
    assert not command.ended, command.wait().stderr
    assert not output.exists()
    os.kill(command.process_id, number)
    done = command.wait()
    stderr = done.stderr
    assert done.returncode == code, stderr
    assert done.stdout == ""
    assert "Traceback" not in stderr
    kept = list(output.parent.iterdir())  # finished work, on a machine that was slow to look
    assert kept == [] or (kept == [output.with_name(".out.hawqtool")] and "the same command goes on" in stderr), stderr


# In process.


def test_dry_run_prints_json_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    done = invoke("quantize", place / "model", "-o", tmp_path / "out", "--dry-run", "--json", *SMALL, *TARGET)
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "hawqtool.dryrun/1"
    assert document["expected_is_exact"] and document["expected_bytes"] < document["original_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_version_and_help() -> None:
    assert invoke("--version").stdout.strip() == f"hawqtool {__version__}"
    text = invoke("--help").stdout
    assert all(command in text for command in COMMANDS)
    for command in COMMANDS:
        shown = invoke(command, "--help")
        assert shown.exit_code == 0
        assert "Example: hawqtool" in shown.stdout


USAGE: dict[str, tuple[Sequence[str], str]] = {
    "two targets": (("--target-bpw", "4.5", "--target-size", "1MB"), "--target-bpw and --target-size"),
    "no target": ((), "found none"),
    "infeasible": (("--bits", "3,4", "--target-bpw", "2"), "3.500 to 4.500"),
    "tiny size": (("--bits", "3,4", "--target-size", "1kB"), "target of 1,000 bytes, while "),
    "pin without match": ((*TARGET, "--pin", "re:.*nothing=8"), "matches none"),
    "pin without width": ((*TARGET, "--pin", "re:.*down_proj"), "NAME=WIDTH"),
    "ignore without match": ((*TARGET, "--ignore", "down_proj"), "given as re:.*down_proj"),
    "bad bits": (("--bits", "4,9", "--target-bpw", "4.5"), "widths from 2 to 8"),
    "bits no number": (("--bits", "four", "--target-bpw", "4.5"), "widths from 2 to 8"),
    "bad group": ((*TARGET, "--group-size", "40"), "32, 64, 128, channel, or another multiple of 16"),
    "bad size": (("--target-size", "12 apples"), "is no size"),
    "portable": (("--bits", "3,4", "--target-bpw", "4", "--profile", "portable"), "4 and 8 only"),
    "asymmetric": ((*TARGET, "--asymmetric"), "--profile vllm accepts"),
    "asymmetric, portable": ((*TARGET, "--asymmetric", "--profile", "portable"), "profile portable takes symmetric"),
    "negative target": (("--target-bpw", "-1"), "target_bpw"),
    "infinite target": (("--target-bpw", "inf"), "target_bpw"),
    "no bits": (("--target-bpw", "4", "--bits", ""), "widths from 2 to 8"),
    "unknown option": ((*TARGET, "--nonsense"), "nonsense"),
}


@pytest.mark.parametrize("case", sorted(USAGE))
def test_usage_errors_exit_2(place: Path, tmp_path: Path, case: str) -> None:
    options, reason = USAGE[case]
    result = quantize(place, tmp_path / "out", *options)
    assert result.exit_code == 2, result.stderr
    assert reason in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_all_problems_are_reported_at_once(place: Path, tmp_path: Path) -> None:
    result = quantize(place, tmp_path / "out", "--bits", "9", "--target-bpw", "-1", "--rounding", "magic")
    assert result.exit_code == 2
    assert all(key in result.stderr for key in ("bits", "target_bpw", "rounding"))


def test_an_output_in_use_is_left_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    for options, reason in (((), "not empty"), (("--overwrite",), "not made by hawqtool")):
        result = quantize(place, tmp_path / "out", *TARGET, *options)
        assert result.exit_code == 2
        assert reason in result.stderr
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_calibration_is_repeatable_and_a_list_in_yaml(place: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("abc " * 20)
    weighted = f"{tmp_path / 'few.txt'}=3"
    result = quantize(place, tmp_path / "out", *TARGET, "--calibration", weighted)
    assert result.exit_code == 4
    assert "few.txt holds 5 rows of 16 tokens, 25 are needed (6 calibration, 12 scoring" in result.stderr
    run = tmp_path / "run.yaml"
    run.write_text(f"calibration:\n- {place / 'text.txt'}\n- {weighted}\n")
    again = invoke("quantize", place / "model", "-o", tmp_path / "out", "-c", run, *SMALL, *TARGET)
    # What it takes is estimated by a rate that is measured each time.
    said, before = (
        [x for x in r.stderr.splitlines() if not x.startswith(("takes ", "at work"))] for r in (again, result)
    )
    assert again.exit_code == 4 and said == before
    result = quantize(place, tmp_path / "out", *TARGET, "--calibration", "self=0")
    assert result.exit_code == 2 and "expected weights above 0" in result.stderr


def test_input_errors_exit_4(place: Path, tmp_path: Path) -> None:
    result = quantize(place, tmp_path / "out", *TARGET, "--num-samples", "500")
    assert result.exit_code == 4
    assert "75 rows of 16 tokens" in result.stderr
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    result = quantize(place, tmp_path / "out", *TARGET, "--calibration", tmp_path / "binary.txt")
    assert result.exit_code == 4 and "not UTF-8" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["binary.txt"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("quantize", "model", "--bitz", "3"), ["error: no such option: --bitz", "--bits", "--help lists"]),
        (("quantize", "model", "--num-samples", "x"), ["error: invalid value for '--num-samples'"]),
        (("quantize", "--bits"), ["error: option '--bits' requires an argument; --help"]),
        (("quantise",), ["error: no such command 'quantise'"]),
    ],
    ids=lambda given: given[-1] if isinstance(given, tuple) else "",
)
def test_what_cannot_be_parsed_is_one_line(given: tuple[str, ...], told: list[str]) -> None:
    result = invoke(*given)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert all(part in line for part in told)


def test_an_empty_list_of_bits_exits_2(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("bits: []\ntarget_bpw: 4\n")
    result = quantize(place, tmp_path / "out", "-c", tmp_path / "run.yaml")
    assert result.exit_code == 2 and "widths from 2 to 8" in result.stderr


@pytest.mark.parametrize("source", ["text", "self"])
@pytest.mark.parametrize("options", [TARGET, ("--bits", "3,4", "--target-bpw", "4")])
def test_weights_that_are_not_finite_exit_5(place: Path, tmp_path: Path, source: str, options: tuple[str, ...]) -> None:
    model = tiny_llama(tmp_path / "nan")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    text = place / "text.txt" if source == "text" else "self"
    result = invoke("quantize", model, "-o", tmp_path / "out", "--calibration", text, *SMALL, *options)
    assert result.exit_code == 5, result.stderr
    assert "NaN" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["nan"]


def test_an_output_file_that_cannot_be_created_exits_2(place: Path, tmp_path: Path) -> None:
    result = invoke("measure", place / "model", "-o", tmp_path / "missing/s.json", *SMALL[:-4])
    assert result.exit_code == 2 and "does not exist" in result.stderr
    result = invoke("measure", place / "model", "-o", tmp_path / "s.json", "--ignore", "re:.*", *SMALL[:-4])
    assert result.exit_code == 2 and "every layer is ignored" in result.stderr and not any(tmp_path.iterdir())
    result = invoke("measure", place / "model", "-o", tmp_path, *SMALL[:-4])
    assert result.exit_code == 2 and "is a folder" in result.stderr


def test_flags_win_over_yaml(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("target-bpw: 3.5\nbits: [3]\ngroup_size: 32\n")
    arguments = ("quantize", place / "model", "-c", tmp_path / "run.yaml", "--dry-run", "--json")
    first, second = (json.loads(invoke(*arguments, *more).stdout) for more in ((), TARGET))
    assert (first["widths"], first["budget_bpw"]) == ([3], 3.5)
    assert (second["widths"], second["budget_bpw"]) == ([4], 4.5)


def test_verify_exits_0_or_4(place: Path, packed: Path, tmp_path: Path) -> None:
    good = invoke("verify", packed, "--against", place / "model")
    assert good.exit_code == 0
    assert "no problem found" in good.stdout
    plain = invoke("verify", tampered(packed, tmp_path / "worse"))
    lines = plain.stdout.splitlines()
    assert plain.exit_code == 4 and len(lines) >= 1 and "\\n" not in plain.output
    assert f"{len(lines)} problems in" in plain.stderr and len(plain.stderr.splitlines()) == 1
    bad = invoke("verify", tampered(packed, tmp_path / "bad"), "--against", place / "model", "--json")
    assert bad.exit_code == 4
    assert "up_proj" in bad.stderr
    assert any("up_proj" in problem for problem in json.loads(bad.stdout)["problems"])
    assert invoke("verify", tmp_path / "nowhere").exit_code == 4


def test_the_result_is_printed_on_stdout_and_narration_is_not(packed: Path, place: Path, tmp_path: Path) -> None:
    result = quantize(place, tmp_path / "out", *TARGET)
    assert result.exit_code == 0, result.stderr
    assert "shipped" in result.stdout and "verified" in result.stdout
    assert "budget" in result.stderr and "budget" not in result.stdout
    quiet = quantize(place, tmp_path / "quiet", *TARGET, "--quiet", "--json")
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)["schema"] == "hawqtool.report/2"


def parsed(*arguments: object) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


def test_the_stages_chain_through_files(place: Path, tmp_path: Path) -> None:
    model, text, other = place / "model", place / "text.txt", place / "other.txt"
    scores, plan, output = tmp_path / "s.json", tmp_path / "p.json", tmp_path / "out"
    rows = ("--num-samples", "8", "--seq-len", "16", "--device", "cpu", "--calibration", text)
    group = ("--group-size", "32", "--bits", "2,3,4,8")
    measured = parsed("measure", model, "-o", scores, *rows, *group)
    assert measured == json.loads(scores.read_text())
    assert set(measured["scores"]) == {"fisher", "kron", "projection", "hawq-ggn"}
    allocated = parsed("allocate", scores, "-o", plan, "--target-bpw", "4", *group)
    assert allocated == json.loads(plan.read_text())
    assert allocated["bpw_linears"] <= 4
    report = parsed("quantize", model, "-o", output, "--plan", plan, *rows, "--eval-data", other, "--eval-samples", "4")
    assert report["shipped"] == "mixed"
    chosen, shipped = ({e["name"]: e["bits"] for e in entries} for entries in (allocated["layers"], report["plan"]))
    assert chosen == shipped
    options = ("--against", model, "--eval-data", other, "--eval-samples", "4", "--seq-len", "16", "--device", "cpu")
    evaluated = parsed("evaluate", output, *options)
    assert evaluated["schema"] == "hawqtool.evaluation/1"
    assert evaluated["quantized"]["kl"] == pytest.approx(report["evaluation"]["mixed"]["kl"], rel=1e-6)
    assert evaluated["original"]["kl"] == pytest.approx(0, abs=1e-6)
    assert "perplexity" in invoke("evaluate", output, *options).stdout


def test_measured_divergence_is_a_metric_where_it_is_asked_for(place: Path, tmp_path: Path) -> None:
    scores, plan = tmp_path / "s.json", tmp_path / "p.json"
    rows = ("--num-samples", "8", "--seq-len", "16", "--device", "cpu", "--calibration", place / "text.txt")
    group = ("--group-size", "32", "--bits", "2,8")
    measured = parsed("measure", place / "model", "-o", scores, *rows, *group, "--extra-metrics", "kl")
    assert set(measured["scores"]) == {"fisher", "kron", "projection", "hawq-ggn", "kl"}
    assert set(measured["scores"]["kl"]) == set(measured["units"])
    budget = ("--target-bpw", "4", *group, "--sensitivity", "kl")
    allocated = parsed("allocate", scores, "-o", plan, *budget)
    options = ("--bits", "2,8", "--json", "--selection-samples", "32", *budget[:2], *budget[-2:])
    report = json.loads(quantize(place, tmp_path / "out", *options).stdout)
    assert allocated["metric"] == report["metric"] == "kl"
    result = invoke("measure", place / "model", "-o", scores, "--extra-metrics", "fisher")
    assert result.exit_code == 2 and "extra_metrics" in result.stderr and "hawq, kl" in result.stderr


def test_asymmetric_stages_chain_through_files(place: Path, tmp_path: Path) -> None:
    model, scores, plan = place / "model", tmp_path / "s.json", tmp_path / "p.json"
    rows = ("--num-samples", "8", "--seq-len", "16", "--device", "cpu", "--calibration", place / "text.txt")
    kind = ("--asymmetric", "--profile", "vllm")
    refused = invoke("measure", model, "-o", scores, *rows, "--asymmetric")
    assert refused.exit_code == 2 and "--profile vllm accepts" in refused.stderr
    measured = parsed("measure", model, "-o", scores, *rows, *kind, "--group-size", "32", "--bits", "2,4")
    assert measured["symmetric"] is False
    assert {label for by_unit in measured["scores"]["kron"].values() for label in by_unit} == {"w2g32a", "w4g32a"}
    # The file says which grids it is of, so allocate needs no flag.
    options = ("--target-bpw", "4", "--group-size", "32", "--bits", "2,4")
    allocated = parsed("allocate", scores, "-o", plan, *options, "--pin", "re:.*q_proj=4")
    assert {entry["symmetric"] for entry in allocated["layers"]} == {False}
    out, evaluation = tmp_path / "out", ("--eval-data", place / "other.txt", "--eval-samples", "4")
    refused = quantize(place, out, "--plan", plan)
    assert refused.exit_code == 2
    assert "is asymmetric; profile auto takes symmetric grids only" in refused.stderr
    report = parsed("quantize", model, "-o", out, "--plan", plan, *rows, *evaluation, "--profile", "vllm")
    assert report["plan"] == [{k: e[k] for k in report["plan"][0]} for e in allocated["layers"]]
    assert all(label.endswith("a") for label in report["evaluation"]["uniform"]["formats"])
    saved = ("--sensitivity", scores)
    refused = invoke("quantize", model, "-o", tmp_path / "other", *rows, *evaluation, *options, *saved)
    assert refused.exit_code == 2 and "was measured for asymmetric grids; give --asymmetric" in refused.stderr


def test_allocating_what_was_not_measured_exits_2(place: Path, tmp_path: Path) -> None:
    scores = tmp_path / "s.json"
    parsed("measure", place / "model", "-o", scores, *SMALL[:-4], "--calibration", place / "text.txt", "--bits", "3,4")
    options = ("--target-bpw", "4", "--group-size", "32")
    result = invoke("allocate", scores, "-o", tmp_path / "p.json", *options, "--bits", "2,3,4")
    assert result.exit_code == 2
    assert "w2g32" in result.stderr
    assert not (tmp_path / "p.json").exists()
    assert invoke("allocate", tmp_path / "none.json", *options).exit_code == 4


def test_a_quality_target_out_of_reach_exits_3_and_leaves_the_output(place: Path, tmp_path: Path) -> None:
    result = quantize(place, tmp_path / "out", "--bits", "2,3", "--target-kl", "1e-9")
    assert result.exit_code == 3, result.stderr
    assert "1 of 1 gates failed: target_kl at most 1e-09, found " in result.stderr
    assert "misses" in result.stdout
    assert (tmp_path / "out" / "report.json").is_file()
