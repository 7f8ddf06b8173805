"""Random checkpoints in the shapes of known models, written shard by shard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hawqtool.checkpoint.index import INDEX_FILE
from hawqtool.errors import UsageError

SPECIAL_TOKENS = ("<s>", "</s>")
TOKENIZER_SIZE = len(SPECIAL_TOKENS) + 256
"""Tokens that the written tokenizer knows: bytes and special ones. Embeddings may have more rows."""
STANDARD_DEVIATION = 0.02
_BF16_BYTES = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model.

    Args:
        name: Name on the command line.
        hidden: Width of the residual stream.
        intermediate: Width inside the feed-forward layers.
        heads: Query heads.
        key_value_heads: Key and value heads.
        blocks: Transformer blocks.
        vocabulary: Tokens.
        tied: Whether the head is the embedding.
        head_width: Width of a head.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    blocks: int
    vocabulary: int
    tied: bool
    head_width: int

    def config(self) -> dict[str, Any]:
        """Content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "num_hidden_layers": self.blocks,
            "head_dim": self.head_width,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }

    def shards(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Shapes of the tensors by name: what is outside the blocks, then block after block."""
        outside = {"model.embed_tokens.weight": (self.vocabulary, self.hidden), "model.norm.weight": (self.hidden,)}
        if not self.tied:
            outside["lm_head.weight"] = (self.vocabulary, self.hidden)
        yield outside
        queries, others = self.heads * self.head_width, self.key_value_heads * self.head_width
        for index in range(self.blocks):
            block = {
                "input_layernorm": (self.hidden,),
                "self_attn.q_proj": (queries, self.hidden),
                "self_attn.k_proj": (others, self.hidden),
                "self_attn.v_proj": (others, self.hidden),
                "self_attn.o_proj": (self.hidden, queries),
                "post_attention_layernorm": (self.hidden,),
                "mlp.gate_proj": (self.intermediate, self.hidden),
                "mlp.up_proj": (self.intermediate, self.hidden),
                "mlp.down_proj": (self.hidden, self.intermediate),
            }
            yield {f"model.layers.{index}.{name}.weight": size for name, size in block.items()}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 192, 4, 2, 2, 512, False, 16),
        Shape("smollm2", 576, 1536, 9, 3, 30, 49152, True, 64),
        Shape("llama-3-8b", 4096, 14336, 32, 8, 32, 128256, False, 128),
        Shape("llama-3-70b", 8192, 28672, 64, 8, 80, 128256, False, 128),
    )
}


@dataclass(frozen=True)
class FamilyShape:
    """Sizes of a model of another family, those that transformers gives its configuration by default.

    Args:
        name: Name on the command line.
        model_type: The family in transformers.
        hidden: Width of the residual stream.
        blocks: Transformer blocks.
        vocabulary: Tokens.
        head_width: Width of a head; None where the default is the model's.
        period: Blocks after which the kinds of layers repeat: with fewer of a hybrid, one kind would be missing.
    """

    name: str
    model_type: str
    hidden: int
    blocks: int
    vocabulary: int
    head_width: int | None = None
    period: int = 1


FAMILIES = {
    shape.name: shape
    for shape in (
        FamilyShape("qwen3.5-35b-a3b", "qwen3_5_moe_text", 2048, 40, 248320, period=4),
        FamilyShape("qwen3-30b-a3b", "qwen3_moe", 2048, 48, 151936, 128),
    )
}


def named_shape(name: str, blocks: int | None, vocabulary: int | None, width: float = 1.0) -> Shape | FamilyShape:
    """A shape with other numbers of blocks and tokens, and a fraction of its width (in whole heads).

    Raises:
        UsageError: If a number is too small, or the width of a family is to be another.
    """
    if name in FAMILIES:
        if width != 1.0:
            raise UsageError(f"{name} has one width; expected a shape of Llama with --scaling")
        family = FAMILIES[name]
        return replace(family, blocks=blocks or family.blocks, vocabulary=vocabulary or family.vocabulary)
    shape = SHAPES[name]
    groups = max(1, round(shape.key_value_heads * width))
    heads = groups * (shape.heads // shape.key_value_heads)
    shape = replace(
        shape,
        hidden=shape.hidden * heads // shape.heads,
        intermediate=max(32, round(shape.intermediate * heads / shape.heads / 32) * 32),
        heads=heads,
        key_value_heads=groups,
        blocks=shape.blocks if blocks is None else blocks,
        vocabulary=shape.vocabulary if vocabulary is None else vocabulary,
    )
    least = TOKENIZER_SIZE
    if shape.blocks < 1 or shape.vocabulary < least:
        raise UsageError(
            f"{shape.blocks} blocks and {shape.vocabulary} tokens; expected at least 1 block and {least} tokens"
        )
    return shape


def write_checkpoint(
    shape: Shape | FamilyShape, folder: Path, device: torch.device, sparse: bool = False, seed: int = 0
) -> Path:
    """Write config, tokenizer and bf16 weights, one shard in memory at a time; a finished folder is used again.

    Args:
        shape: Sizes.
        folder: Folder to create.
        device: Where the random numbers are drawn.
        sparse: Write headers only, in files of full apparent size that take no room.
        seed: Seed of the weights.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(shape, FamilyShape):
        return _write_family(shape, folder, device, seed)
    shards = list(shape.shards())
    weight_map: dict[str, str] = {}
    generator = torch.Generator(device).manual_seed(seed)
    for position, sizes in enumerate(shards):
        name = f"model-{position + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(sizes, name)
        if sparse:
            _write_header(sizes, folder / name)
        else:
            tensors = {tensor: _values(size, generator).cpu() for tensor, size in sizes.items()}
            save_file(tensors, folder / name, metadata={"format": "pt"})
    total = _BF16_BYTES * sum(math.prod(size) for sizes in shards for size in sizes.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _byte_tokenizer().save_pretrained(folder)
    _write_json(folder / "config.json", shape.config())  # last: it says that the folder is complete
    return folder


def _write_family(shape: FamilyShape, folder: Path, device: torch.device, seed: int) -> Path:
    """All tensors at once, under the names that transformers gives them on disk."""
    config = AutoConfig.for_model(shape.model_type)
    types = getattr(config, "layer_types", None)
    config.update({"num_hidden_layers": shape.blocks, "vocab_size": shape.vocabulary})
    if shape.head_width is not None:
        config.update({"head_dim": shape.head_width})
    if types:
        # The last ones, so that a single block of a hybrid has attention: transformers refuses a cache without any.
        config.layer_types = types[len(types) - shape.blocks :]
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    unfinished = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(unfinished, max_shard_size="4GB")
    _byte_tokenizer().save_pretrained(unfinished)
    folder.rmdir()
    return unfinished.rename(folder)


def _values(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    values = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
    return values.normal_(0.0, STANDARD_DEVIATION, generator=generator)


def _write_header(sizes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + _BF16_BYTES * math.prod(size)
        entries[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + end)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, so that `hawqtool` can be run on the folder with any text."""
    symbols = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL_TOKENS[0], eos_token=SPECIAL_TOKENS[1])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
