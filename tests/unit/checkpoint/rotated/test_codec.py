"""Rotated tensors as a GPU computes them, with torch's operations on a CPU, against compiled code: the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hawqtool.checkpoint.index import TensorInfo
from hawqtool.checkpoint.rotated import codec
from hawqtool.checkpoint.rotated.codec import RotatedInfo, rotate_tensor
from hawqtool.checkpoint.rotated.hadamard import Rotation

ROTATION = Rotation(24, 1)
KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def stored(name: str, dtype: str, *shape: int) -> tuple[TensorInfo, Tensor]:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).to(KINDS[dtype])
    return TensorInfo(name, dtype, shape, Path("model.safetensors"), 0, values.nbytes), values


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("asked", [None, "F64"])
def test_bits_do_not_depend_on_the_device(monkeypatch: pytest.MonkeyPatch, dtype: str, asked: str | None) -> None:
    gain, read, write, bias = (
        stored("gain", dtype, 48), stored("read", dtype, 40, 48), stored("writer", dtype, 48, 17),
        stored("bias", dtype, 48),
    )  # fmt: skip
    values = {info.name: tensor for info, tensor in (gain, read, write, bias)}
    square = stored("square", dtype, 48, 48)
    values["square"] = square[1]

    def info(base: TensorInfo, **fields: object) -> RotatedInfo:
        return RotatedInfo(base.name, base.dtype, base.shape, base.file, 0, base.num_bytes, base=base, **fields)  # type: ignore[arg-type]

    cases = [
        info(read[0], last=ROTATION, gain=gain[0], offset=1.0),
        info(write[0], first=ROTATION),
        info(square[0], first=ROTATION, last=ROTATION, gain=gain[0]),
        info(bias[0], last=ROTATION),
    ]
    expected = [rotate_tensor(case, lambda i: values[i.name], asked) for case in cases]
    monkeypatch.setattr(codec, "_turned", codec._turned_on_device)
    monkeypatch.setattr(codec, "_DEVICE_SLAB", 5 * 48)
    for case, known in zip(cases, expected, strict=True):
        found = rotate_tensor(case, lambda i: values[i.name], asked)
        assert torch.equal(found, known) and found.is_contiguous() and found.dtype == known.dtype
