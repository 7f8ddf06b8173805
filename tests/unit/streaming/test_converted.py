"""Parameters that transformers joins, cuts or shares while loading, as a stream loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hawqtool.config import RunConfig
from hawqtool.errors import InputError
from hawqtool.model.kept import CONVERTED, SHARED
from hawqtool.pipeline.run.job import Job, prepare
from tests.support.tiny import VOCAB_SIZE, tiny_tokenizer

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "KimiLinearForCausalLM": _SIZES
    | {
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "linear_head_dim": 32,
        "linear_num_heads": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["linear_attention", "full_attention"],
    },
    "NomicBertForMaskedLM": _SIZES,
    "ZambaForCausalLM": _SIZES
    | {
        "num_hidden_layers": 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
    },
}


def saved(name: str, folder: Path) -> Path:
    kind = getattr(transformers, name)
    torch.manual_seed(1)
    kind(kind.config_class(**KINDS[name])).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def made(folder: Path, profile: str = "auto") -> Job:
    return prepare(RunConfig(model=str(folder), group_size=32, device="cpu", profile=profile))


@pytest.mark.parametrize(
    ("name", "reason", "example"),
    [
        ("KimiLinearForCausalLM", CONVERTED, "model.layers.0.self_attn.q_conv1d.weight"),
        ("NomicBertForMaskedLM", CONVERTED, "encoder.layers.0.attn.Wqkv.weight"),
        ("ZambaForCausalLM", SHARED, "model.layers.0.shared_transf.self_attn.q_proj.weight"),
    ],
)
def test_blocks_have_the_weights_that_transformers_loads(tmp_path: Path, name: str, reason: str, example: str) -> None:
    folder = saved(name, tmp_path)
    job, model = made(folder), getattr(transformers, name).from_pretrained(folder)
    kept = {tensor.name: tensor for tensor in job.structure.kept}
    found = next(tensor for stored, tensor in kept.items() if stored.endswith(example))
    assert (found.reason, found.block) == (reason, 0)
    assert found.name.removesuffix(".weight") in job.structure.other_linears or found.dimensions > 2
    stream = job.stream()
    for number, _ in enumerate(stream.blocks):
        place = job.structure.blocks[number].name
        expected = dict(model.get_submodule(place).named_parameters())
        with stream.block(number) as block:
            for parameter, value in block.module.named_parameters(remove_duplicate=False):
                if ".experts." not in parameter:
                    assert torch.equal(value, model.get_parameter(f"{place}.{parameter}"))
                    expected.pop(parameter, None)
        assert all(".experts." in parameter for parameter in expected)


def test_experts_that_stay_joined_are_no_packed_folder_for_transformers(tmp_path: Path) -> None:
    text = _SIZES | {
        "num_key_value_heads": 2,
        "moe_intermediate_size": [64, 64],
        "moe_k": 2,
        "moe_num_experts": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [3, 3, 2]},
    }
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 4, "patch_size": 8, "intermediate_size": 128}
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    transformers.Ernie4_5_VLMoeForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="only if all of them are packed; --profile vllm"):
        made(tmp_path)
    structure = made(tmp_path, "vllm").structure
    assert not any(".experts." in name for name in structure.linears)
    assert "model.layers.1.mlp.experts.7.down_proj" in structure.other_linears
