"""Rotated checkpoints against explicit folding with a dense matrix, and against the original's outputs; refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hawqtool.checkpoint.originals.recognition import read_original
from hawqtool.checkpoint.reader import TensorReader
from hawqtool.checkpoint.rotated.codec import original_index
from hawqtool.checkpoint.rotated.hadamard import Rotation
from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.evaluation.rotation_proof import rotation_difference
from hawqtool.model.rotation.fold import gain_offset, rotated_source
from hawqtool.pipeline.run.job import Job, prepare
from tests.support.tiny import tiny_llama
from tests.support.tiny_zoo import kind_named, save_kind

Tensors = dict[str, Tensor]
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
ROW = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(0))


def source(name: str, folder: Path) -> Path:
    if name == "llama, tied":  # a width with an odd factor, biases on both sides of the stream
        sizes: dict[str, Any] = {"hidden_size": 96, "attention_bias": True, "mlp_bias": True}
        return tiny_llama(folder, tie=True, **sizes)
    return save_kind(kind_named(name), folder)


def job_of(folder: Path, **settings: Any) -> Job:
    return prepare(RunConfig(model=str(folder), device="cpu", group_size=32, rotate="on", **settings))


def folded_by_hand(tensors: Tensors, q: Tensor) -> Tensors:
    """What a dense Q makes of a tied Llama with biases; all float64."""
    found, gain = dict(tensors), tensors["model.norm.weight"]
    embedding = tensors["model.embed_tokens.weight"]
    found["lm_head.weight"], found["model.embed_tokens.weight"] = (embedding * gain) @ q, embedding @ q
    for name in tensors:
        if name.endswith("norm.weight"):
            found[name] = torch.ones_like(gain)
        if re.search(r"(o|down)_proj.weight$", name):
            found[name] = q.T @ tensors[name]
        if re.search(r"(o|down)_proj.bias$", name):
            found[name] = tensors[name] @ q
    for block in (f"model.layers.{i}" for i in range(2)):
        for norm, linears in READERS.items():
            for linear in linears:
                weight = f"{block}.{linear}.weight"
                found[weight] = (tensors[weight] * tensors[f"{block}.{norm}.weight"]) @ q
    return found


def test_equals_explicit_folding(tmp_path: Path) -> None:
    job = job_of(source("llama, tied", tmp_path), seed=7)
    assert job.index.rotation == Rotation(96, 7)
    stored = TensorReader(read_original(tmp_path))
    q = Rotation(96, 7).apply(torch.eye(96))
    expected = folded_by_hand({name: stored.tensor(name).double() for name in stored.index.tensors}, q)
    exact, rounded = TensorReader(job.index, exact=True), TensorReader(job.index)
    assert set(job.index.tensors) == set(expected)
    for name, values in expected.items():
        assert torch.allclose(exact.tensor(name).double(), values, rtol=0, atol=1e-13), name
        # Rounded once, to the source's dtype.
        assert torch.equal(rounded.tensor(name), exact.tensor(name).to(torch.bfloat16)), name
        assert b"".join(rounded.chunks(name)) == rounded.tensor(name).view(torch.uint8).numpy().tobytes()
    plain = TensorReader(original_index(job.index))
    assert all(torch.equal(plain.tensor(n), stored.tensor(n)) for n in stored.index.tensors)
    assert torch.equal(plain.tensor("lm_head.weight"), stored.tensor("model.embed_tokens.weight"))
    assert original_index(job.index).rotation is None


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "qwen2-moe"])
def test_the_rotated_model_computes_the_same(tmp_path: Path, name: str) -> None:
    job = job_of(source(name, tmp_path), seed=1)
    rotation = job.index.rotation
    assert rotation is not None
    original = job.unrotated().stream(dtype=torch.float64)
    rotated = job.stream(TensorReader(job.index, exact=True), torch.float64)
    states = [stream.final_hidden(ROW, 1, lambda _: None) for stream in (original, rotated)]
    logits = [stream.outputs(ROW, hidden) for stream, hidden in zip((original, rotated), states, strict=True)]
    # Norms of transformers compute in float32.
    assert torch.allclose(*logits, rtol=0, atol=1e-5 * float(logits[0].abs().max()))
    assert not torch.allclose(*states, rtol=0, atol=0.1 * float(states[0].abs().max()))
    assert 0 < rotation_difference(original, rotated, rotation, ROW) < 2e-6


@pytest.mark.parametrize("tensor", ["mlp.down_proj.weight", "block_sparse_moe.gate.weight"])
def test_a_tensor_that_was_missed_is_found(tmp_path: Path, tensor: str) -> None:
    job = job_of(source("mixtral" if "moe" in tensor else "llama, tied", tmp_path))
    (name,) = (name for name in job.index.tensors if name.endswith(f"layers.1.{tensor}"))
    plain = replace(job.index, tensors=job.index.tensors | {name: original_index(job.index).tensors[name]})
    original, rotation = job.unrotated().stream(), job.index.rotation
    assert rotation is not None
    with pytest.raises(InputError, match=r"layers\.1 of the rotated model differs.*cannot be rotated"):
        rotation_difference(original, job.stream(TensorReader(plain, exact=True)), rotation, ROW)


REFUSED = {
    "gemma3": r"layers\.0: something else than a linear's output, such as a norm's, enters the residual stream",
    "neox-serial": r"around the blocks: a channel of the residual stream \(layer_norm\)",
    "cohere": r"layers\.0\.input_layernorm\.weight is of no root mean square norm",
    "bert-masked": "BertForMaskedLM is no causal language model",
    "qwen2-vl": "no row of tokens reaches model.visual",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_turn_is_refused(tmp_path: Path, name: str) -> None:
    save_kind(kind_named(name), tmp_path)
    with pytest.raises(InputError, match=f"--rotate: .*{REFUSED[name]}.*--rotate off"):
        rotated_source(tmp_path, read_original(tmp_path), 0)


class _Norm(torch.nn.Module):
    def __init__(self, added: float, centred: bool = False) -> None:
        super().__init__()
        self.weight, self.added, self.centred = torch.nn.Parameter(torch.zeros(16)), added, centred

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.added + self.weight)


def test_what_a_norm_adds_to_its_gain() -> None:
    found = [gain_offset(norm) for norm in (_Norm(0.0), _Norm(1.0), _Norm(0.5), _Norm(0.0, centred=True))]
    assert found == [0.0, 1.0, None, None]
