"""Rotations against the dense matrix of their definition, in float64."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import hadamard

from hawqtool.checkpoint.rotated.hadamard import Rotation


def dense(size: int, seed: int) -> NDArray[np.float64]:
    """Q from its definition, entry by entry."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    power = size // odd
    angles = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    hartley = (np.cos(angles) + np.sin(angles)) / np.sqrt(odd)
    bits = ""
    for number in range(-(-size // 256)):
        digest = hashlib.sha256(f"hawqtool rotation 1 {seed} {size} {number}".encode()).digest()
        bits += "".join(f"{byte:08b}"[::-1] for byte in digest)
    signs = np.array([-1.0 if bit == "1" else 1.0 for bit in bits[:size]])
    return np.diag(signs) @ np.kron(hartley, hadamard(power) / np.sqrt(power))


@pytest.mark.parametrize("size", [1, 2, 7, 64, 96, 576])
def test_equals_the_dense_orthogonal_matrix(size: int) -> None:
    rotation, q = Rotation(size, 3), torch.from_numpy(dense(size, 3))
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(rotation.apply(x), x.double() @ q, rtol=0, atol=1e-13)
    assert torch.allclose(rotation.undo(x), x.double() @ q.T, rtol=0, atol=1e-13)
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.allclose(rotation.undo(rotation.apply(x)), x.double(), rtol=0, atol=1e-13)


def test_blocks_of_a_row_are_rotated_apart() -> None:
    rotation, x = Rotation(12, 0), torch.randn(4, 36)
    assert torch.equal(rotation.apply(x), torch.cat([rotation.apply(part) for part in x.split(12, -1)], -1))


def test_a_seed_stands_for_the_same_numbers_everywhere() -> None:
    """The files of earlier versions are recomputed by these signs and this order of sums."""
    assert "".join("-" if s < 0 else "+" for s in Rotation(24, 0).signs.tolist()) == SIGNS
    assert not torch.equal(Rotation(24, 0).signs, Rotation(24, 1).signs)
    x = torch.arange(576, dtype=torch.float64).sin()[None]
    assert hashlib.sha256(Rotation(576, 0).apply(x).float().numpy().tobytes()).hexdigest()[:16] == DIGEST
    # However many rows are turned at a time, the bits are the same.
    many = Rotation(576, 0).apply(torch.cat([x, 3 * x, x]))
    assert torch.equal(many[2:], Rotation(576, 0).apply(x))


SIGNS = "+-+--+---++-++-+--+++--+"
DIGEST = "4271a5df7e8f3216"
