"""Whole runs on other sources than a text file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hawqtool.errors import InputError, UsageError
from hawqtool.export.manifest import weight_hashes
from tests.support.dataset_hub import COMMIT, NAME, local_hub
from tests.support.forked import Forks
from tests.support.runs import Run, random_text, read

SETS = ("calibration", "scoring", "selection", "report")
LINES = [random_text(seed, 100) for seed in range(40)]


def written(folder: Path) -> dict[str, Path]:
    """The same lines in four kinds of source."""
    records = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
    (folder / "set").mkdir()
    (folder / "lines.txt").write_text("\n".join(LINES) + "\n")
    (folder / "lines.jsonl").write_text(records)
    (folder / "set/train.jsonl").write_text(records)
    pyarrow.parquet.write_table(pyarrow.table({"text": LINES}), folder / "lines.parquet")
    return {name: folder / name for name in ("lines.txt", "lines.jsonl", "lines.parquet", "set")}


def test_every_kind_gives_the_same_weights(run: Run, tmp_path: Path) -> None:
    hashes, fingerprints = [], []
    for label, source in written(tmp_path).items():
        folder, report = run(bits="4", target_bpw=4.5, calibration=source)
        assert {report["rows"][name]["source"] for name in SETS} == {label}
        assert report["config"]["calibration"] == [label]
        fingerprints.append([report["rows"][name]["fingerprint"] for name in SETS])
        hashes.append(weight_hashes(folder))
    assert hashes[0] and all(found == hashes[0] for found in hashes)
    assert all(found == fingerprints[0] for found in fingerprints)


def test_a_mixture_with_rows_of_the_model(place: Path, run: Run, tmp_path: Path) -> None:
    sources = written(tmp_path)
    mixture = ("self", f"{sources['lines.jsonl']}=2")
    report = run(bits="4", target_bpw=4.5, calibration=mixture, eval_data=place / "other.txt", num_samples=12)[1]
    assert report["rows"]["calibration"]["source"] == "self (4 rows), lines.jsonl (8 rows)"
    assert report["rows"]["scoring"]["source"] == "self (5 rows), lines.jsonl (11 rows)"
    assert report["config"]["calibration"] == ["self", "lines.jsonl=2"]
    assert not report["rows"]["report_in_domain"]


def test_rows_shared_by_sources_are_refused(run: Run, tmp_path: Path) -> None:
    sources = written(tmp_path)
    same = (str(sources["lines.txt"]), str(sources["lines.jsonl"]))
    with pytest.raises(InputError, match="occur in more than one"):
        run(bits="4", target_bpw=4.5, calibration=(f"{same[0]}=2", same[1]))


def test_short_sources_are_counted_before_anything_is_sampled(run: Run, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(random_text(3, 320))
    with pytest.raises(InputError, match=r"^short.txt holds 10 rows of 32 tokens, 36 are needed \(8 calibration, 8 sc"):
        run(bits="4", target_bpw=4.5, calibration=("self", str(tmp_path / "short.txt")))


def test_a_weight_that_gives_no_row_is_refused(place: Path, run: Run) -> None:
    with pytest.raises(UsageError, match="so small that it gives no row"):
        run(bits="4", target_bpw=4.5, calibration=("self", f"{place / 'other.txt'}=0.001"))


def test_a_text_that_would_judge_but_not_calibrate_is_refused(tmp_path: Path, run: Run) -> None:
    first, second = written(tmp_path)["lines.txt"], tmp_path / "second.txt"
    second.write_text(random_text(4, 4000))
    with pytest.raises(UsageError, match="second.txt: its weight is so small that it gives no row"):
        run(bits="4", target_bpw=4.5, calibration=(f"{first}=4", str(second)), sampled_share=0.5, num_samples=3)


OPTIONS = (
    *("--bits", "4", "--target-bpw", "4.5", "--group-size", "32", "--num-samples", "8", "--seq-len", "32"),
    *("--eval-samples", "4", "--device", "cpu"),
)


def cli(place: Path, output: Path, source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Quantize in a process of its own: libraries read where the hub is, and whether to ask it, once."""
    command = [sys.executable, "-m", "hawqtool", "quantize", place / "model", "-o", output, "--calibration", source]
    inherited = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [*map(str, command), *OPTIONS, "--quiet"],
        env={**inherited, "HF_HOME": str(output.parent / "hub"), **environment},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def test_a_hub_dataset_with_its_commit(place: Path, run: Run, tmp_path: Path) -> None:
    sources = written(tmp_path)
    with local_hub({"train.jsonl": sources["lines.jsonl"].read_bytes()}) as address:
        done = cli(place, tmp_path / "result", NAME, HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    report = read(tmp_path / "result/report.json")
    local = run(bits="4", target_bpw=4.5, calibration=sources["lines.txt"], num_samples=8, eval_samples=4)[1]
    assert report["rows"]["calibration"]["source"] == f"{NAME}@{COMMIT}"
    assert report["config"]["calibration"] == [NAME] and f"--calibration {NAME}" in report["command"]
    assert report["rows"]["calibration"]["fingerprint"] == local["rows"]["calibration"]["fingerprint"]


REFUSALS = """
import sys
from hawqtool.data.sources import open_source
from hawqtool.errors import InputError
for source in sys.argv[1:]:
    try:
        list(open_source(source).records)
    except InputError as error:
        print(error)
"""


def test_what_the_hub_does_not_have(tmp_path: Path) -> None:
    expected = {
        "owner/nothing": "owner/nothing is no file or folder here, and the hub has no such dataset",
        f"{NAME}@v9": f"dataset {NAME} of the hub has no revision v9",
        f"{NAME}:cfg": "'cfg' not found",
        f"{NAME}::test": "Bad split: test",
    }
    with local_hub({"train.jsonl": b'{"text": "a"}\n'}) as address:
        environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_ENDPOINT": address}
        command = [sys.executable, "-c", REFUSALS, *expected]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    found = done.stdout.splitlines()
    assert len(found) == len(expected), done.stderr
    assert all(said in line for said, line in zip(expected.values(), found, strict=True)), found


def test_no_hub_is_asked_when_the_user_forbids_it(place: Path, tmp_path: Path, forks: Forks) -> None:
    command = ("quantize", place / "model", "-o", tmp_path / "result", "--calibration", NAME, *OPTIONS, "--quiet")
    done = forks.run(*command, HF_HUB_OFFLINE="1")
    assert done.returncode == 4
    assert "HF_HUB_OFFLINE" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
