"""What ``rotate: auto`` does, and says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.model.rotation import choice
from hawqtool.pipeline.run.job import Job, prepare
from tests.support.tiny import tiny_llama
from tests.support.tiny_zoo import kind_named, save_kind

WIDE: dict[str, Any] = {"hidden_size": 256, "layers": 1}


def job_of(folder: Path, **settings: Any) -> Job:
    return prepare(RunConfig.model_validate({"model": str(folder), "device": "cpu", "group_size": 32} | settings))


def test_untied_heads_are_rotated_and_the_rest_says_why_not(tmp_path: Path) -> None:
    plain, tied = tiny_llama(tmp_path / "plain", **WIDE), tiny_llama(tmp_path / "tied", tie=True, **WIDE)
    job = job_of(plain)
    assert job.index.rotation is not None and job.rotation.startswith("on, as the head is not tied")
    assert job.unrotated().index.rotation is None
    written = {"rotate": "off"}, {"rounding": "rtn"}, {"bits": "6,8"}
    for settings, reason in zip(written, ("off", "off: --rounding rtn", "off: above 4 bits"), strict=True):
        job = job_of(plain, **settings)
        assert job.index.rotation is None and job.rotation.startswith(reason)
        assert job.unrotated() is job
    assert (
        job_of(tied).rotation
        == "off: the head is tied to the embedding and would take 65.5 kB of its own (--rotate on)"
    )
    assert job_of(tied, rotate="on").rotation == "on"
    # What is looked at and not rounded stays as it is.
    config = RunConfig(model=str(plain), device="cpu")
    assert prepare(config, writes=False).index.rotation is None


def test_models_that_take_long_to_rotate_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MOST_WEIGHTS", 100_000)
    folder = tiny_llama(tmp_path, **WIDE)
    assert "billion weights would be rotated on every read" in job_of(folder).rotation
    assert job_of(folder, rotate="on").index.rotation is not None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("neox-serial", "around the blocks: a channel of the residual stream (layer_norm)"),
        ("mixtral", "models with experts were not measured"),
        ("bert-masked", "BertForMaskedLM is no causal language model"),
        ("llama", "its stream has 64 channels"),
    ],
)
def test_what_is_not_rotated_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    folder = tiny_llama(tmp_path) if name == "llama" else save_kind(kind_named(name), tmp_path)
    if name == "neox-serial":
        monkeypatch.setattr(choice, "FEWEST_CHANNELS", 1)
    job = job_of(folder)
    assert job.index.rotation is None and job.rotation.startswith("off: ") and reason in job.rotation
    if name == "neox-serial":
        with pytest.raises(InputError, match="--rotate: .*--rotate off"):
            job_of(folder, rotate="on")
