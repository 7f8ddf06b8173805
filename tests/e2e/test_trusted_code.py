"""Code that a checkpoint brings along: executed only with the flag, and then the run says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.forked import Done, Forks
from tests.support.tiny import tiny_llama

OPTIONS = ("--bits", "4", "--target-bpw", "4.5", "--num-samples", "4", "--seq-len", "16", "--group-size", "32")
CODE = """
import os
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(os.environ["MARK"]).touch()

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Llama under a name that transformers does not know, with the code to build it."""
    folder = tiny_llama(tmp_path / "model")
    (folder / "modeling_mine.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": mapped}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantize(forks: Forks, model: Path, *more: str) -> Done:
    # In a process of its own: code of a checkpoint stays in the process that ran it.
    place = model.parent
    command = ("quantize", model, "-o", place / "out", "--device", "cpu", *OPTIONS, *more)
    return forks.run(*command, MARK=str(place / "executed"))


def test_without_the_flag_nothing_is_executed(model: Path, forks: Forks) -> None:
    done = quantize(forks, model)
    assert done.returncode == 4, done.stderr
    assert "allow it with --trust-remote-code" in done.stderr.splitlines()[-1]
    assert not (model.parent / "executed").exists() and not (model.parent / "out").exists()


def test_with_the_flag_it_runs_and_the_report_says_so(model: Path, forks: Forks) -> None:
    done = quantize(forks, model, "--trust-remote-code", "--eval-samples", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert (model.parent / "executed").exists()
    report = json.loads(done.stdout)
    assert report["architecture"] == "MineForCausalLM"
    assert any("was executed on this machine" in warning for warning in report["warnings"])
    assert "was executed on this machine" in done.stderr
    assert (model.parent / "out/modeling_mine.py").read_text() == CODE
