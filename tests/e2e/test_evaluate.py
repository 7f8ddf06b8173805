"""An evaluation is of a folder and the model that it was made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hawqtool.errors import InputError
from hawqtool.pipeline.evaluate import run_evaluate
from hawqtool.runtime.reporter import Silent
from tests.support.runs import Report, settings
from tests.support.tiny import tiny_llama


def test_another_model_of_the_same_shapes_is_refused(place: Path, mixed: tuple[Path, Report], tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", seed=1)
    config = settings(place, model=other, eval_data=place / "other.txt")
    with pytest.raises(
        InputError, match=r"is not what was made from .*other, so .*: tensor .* differs from the source's"
    ):
        run_evaluate(config, mixed[0], Silent())


def test_another_model_that_shares_what_is_not_packed_is_refused(
    place: Path, mixed: tuple[Path, Report], tmp_path: Path
) -> None:
    """Such as a fine-tuned one: embeddings and norms are equal, one linear is not."""

    other = Path(shutil.copytree(place / "model", tmp_path / "tuned"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.02
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = settings(place, model=other, eval_data=place / "other.txt")
    with pytest.raises(InputError, match="up_proj: relative squared weight error"):
        run_evaluate(config, mixed[0], Silent())
