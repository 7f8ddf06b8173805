"""The GGUF file that llama.cpp's converter makes of a tiny Llama, in bf16: names, order of rows, metadata."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def stored_name(name: str) -> str:
    """Name of a tensor in the file."""
    module = name.removesuffix(".weight")
    if module in ENDS:
        return f"{ENDS[module]}.weight"
    _, _, block, inner = module.split(".", 3)
    return f"blk.{block}.{NAMES[inner]}.weight"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp has them: the halves of each head take turns."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape).contiguous()


def write_template(model: Path, path: Path, permute: bool = True) -> Path:
    """Write it.

    Args:
        model: Folder of a tiny Llama.
        path: The file.
        permute: Whether query and key rows are reordered, as llama.cpp needs them.
    """
    import gguf

    config, tensors = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_file_type(32)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, tensor in tensors.items():
        stored = stored_name(name)
        part = stored.split(".")[-2]
        if tensor.dim() == 1:
            writer.add_tensor(stored, tensor.float().numpy())
            continue
        rows = permuted(tensor, heads[part]) if permute and part in heads else tensor
        data = rows.contiguous().view(torch.uint8).numpy().astype(np.uint8)
        writer.add_tensor(stored, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
