"""The file of a batch: what its matrix gives, how jobs are called, and that every problem is told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from hawqtool.config import load_config
from hawqtool.errors import UsageError
from hawqtool.pipeline.batch.jobs_file import Batch, read_batch
from hawqtool.pipeline.run.fingerprint import config_fingerprint

EXAMPLE = Path(__file__).resolve().parents[4] / "configs/batch-example.yaml"


def batch(tmp_path: Path, overwrite: bool = False, **document: Any) -> Batch:
    path = tmp_path / "jobs.yaml"
    path.write_text(yaml.safe_dump({"output": "runs"} | document, sort_keys=False))
    return read_batch(path, None, None, overwrite)


def test_the_example() -> None:
    found = read_batch(EXAMPLE, None, None, False)
    assert found.folder == Path("runs") and len(found.jobs) == 13
    by_name = {job.name: job.config for job in found.jobs}
    foem = by_name["model-b-3.5bpw-foem"]
    assert (foem.rounding, foem.foem_beta, foem.target_bpw, foem.group_size) == ("foem", 0.2, 3.5, 64)
    assert foem.model == "path/to/model-b" and foem.output == "runs/model-b-3.5bpw-foem"
    single = by_name["model-a-best-quality"]
    assert single.target_kl == 0.02 and single.num_samples is None, "null takes a default away"
    assert {config.measurements for config in by_name.values()} == {"runs/measurements"}


def test_names_and_what_is_not_measured(tmp_path: Path) -> None:
    matrix = {"target": [{"target_kl": 0.1}, {"target_size": "9MB"}], "bits": [[2, 4], 8], "pin": [["re:.*down=8"]]}
    plan = {"model": "org/name@rev", "plan": "a/plan.json"}
    found = batch(tmp_path, defaults={"model": "x/m"}, matrix=matrix, jobs=[plan], overwrite=True)
    assert [job.name for job in found.jobs] == [
        "name-plan-plan.json",
        "m-kl0.1-bits-2-4-pin-re-.-down-8",
        "m-kl0.1-bits-8-pin-re-.-down-8",
        "m-9MB-bits-2-4-pin-re-.-down-8",
        "m-9MB-bits-8-pin-re-.-down-8",
    ]
    assert found.jobs[0].config.measurements is None and found.jobs[1].config.measurements == "runs/measurements"
    assert all(job.config.overwrite for job in found.jobs)
    assert found.jobs[1].config.bits == (2, 4) and found.jobs[1].config.pin == ("re:.*down=8",)


def test_the_file_of_a_job_gives_the_same_configuration(tmp_path: Path) -> None:
    found = batch(
        tmp_path,
        defaults={"group-size": "channel", "calibration": ["self", "a.txt=2"], "extra_metrics": "kl", "target_bpw": 4},
        matrix={"model": ["m"], "foem_beta": [0.1, 1e-7], "bits": ["4,8"], "symmetric": [False], "profile": ["vllm"]},
    )
    for job in found.jobs:
        (tmp_path / "job.yaml").write_text(job.yaml())
        assert load_config(tmp_path / "job.yaml", {}) == job.config


def test_all_problems_at_once_each_of_them_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        batch(
            tmp_path,
            defualts={},
            seed=3,
            defaults={"output": "elsewhere", "gruop_size": 64},
            matrix={"model": ["a", "b"], "target_bpw": 4, "seed": [], "method": [{"rounding": "rtn"}, 3]},
            jobs=[{"model": "a"}, {"name": "../x", "model": "a", "target_bpw": -1}, 7],
        )
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    for part in (
        "unknown key 'defualts', did you mean 'defaults'?",
        "unknown key 'seed', put it under defaults",
        "defaults: output is a setting of the whole batch; use name",
        "matrix: target_bpw has 4, expected a list",
        "matrix: seed has []",
        "matrix: method has",
        "job 2: name '../x' is no folder name",
        "job 3: found 7",
        "did you mean 'group_size'?",
        "greater than 0",
    ):
        assert part in message, part
    assert message.count("did you mean 'group_size'") == 1 and "a and 3 more jobs: unknown key" in message


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({}, "no job was found"),
        ({"output": None, "jobs": [{"model": "m", "target_bpw": 4}]}, "output: found None"),
        ({"jobs": [{"model": "m"}]}, "m: exactly one of --target-bpw"),
        ({"jobs": [{"target_bpw": 4}]}, "model: expected a folder or a hub id, found none"),
        ({"jobs": [{"model": "x/m", "target_bpw": 4}, {"model": "y/m", "target_bpw": 4}]}, "2 jobs would write to"),
        ({"jobs": [{"name": "measurements", "model": "m", "target_bpw": 4}]}, "which the batch itself uses"),
        ({"matrix": {key: list(range(50)) for key in ("seed", "bits")}}, "make 2500 jobs, expected at most 2000"),
        ({"jobs": [{"model": "m" * 5000, "target_bpw": 4, "name": "x" * 5000}]}, "name .x+… is no folder"),
        ({f"key {n}": 1 for n in range(20)}, "and 8 more problems"),
        ({"measurements": 3, "jobs": [{"model": "m", "target_bpw": 4}]}, "measurements: found 3"),
    ],
)
def test_problems(tmp_path: Path, document: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        batch(tmp_path, **document)


def test_a_result_is_known_by_settings_and_by_the_content_of_what_they_name(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text("{}")
        save_file({"a": torch.zeros(100_000, dtype=torch.uint8)}, tmp_path / place / "model.safetensors")
        (tmp_path / f"{place}.txt").write_text("text")

    def fingerprint(place: str, **values: Any) -> str:
        given = {"model": str(tmp_path / place), "calibration": f"{tmp_path / place}.txt=2", "target_bpw": 4}
        return config_fingerprint(load_config(None, given | values))

    base = fingerprint("a", output="x")
    assert base == fingerprint("b", output="y", overwrite=True, measurements="m", max_memory="1GiB")
    assert len({base, fingerprint("a", seed=1), fingerprint("a", target_bpw=4.5)}) == 3
    (tmp_path / "b.txt").write_text("texts")
    other = fingerprint("b")
    assert other != base
    weights = torch.zeros(100_000, dtype=torch.uint8)
    weights[50_001] = 1
    save_file({"a": weights}, tmp_path / "b/model.safetensors")
    changed = fingerprint("b")
    assert changed not in (base, other)
    (tmp_path / "b/tokenizer.json").write_text("{}")
    assert fingerprint("b") not in (base, other, changed)
    # Of a folder of texts too, where sizes say nothing.
    (tmp_path / "texts").mkdir()
    found = set()
    for text in ("one", "two"):
        (tmp_path / "texts/a.txt").write_text(text)
        found.add(fingerprint("a", calibration=str(tmp_path / "texts")))
    assert len(found) == 2
