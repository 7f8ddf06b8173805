"""Every rounding of a rotated model is that of a plain checkpoint of the rotated weights; moments turn along."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hawqtool.allocation.uniform import uniform_formats
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.checkpoint.rotated.hadamard import Rotation
from hawqtool.config import RunConfig
from hawqtool.pipeline.run.context import RunContext
from hawqtool.pipeline.run.job import Job, prepare
from hawqtool.pipeline.stages.round_blocks import round_blocks
from hawqtool.pipeline.stages.token_importance import with_token_importance
from hawqtool.records import RoundedLayer, Rows
from hawqtool.rounding import output_feedback
from hawqtool.rounding.layer import quantized
from hawqtool.rounding.output_feedback import unpack_lower
from tests.support.tiny import tiny_llama

TOKENS = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(5))


@dataclass
class Taken:
    """A sink in memory."""

    parts: dict[str, Tensor] = field(default_factory=dict)

    def write_layer(self, layer: RoundedLayer) -> None:
        codes, scales, *_ = quantized(layer)
        self.parts |= {f"{layer.name} codes": codes, f"{layer.name} scales": scales}

    def write_changed(self, name: str, tensor: Tensor) -> None:
        self.parts[name] = tensor


def job_of(folder: Path, **settings: Any) -> Job:
    return prepare(RunConfig.model_validate({"model": str(folder), "device": "cpu", "group_size": 32} | settings))


def materialized(job: Job, folder: Path) -> Path:
    """A plain checkpoint of the tensors that a rotated job reads."""
    folder.mkdir()
    reader = TensorReader(job.index)
    save_file({n: reader.tensor(n) for n in job.index.tensors}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((job.index.folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rounded(job: Job) -> dict[str, Tensor]:
    rows = with_token_importance(RunContext(job), Rows(TOKENS, "test", "-"), for_feedback=True)
    taken = Taken()
    round_blocks(job, uniform_formats(job.units, 3, 32), rows, taken, lambda *_: None)
    return taken.parts


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and one of its rotated weights."""
    folder = tmp_path_factory.mktemp("rotated")
    source = tiny_llama(folder / "source", tie=True)
    return source, materialized(job_of(source, rotate="on"), folder / "turned")


@pytest.mark.parametrize(
    "settings",
    [
        {"output_feedback": "auto"},
        {"rounding": "foem", "output_feedback": "auto"},
        {"rounding": "foem", "foem_form": "paper"},
        {"rounding": "gptaq"},
        {"refine_steps": 2},
    ],
)
def test_it_is_that_of_the_rotated_weights(
    sources: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(output_feedback, "WORTHWHILE", 1e9)
    source, turned = sources
    found = rounded(job_of(source, rotate="on", **settings))
    expected = rounded(job_of(turned, rotate="off", **settings))
    plain = rounded(job_of(source, rotate="off", **settings))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(*(some["model.layers.1.self_attn.o_proj codes"] for some in (found, plain)))


def test_moments_are_those_of_the_rotated_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where outputs enter the stream, S becomes Q^T S Q; q and k, whose outputs stay, keep it."""
    monkeypatch.setattr(output_feedback, "WORTHWHILE", 1e9)
    source = tiny_llama(tmp_path, dtype=torch.float32)
    rows, q = Rows(TOKENS, "test", "-"), Rotation(64, 0).apply(torch.eye(64))
    plain, turned = (
        with_token_importance(RunContext(job_of(source, rotate=rotate, output_feedback="auto")), rows, True)
        for rotate in ("off", "on")
    )
    for name, moments in plain.output_moments.items():
        lower, other = moments.lower, turned.output_moments[name].lower
        assert lower is not None and other is not None
        expected = unpack_lower(lower).double()
        if name.endswith(("o_proj", "down_proj")):
            expected = q.T @ expected @ q
        assert float((unpack_lower(other) - expected).norm() / expected.norm()) < 0.01, name
