"""Tokens and numbers in one tensor, and out of it again to the bit."""

from __future__ import annotations

import pytest
import torch

from hawqtool.model.inputs.row_format import RowFormat


@pytest.mark.parametrize(("shape", "positions"), [((3, 4, 5), 7), ((8, 6), 16), ((1, 1, 1), 9), ((5,), 5)])
def test_both_come_back_to_the_bit(shape: tuple[int, ...], positions: int) -> None:
    form = RowFormat("input_ids", "pixel_values", shape)
    tokens, values = torch.randint(0, 1 << 24, (3, positions)), torch.randn(3, *shape)
    tokens[0, 0] = (1 << 24) - 1  # the largest
    rows = form.join(tokens, values)
    assert rows.shape[:2] == (3, positions) and rows.dtype == torch.float32
    found = form.split(rows)
    assert torch.equal(found["input_ids"], tokens) and found["input_ids"].dtype == torch.int64
    assert torch.equal(found["pixel_values"], values)
    for single, row in zip(form.split(rows[1:2]).values(), (tokens[1:2], values[1:2]), strict=True):
        assert torch.equal(single, row)


def test_a_free_length_is_filled_up_with_less_than_a_number_a_position() -> None:
    samples = RowFormat("decoder_input_ids", "input_values", (-1,))
    values = torch.randn(2, 100)
    found = samples.split(samples.join(torch.zeros(2, 8, dtype=torch.int64), values))["input_values"]
    assert found.shape == (2, 104)
    assert torch.equal(found[:, :100], values) and not found[:, 100:].any()
    bands = RowFormat("decoder_input_ids", "input_features", (-1, 10))
    spectrum = torch.randn(2, 7, 10)
    assert torch.equal(
        bands.split(bands.join(torch.zeros(2, 8, dtype=torch.int64), spectrum))["input_features"], spectrum
    )


def test_tokens_that_float32_does_not_hold_are_refused() -> None:
    form = RowFormat("input_ids", "pixel_values", (1,))
    with pytest.raises(ValueError, match="16777216"):
        form.join(torch.tensor([[1 << 24]]), torch.zeros(1, 1))


def test_examples_and_names() -> None:
    joint = RowFormat("input_ids", "pixel_values", (3, 4, 4))
    assert joint.kind == "images with tokens"
    found = joint.split(joint.example(2, 5, 7, torch.bfloat16))
    assert found["input_ids"].tolist() == [[7] * 5] * 2 and not found["pixel_values"].any()
    assert RowFormat("input_ids").example(1, 3, 2, torch.float32).tolist() == [[2, 2, 2]]
    sound = RowFormat(None, "input_values", (-1,))
    assert sound.kind == "sounds" and sound.example(1, 3, 2, torch.float32).shape[1] % 72 == 0
