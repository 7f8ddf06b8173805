"""Every supported architecture against a float64 replay and against transformers; every refused one against its error.

`python -m tests.support.architecture_table` prints the figures behind these tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.export.verify import verify_folder
from hawqtool.pipeline.run.job import prepare
from tests.support.architecture_table import WIDTHS, Examined, examine, loaded_difference
from tests.support.replay64 import read_packed
from tests.support.tiny_zoo import REFUSED, SUPPORTED, Kind, save_kind

NAMES = [kind.name for kind in SUPPORTED]
FREE = ("llama", "gpt2", "mixtral", "t5", "vit")
"""Kinds that are replayed freely too: a decoder, transposed weights, experts, two stacks, images.

It adds little to the judgement of every code given those before it, which all kinds get.
"""


@pytest.fixture(scope="module", params=SUPPORTED, ids=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Examined]:
    """A kind and what the pipeline made of it; nobody may change it."""
    kind = request.param
    return kind, examine(kind, tmp_path_factory.mktemp(kind.name), kind.name in FREE)


def test_every_code_is_right_given_the_codes_before_it(case: tuple[Kind, Examined]) -> None:
    _, examined = case
    # Steps; float32 Gram matrices and column loops leave about 1e-6.
    assert max(examined.excess.values()) < 1e-4, examined.excess


def test_codes_equal_a_sequential_replay(case: tuple[Kind, Examined]) -> None:
    kind, examined = case
    if kind.name not in FREE:
        pytest.skip("judged code by code alone")
    shares = examined.shares.values()
    # The replay runs free: one code that lies on a tie changes up to a percent of the codes of the next layer.
    assert sum(shares) / len(shares) >= 0.999, examined.shares
    assert min(shares) >= 0.98, examined.shares


def test_all_widths_were_tried(case: tuple[Kind, Examined]) -> None:
    _, examined = case
    found = {layer.quant_format.bits for layer in read_packed(examined.folder).values()}
    assert found == set(WIDTHS[: examined.units])


def test_the_folder_is_sound(case: tuple[Kind, Examined]) -> None:
    _, examined = case
    report = verify_folder(examined.folder, against=examined.source)
    assert report.problems == ()
    assert report.num_packed == len(examined.excess)


def test_transformers_computes_with_the_written_weights(case: tuple[Kind, Examined]) -> None:
    kind, examined = case
    if not kind.loads:
        pytest.skip(f"transformers with compressed-tensors does not load packed {kind.name}")
    assert loaded_difference(kind, examined) == 0


NOT_LOADED = [kind for kind in SUPPORTED if not kind.loads and not kind.stacked]


@pytest.mark.parametrize("kind", NOT_LOADED, ids=lambda kind: kind.name)
def test_what_transformers_cannot_load_packed_needs_another_profile(kind: Kind, tmp_path: Path) -> None:
    source = save_kind(kind, tmp_path)
    with pytest.raises(InputError, match="packed.*--profile vllm"):
        prepare(RunConfig(model=str(source), group_size=32, device="cpu"))


@pytest.mark.parametrize("kind", REFUSED, ids=[kind.name for kind in REFUSED])
def test_what_is_not_supported_is_refused_by_name(kind: Kind, tmp_path: Path) -> None:
    source = save_kind(kind, tmp_path)
    with pytest.raises(InputError, match=kind.reason) as caught:
        prepare(RunConfig(model=str(source), group_size=32, device="cpu"))
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
