"""Which width the embedding gets where nothing is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hawqtool.checkpoint.index import CheckpointIndex, read_index
from hawqtool.config import RunConfig
from hawqtool.export.embedding_table import with_embedding_bits
from hawqtool.model.skeleton import build_skeleton
from hawqtool.runtime.reporter import Silent
from tests.support.tiny import tiny_model


class Told(Silent):
    """What was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Keep the line."""
        self.lines.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CheckpointIndex]:
    folder = tiny_model("llama", tmp_path_factory.mktemp("table") / "m")
    index = read_index(folder)
    return build_skeleton(folder, torch.float32, False, index.tensors), index


@pytest.mark.parametrize(
    ("given", "bits", "said"),
    [
        ({"target_size": "1MB", "profile": "transformers"}, 8, "takes 8 bits"),
        ({"target_size": "1MB", "profile": "transformers", "embedding_bits": 16}, 16, ""),
        ({"target_size": "1MB"}, 16, ""),
        ({"target_bpw": 4.0, "profile": "transformers"}, 16, ""),
        ({"target_bpw": 4.0, "profile": "transformers", "embedding_bits": 8}, 8, ""),
        ({"target_size": "1MB", "profile": "transformers", "formats": ("w8ch-a8i", "16")}, 16, "stays as it is: w8ch"),
    ],
)
def test_a_target_size_takes_it_from_the_embedding(
    model: tuple[Any, CheckpointIndex], given: dict[str, Any], bits: int, said: str
) -> None:
    skeleton, index = model
    told = Told()
    config = with_embedding_bits(RunConfig(model="m", **given), skeleton, {}, index, told)
    assert config.embedding_bits == bits and len(told.lines) == bool(said) and said in "".join(told.lines)


class Images(torch.nn.Module):
    """A model without an embedding, as transformers says it."""

    def get_input_embeddings(self) -> None:
        """Have none."""
        raise NotImplementedError


def test_without_an_embedding_nothing_is_taken(model: tuple[Any, CheckpointIndex]) -> None:
    told = Told()
    config = RunConfig(model="m", target_size="1MB", profile="transformers")
    found = with_embedding_bits(config, Images(), {}, model[1], told)
    assert found.embedding_bits == 16 and told.lines == ["embedding   stays as it is: Images has no token embedding"]
