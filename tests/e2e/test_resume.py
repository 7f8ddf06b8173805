"""Runs that are cut short again and again give the result of an undisturbed run, to the bit."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hawqtool.checkpoint.index import read_index
from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.pipeline.measure import run_measure
from hawqtool.pipeline.quantize import run_quantize
from hawqtool.pipeline.run.checkpoints import Checkpoints
from hawqtool.pipeline.run.files import file_hash
from hawqtool.rounding.learned import training as learning
from hawqtool.runtime.reporter import Silent
from hawqtool.streaming import resume_points as resume_points
from tests.support.forked import Forks
from tests.support.runs import MIXED_TARGET, read, settings
from tests.support.tiny import VOCAB_SIZE
from tests.support.tiny_zoo import Kind, kind_named, save_kind

ROOT = Path(__file__).resolve().parents[2]


class Interrupt:
    """Interrupts once so many contents, copies aside, or one of such a key were saved; the last is complete then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        self.stop: str | None = None
        self.keys: list[str] = []
        save = Checkpoints.save

        def counted(store: Checkpoints, key: str, content: Any) -> None:
            save(store, key, content)
            if store.prefix == "copy.":
                return
            self.keys.append(store.prefix + key)
            if self.stop is not None and self.keys[-1].endswith(self.stop):
                raise KeyboardInterrupt
            if self.left is not None:
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt

        monkeypatch.setattr(Checkpoints, "save", counted)


def quantize(config: RunConfig, **changes: Any) -> dict[str, Any]:
    return run_quantize(config.model_copy(update=changes), "hawqtool quantize", Silent(), lambda _: None)


def result(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Hash of the weights, plan and scores; times left out."""
    plan = read(folder / "reproduce/plan.json") | {"seconds": None}
    scores = read(folder / "reproduce/sensitivity.json")
    scores["settings"].pop("seconds")
    return file_hash(folder / "model.safetensors"), plan, scores


def result_without_scores(folder: Path) -> tuple[str, dict[str, Any], Any]:
    """Hash of the weights, plan and divergence."""
    plan = read(folder / "reproduce/plan.json") | {"seconds": None}
    return file_hash(folder / "model.safetensors"), plan, read(folder / "report.json")["evaluation"]["mixed"]["kl"]


SHARED = kind_named("gemma4-shared")
CHAINS: dict[str, dict[str, Any]] = {
    "dense": {"swaps": 1, "extra_metrics": ("kl",), "calibration": "self"},
    "drift": {"rounding": "gptaq", "swaps": 2, "swap_scores": "gradient", "sensitivity": "hawq-ggn"},
    "refined": {
        "refine_steps": 4,
        "sensitivity_steps": 2,
        "shortlist": 1,
        "output_feedback": "re:.*[qo]_proj$",
        "refine_error": "loss",
        "gram_steps": 4,
    },
    "distilled": {
        "distill_steps": 4,
        "distill_codes": True,
        "refine_steps": 2,
        "output_feedback": "auto",
        "shortlist": 1,
    },
    "refined, and the head": {
        "kind": "llama",
        "refine_steps": 2,
        "refine_learner": "gumbel",
        "target_shift": 0.5,
        "quantize_lm_head": True,
        "shortlist": 1,
    },
    "held-out rows": {"rounding": "foem", "foem_beta": "auto", "target_shift": "auto", "batch_size": 4},
    "experts in batches": {"kind": "qwen3-moe", "batch_size": 4, "shortlist": 1},
    "experts in one batch": {"kind": "qwen3-moe", "batch_size": 16, "shortlist": 1, "rounding": "foem"},
}


TWO_BLOCKS = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 1}
CARRYING = (
    Kind(
        "qwen3.5",
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        settings={
            **{"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
            **{"layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4, "head_dim": 16},
            **{"num_key_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "initializer_range": 0.08},
        },
    ),
    replace(SHARED, settings=SHARED.settings | TWO_BLOCKS),
)


@pytest.mark.parametrize("name", CHAINS)
def test_interrupted_again_and_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("hawqtool.pipeline.quantize.write_page", lambda *_: None)  # drawing takes longer
    monkeypatch.setattr("hawqtool.pipeline.stages.distill.CODE_MARGIN", 0.0)  # few steps are to move codes
    options = dict(CHAINS[name])
    kind = options.pop("kind", None)
    if kind:
        options["model"] = save_kind(kind_named(kind), tmp_path / "model")
    folder = tmp_path / "runs"
    folder.mkdir()
    small = {"bits": "2,4,8", "target_bpw": MIXED_TARGET, "num_samples": 8, "seq_len": 16, "eval_samples": 4}
    config = settings(place, **(small | options), output=folder / "out")
    quantize(config, output=str(folder / "undisturbed"))
    interrupt = Interrupt(monkeypatch)
    monkeypatch.setattr(learning, "BYTES_PER_SECOND", math.inf)
    for starts in range(1, 200):
        interrupt.left = (5, 8, 14)[starts % 3]  # the number of starts, and some things more
        # Nor does it matter whether a walk has states to go on from.
        monkeypatch.setattr(resume_points, "LEAST_SECONDS", (0.0, math.inf)[starts // 2 % 2])
        try:
            # Where hidden states lie may differ from start to start.
            report = quantize(config, max_memory=("auto", "1KiB")[starts % 2])
        except KeyboardInterrupt as error:
            assert not (folder / "out").exists()
            assert any("the same command goes on" in note for note in getattr(error, "__notes__", ())) or starts < 3
            continue
        break
    assert report["starts"] == starts > 4
    assert result(folder / "out") == result(folder / "undisturbed")
    assert sorted(path.name for path in folder.iterdir()) == ["out", "undisturbed"]
    # Nothing was done twice: what is saved once per block or plan was saved once.
    once = re.compile(r"\.block\.\d+$|\.quality$|table$|\.evaluating\.(selection|report)$")
    done = [key for key in interrupt.keys if once.search(key)]
    assert len({once.search(key)[0].split(".")[1] for key in done if "table" not in key}) == 3  # type: ignore[index]
    assert len(done) == len(set(done))


@pytest.mark.parametrize("kind", CARRYING, ids=lambda kind: kind.name)
def test_carried_states_survive_interruptions_and_limits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Linear attention beside full attention, and keys and values that later blocks read of earlier ones."""
    monkeypatch.setattr("hawqtool.pipeline.quantize.write_page", lambda *_: None)
    monkeypatch.setattr(resume_points, "LEAST_SECONDS", 0.0)
    model = save_kind(kind, tmp_path / "model")
    small = {"bits": "4,8", "target_bpw": MIXED_TARGET, "num_samples": 4, "seq_len": 16, "eval_samples": 4}
    config = settings(place, model=model, shortlist=1, output=tmp_path / "out", **small)
    quantize(config, output=str(tmp_path / "undisturbed"))
    interrupt = Interrupt(monkeypatch)
    for starts in range(1, 50):
        interrupt.left = 12
        try:
            report = quantize(config, max_memory=("auto", "1KiB")[starts % 2])
        except KeyboardInterrupt:
            continue
        break
    assert report["starts"] == starts > 2
    assert result(tmp_path / "out") == result(tmp_path / "undisturbed")


def copies(model: Path, folder: Path) -> dict[str, Path]:
    """A model with one bit of a norm changed, and one with another tokenizer; sizes and times are the same."""
    found = {name: Path(shutil.copytree(model, folder / name)) for name in ("norm", "tokenizer")}
    info = read_index(found["norm"]).tensors["model.norm.weight"]
    content = bytearray(info.file.read_bytes())
    content[info.start] ^= 1
    tokens = (found["tokenizer"] / "tokenizer.json").read_bytes().replace(b"<extra_28>", b"<extra_2x>")
    for file, changed in ((info.file, content), (found["tokenizer"] / "tokenizer.json", tokens)):
        before = file.stat()
        file.write_bytes(changed)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
    return found


def test_another_run_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(place, bits="4", target_bpw=4.5, output=tmp_path / "out", rounding="rtn")
    interrupt = Interrupt(monkeypatch)
    interrupt.left = 8
    with pytest.raises(KeyboardInterrupt):
        quantize(config)
    interrupt.left = None
    other = tmp_path / "other.txt"
    other.write_text((place / "text.txt").read_text()[100:])
    moved = tmp_path / "moved/text.txt"
    moved.parent.mkdir()
    moved.write_text((place / "text.txt").read_text()[100:])
    models = copies(place / "model", tmp_path)
    for changes, said in (
        ({"model": str(models["norm"])}, "weights was"),
        ({"model": str(models["tokenizer"])}, "tokenizer.json was"),
        ({"seed": 5}, "seed was 0, is 5"),
        ({"target_bpw": 4.625}, "target_bpw was 4.5, is 4.625"),
        ({"batch_size": 4}, "batch_size was 16, is 4"),
        ({"calibration": (str(other),)}, "calibration was {'text.txt': 1.0}, is {'other.txt': 1.0}"),
        ({"calibration": (str(moved),)}, "scoring rows was"),
    ):
        with pytest.raises(UsageError) as caught:
            quantize(config, **changes)
        assert said in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setenv("HAWQTOOL_KERNEL", "eager")
        with pytest.raises(UsageError, match=r"kernel was numba, .* is eager, torch"):
            quantize(config)
    assert quantize(config)["starts"] == 2


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "reproduce/checksums.json", "rounding.state"])
def test_a_plan_that_was_damaged_is_rounded_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = settings(place, bits="4", target_bpw=4.5, output=tmp_path / "out", num_samples=8, seq_len=16)
    quantize(config, output=str(tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        interrupt = Interrupt(patch)
        interrupt.stop = ".as-written"
        with pytest.raises(KeyboardInterrupt):
            quantize(config)
        assert interrupt.keys[-1].endswith(".as-written")
    (part,) = (tmp_path / ".out.hawqtool/plans").iterdir()
    folder = part.rename(part.with_name(part.name.removesuffix(".part")))  # as a moment later
    saved = tmp_path / f".out.hawqtool/saved/{folder.name}.{name}"
    flip_a_bit(saved if name == "rounding.state" else folder / name)
    report = quantize(config)
    assert report["starts"] == 2
    assert result_without_scores(tmp_path / "out") == result_without_scores(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", ["distilled", "written", "replaced"])
def test_damage_after_distillation_replaced_codes_costs_distillation_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    small: dict[str, Any] = {"bits": "4", "target_bpw": 4.5, "num_samples": 8, "seq_len": 16, "eval": False}
    small |= {"eval_samples": None}
    learned = {"distill_steps": 4, "distill_codes": True, "target_shift": 0}
    config = settings(place, **small, **learned, output=tmp_path / "out")
    monkeypatch.setattr("hawqtool.pipeline.quantize.write_page", lambda *_: None)
    quantize(config, output=str(tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        interrupt = Interrupt(patch)
        interrupt.stop = ".rounding"
        with pytest.raises(KeyboardInterrupt):
            quantize(config)
    (tmp_path / ".out.hawqtool/saved").joinpath(interrupt.keys[-1] + ".state").unlink()  # as a moment before
    (damaged,) = (tmp_path / ".out.hawqtool/saved").glob(f"*.distill.{name}.state")
    flip_a_bit(damaged)
    again = Interrupt(monkeypatch)
    quantize(config)
    assert not [key for key in again.keys if ".block." in key]
    assert any(key.endswith(".distill.distilled") for key in again.keys) == (name == "distilled")
    assert file_hash(tmp_path / "out/model.safetensors") == file_hash(tmp_path / "undisturbed/model.safetensors")


def test_measure_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(place, bits="2,4", num_samples=8, seq_len=16)
    run_measure(config, tmp_path / "undisturbed.json", Silent())
    interrupt = Interrupt(monkeypatch)
    interrupt.left = 5
    with pytest.raises(KeyboardInterrupt):
        run_measure(config, tmp_path / "s.json", Silent())
    interrupt.left = None
    assert interrupt.keys[-1] == "measure.reverse-sweep"
    run_measure(config, tmp_path / "s.json", Silent())
    found, expected = read(tmp_path / "s.json"), read(tmp_path / "undisturbed.json")
    assert found | {"settings": None} == expected | {"settings": None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "undisturbed.json"]


def test_a_signal_keeps_the_work_and_says_so(place: Path, tmp_path: Path, forks: Forks) -> None:
    text = ("--calibration", place / "other.txt", "--num-samples", "8", "--seq-len", "16", "--eval-samples", "4")
    target = ("--bits", "4", "--target-bpw", "4.5", "--group-size", "32", "--device", "cpu", "--quiet")
    arguments = ("quantize", place / "model", "-o", tmp_path / "out", *text, *target)
    command = forks.start(*arguments)
    awaited = tmp_path / ".out.hawqtool/saved/original-states.state"
    while not awaited.exists() and not command.ended:
        time.sleep(0.002)
    os.kill(command.process_id, signal.SIGTERM)
    done = command.wait()
    assert done.returncode == 143, done.stderr
    assert done.stderr.startswith("terminated: the finished work is kept in ") and len(done.stderr.splitlines()) == 1
    done = forks.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read(tmp_path / "out/report.json")["starts"] == 2


def test_the_kill_script(tmp_path: Path) -> None:
    counts = ["--kills", "1", "--terms", "1", "--layers", "2", "--disks", "1" if os.geteuid() == 0 else "0"]
    command = [sys.executable, str(ROOT / "scripts/soak/kill_tests.py"), *counts]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "every trial gave the hashes and the plan of the undisturbed run"
