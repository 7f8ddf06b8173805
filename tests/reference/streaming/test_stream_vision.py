"""A vision tower quantized beside its language model, against a float64 replay and against transformers."""

from __future__ import annotations

import pytest

from tests.support.architecture_table import Examined, examine, loaded_difference
from tests.support.tiny_zoo import VISION


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> Examined:
    return examine(VISION, tmp_path_factory.mktemp("vision"))


def test_codes_of_tower_and_language_model_equal_a_sequential_replay_on_images(examined: Examined) -> None:
    towers = [name.startswith("vision_tower.") for name in examined.shares]
    assert (sum(towers), len(towers)) == (12, 26)
    assert max(examined.excess.values()) < 1e-4, examined.excess
    assert min(examined.shares.values()) >= 0.98, examined.shares


def test_transformers_computes_with_the_written_tower(examined: Examined) -> None:
    assert loaded_difference(VISION, examined) == 0
