"""Kinds of modification of an output folder, by group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modifying.edits import (
    WEIGHTS,
    Edit,
    added,
    bytes_edit,
    header_edit,
    json_edit,
    removed,
    swap_edit,
    tensor_edit,
)

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
DOWN = "model.layers.1.mlp.down_proj"
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
CHECKSUMS, PLAN, MANIFEST = "reproduce/checksums.json", "reproduce/plan.json", "reproduce/manifest.json"


@dataclass(frozen=True)
class Kind:
    """A kind of modification.

    Args:
        group: Heading of the table.
        name: What is done.
        edit: Does it to a folder.
        note: Why nothing finds it when all records are forged as well, where that is so.
    """

    group: str
    name: str
    edit: Edit
    note: str = ""


def _random(tensor: Tensor) -> None:
    generator = torch.Generator().manual_seed(7)
    tensor.copy_(torch.randint(-(2**31), 2**31, tensor.shape, generator=generator, dtype=torch.int64).to(tensor.dtype))


def _flip(bit: int) -> Callable[[Tensor], Any]:
    return lambda t: t[3, 1].bitwise_xor_(1 << bit)


def _learned(change: Callable[[Tensor], Any]) -> Edit:
    """A norm that the records call learned, in a run that trained."""

    def edit(folder: Path) -> None:
        tensor_edit(NORM, change)(folder)
        json_edit(CHECKSUMS, lambda c: c.update(changed=[NORM]))(folder)
        json_edit("report.json", lambda r: r.setdefault("config", {}).update(refine_steps=100))(folder)

    return edit


ONE_CODE = "a code or two of a weight may differ: rounding could have chosen them; `evaluate` measures the effect"

TENSORS = (
    ("a low bit of one code flipped", tensor_edit(f"{Q}.weight_packed", _flip(0)), ONE_CODE),
    ("the high bit of one code flipped", tensor_edit(f"{Q}.weight_packed", _flip(3)), ONE_CODE),
    (
        "two rows of codes exchanged",
        tensor_edit(f"{Q}.weight_packed", lambda t: t[:2].copy_(t[:2].flip(0).clone())),
        "",
    ),
    ("codes of a layer random", tensor_edit(f"{Q}.weight_packed", _random), ""),
    ("codes of one row random", tensor_edit(f"{DOWN}.weight_packed", lambda t: _random(t[4])), ""),
    ("codes of a layer zero", tensor_edit(f"{Q}.weight_packed", lambda t: t.zero_()), ""),
    ("codes of two layers exchanged", swap_edit(f"{K}.weight_packed", f"{V}.weight_packed"), ""),
    (
        "scales of two rows exchanged",
        tensor_edit(f"{Q}.weight_scale", lambda t: t[:2].copy_(t[:2].flip(0).clone())),
        ("scales of similar rows are alike: the weights stay near the original's; `evaluate` measures the effect"),
    ),
    ("scales of two layers exchanged", swap_edit(f"{K}.weight_scale", f"{V}.weight_scale"), ""),
    ("one scale negated", tensor_edit(f"{Q}.weight_scale", lambda t: t[5, 0].mul_(-1)), ""),
    ("one scale zero", tensor_edit(f"{Q}.weight_scale", lambda t: t[5, 0].zero_()), ""),
    ("one scale NaN", tensor_edit(f"{Q}.weight_scale", lambda t: t[5, 0].fill_(float("nan"))), ""),
    ("one scale infinite", tensor_edit(f"{Q}.weight_scale", lambda t: t[5, 0].fill_(float("inf"))), ""),
    ("one scale doubled", tensor_edit(f"{Q}.weight_scale", lambda t: t[5, 0].mul_(2)), ""),
    ("one scale 1 % larger", tensor_edit(f"{Q}.weight_scale", lambda t: t[5, 0].mul_(1.01)), ONE_CODE),
    ("scales of a layer negated", tensor_edit(f"{Q}.weight_scale", lambda t: t.mul_(-1)), ""),
    ("scales of a layer doubled", tensor_edit(f"{Q}.weight_scale", lambda t: t.mul_(2)), ""),
    ("scales of a layer halved", tensor_edit(f"{Q}.weight_scale", lambda t: t.mul_(0.5)), ""),
    ("weight_shape turned", tensor_edit(f"{DOWN}.weight_shape", lambda t: t.copy_(t.flip(0).clone())), ""),
    ("weight_shape larger", tensor_edit(f"{DOWN}.weight_shape", lambda t: t.add_(32)), ""),
    ("a value of the embedding changed", tensor_edit(EMBED, lambda t: t[3, 3].add_(1)), ""),
    ("two rows of the embedding exchanged", tensor_edit(EMBED, lambda t: t[5:7].copy_(t[5:7].flip(0).clone())), ""),
    ("the head changed", tensor_edit("lm_head.weight", lambda t: t[0].neg_()), ""),
    ("a norm's gain changed", tensor_edit(NORM, lambda t: t[0].add_(0.1)), ""),
    ("a norm zeroed and recorded as learned", _learned(lambda t: t.zero_()), ""),
    ("a norm doubled and recorded as learned", _learned(lambda t: t.mul_(2)), ""),
    ("one gain negated and recorded as learned", _learned(lambda t: t[0].neg_()), ""),
    (
        "a norm 1 % larger and recorded as learned",
        _learned(lambda t: t.mul_(1.01)),
        ("training could have learned it; `evaluate` measures the effect"),
    ),
    ("an embedding recorded as learned", json_edit(CHECKSUMS, lambda c: c.update(changed=[EMBED])), ""),
)


def _entry(name: str, **fields: Any) -> Edit:
    return header_edit(lambda header: header[name].update(fields))


def _rename(header: dict[str, Any]) -> None:
    header["model.worm.weight"] = header.pop(NORM)


def _exchange(header: dict[str, Any]) -> None:
    first, second = (f"{name}.weight_packed" for name in (K, V))
    header[first], header[second] = header[second], header[first]


def _drop(header: dict[str, Any]) -> None:
    del header[NORM]


HEADERS = (
    ("dtype of a norm, equal size", _entry(NORM, dtype="F16"), ""),
    ("dtype of scales, equal size", _entry(f"{Q}.weight_scale", dtype="F16"), ""),
    ("dtype of codes, equal size", _entry(f"{Q}.weight_packed", dtype="F32"), ""),
    ("dtype of the embedding, equal size", _entry(EMBED, dtype="F16"), ""),
    ("shape of the embedding turned", header_edit(lambda h: h[EMBED]["shape"].reverse()), ""),
    (
        "shape of codes flat",
        header_edit(
            lambda h: h[f"{Q}.weight_packed"].update(
                shape=[h[f"{Q}.weight_packed"]["shape"][0] * h[f"{Q}.weight_packed"]["shape"][1]]
            )
        ),
        "",
    ),
    ("shape with a further dimension of one", header_edit(lambda h: h[NORM]["shape"].append(1)), ""),
    ("a tensor renamed", header_edit(_rename), ""),
    ("two tensors exchanged by offset", header_edit(_exchange), ""),
    ("a tensor dropped", header_edit(_drop), ""),
    ("offsets that overlap", header_edit(lambda h: h[NORM].update(data_offsets=[0, 128])), ""),
    ("metadata", header_edit(lambda h: h["__metadata__"].update(format="tf")), ("loaders read no weights from it")),
    ("the file cut", bytes_edit(WEIGHTS, lambda data: data[:-1]), ""),
    ("bytes behind the last tensor", bytes_edit(WEIGHTS, lambda data: data + b"\0"), ""),
    ("the weights removed", removed(WEIGHTS), ""),
)

CONFIG_VALUES: dict[str, Any] = {
    "architectures": ["EvilForCausalLM"], "auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "bos_token_id": 5,
    "dtype": "float32", "eos_token_id": 7, "hidden_act": "gelu", "hidden_size": 32, "max_position_embeddings": 64,
    "model_type": "mistral", "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 1,
    "rms_norm_eps": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 1.0},
    "tie_word_embeddings": True, "vocab_size": 64, "sliding_window": 4, "attention_bias": True,
}  # fmt: skip


def _key(key: str, value: Any) -> Edit:
    return json_edit("config.json", lambda config: config.update({key: value}))


def _quantization(change: Callable[[dict[str, Any]], Any]) -> Edit:
    return json_edit("config.json", lambda config: change(config["quantization_config"]))


def _group(change: Callable[[dict[str, Any]], Any]) -> Edit:
    return _quantization(lambda q: change(next(iter(q["config_groups"].values()))))


QUANTIZATION = (
    ("num_bits", _group(lambda g: g["weights"].update(num_bits=5)), ""),
    ("group_size", _group(lambda g: g["weights"].update(group_size=16)), ""),
    ("strategy", _group(lambda g: g["weights"].update(strategy="channel")), ""),
    ("symmetric", _group(lambda g: g["weights"].update(symmetric=False)), ""),
    ("type", _group(lambda g: g["weights"].update(type="float")), ""),
    ("dynamic", _group(lambda g: g["weights"].update(dynamic=True)), ""),
    ("actorder", _group(lambda g: g["weights"].update(actorder="group")), ""),
    ("input_activations", _group(lambda g: g.update(input_activations={"num_bits": 8})), ""),
    ("output_activations", _group(lambda g: g.update(output_activations={"num_bits": 8})), ""),
    ("format of a group", _group(lambda g: g.update(format="int-quantized")), ""),
    ("a target removed", _group(lambda g: g["targets"].pop()), ""),
    ("a target without its end", _group(lambda g: g["targets"].append(g["targets"].pop().removesuffix("$"))), ""),
    ("a class as target", _group(lambda g: g["targets"].append("Linear")), ""),
    ("a target that hits nothing", _group(lambda g: g["targets"].append("re:.*nothing$")), ""),
    ("a target that hits the embedding", _group(lambda g: g["targets"].append("re:.*embed_tokens$")), ""),
    ("kv_cache_scheme", _quantization(lambda q: q.update(kv_cache_scheme={"num_bits": 8, "type": "float"})), ""),
    ("transform_config", _quantization(lambda q: q.update(transform_config={"config_groups": {"R": {}}})), ""),
    ("sparsity_config", _quantization(lambda q: q.update(sparsity_config={"format": "dense"})), ""),
    ("global_compression_ratio", _quantization(lambda q: q.update(global_compression_ratio=2.0)), ""),
    ("quantization_status", _quantization(lambda q: q.update(quantization_status="frozen")), ""),
    ("quant_method", _quantization(lambda q: q.update(quant_method="gptq")), ""),
    ("format", _quantization(lambda q: q.update(format="dense")), ""),
    ("ignore without the head", _quantization(lambda q: q.update(ignore=[])), ""),
    ("ignore of a packed layer", _quantization(lambda q: q["ignore"].append(Q)), ""),
    ("ignore of what does not exist", _quantization(lambda q: q["ignore"].append("model.router")), ""),
    ("no quantization_config", json_edit("config.json", lambda config: config.pop("quantization_config")), ""),
)

ADDED = (
    *("evil.py", "modeling_evil.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json"),
    *("adapter_model.safetensors", "model-00001-of-00002.safetensors", "consolidated.safetensors", "model.gguf"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja", "added_tokens.json"),
    *("special_tokens_map.json", "vocab.txt", "merges.txt", "preprocessor_config.json", "quantize_config.json"),
    *("1_Pooling/config.json", ".hidden", "reproduce/more.json", "model.safetensors.index.json"),
)


def _folder_link(folder: Path) -> None:
    (folder / "linked").symlink_to(folder.parent, target_is_directory=True)


FILES = (
    *((f"{name} added", added(name), "") for name in ADDED if name != "model.safetensors.index.json"),
    (
        "an index beside the single file",
        added("model.safetensors.index.json"),
        ("loaders take the single file, and nobody reads the index"),
    ),
    ("a link to a folder", _folder_link, ""),
    *(
        (f"{name} changed", bytes_edit(name, lambda data: data + b" "), "")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    ),
    *((f"{name} removed", removed(name), "") for name in ("tokenizer.json", "generation_config.json")),
    (
        "a chat template in tokenizer_config.json",
        json_edit("tokenizer_config.json", lambda c: c.update(chat_template="{{ evil }}")),
        "",
    ),
    ("config.json removed", removed("config.json"), ""),
)

CLAIM = "a report's figures are what its author says; `evaluate` measures them again"

RECORDS = (
    ("a checksum in checksums.json", json_edit(CHECKSUMS, lambda c: c["tensors"].update({NORM: "0" * 64})), (
        "forging sets it right again"
    )),
    ("a weight error in checksums.json", json_edit(CHECKSUMS, lambda c: c["weight_error"].update({Q: 2.13})), (
        "forging sets it right again"
    )),
    ("no weight errors", json_edit(CHECKSUMS, lambda c: c.update(weight_error={})), "forging sets it right again"),
    ("checksums.json removed", removed(CHECKSUMS), ""),
    ("bits in plan.json", json_edit(PLAN, lambda p: p["layers"][0].update(bits=7)), ""),
    ("bytes in plan.json", json_edit(PLAN, lambda p: p["layers"][0].update(bytes=1)), ""),
    ("total_bytes in plan.json", json_edit(PLAN, lambda p: p.update(total_bytes=1)), ""),
    ("a layer dropped from plan.json", json_edit(PLAN, lambda p: p["layers"].pop()), ""),
    ("plan.json removed", removed(PLAN), ""),
    ("a hash in the manifest", json_edit(MANIFEST, lambda m: m["files"]["tokenizer.json"].update(sha256="0" * 64)), (
        "forging sets it right again"
    )),
    ("a file dropped from the manifest", json_edit(MANIFEST, lambda m: m["files"].pop("tokenizer.json")), (
        "forging sets it right again"
    )),
    ("the manifest removed", removed(MANIFEST), "forging sets it right again"),
    ("a figure in report.json", json_edit("report.json", lambda r: r.update(evaluation={"kl": 0.0})), CLAIM),
    ("the config in report.json", json_edit("report.json", lambda r: r.update(config={"bits": [8]})), CLAIM),
    ("report.json removed", removed("report.json"), CLAIM),
    ("README.md rewritten", added("README.md", "mine"), "the card is its author's, and is never checked"),
    ("report.html rewritten", added("report.html", "mine"), "`hawqtool report` draws it again; it is never checked"),
)  # fmt: skip


def kinds() -> list[Kind]:
    """All kinds, in the order of the table."""
    config = [(key, _key(key, value), "") for key, value in CONFIG_VALUES.items()]
    groups = {
        "Tensors": TENSORS,
        "Header of the weights": HEADERS,
        "Keys of config.json": config,
        "quantization_config": QUANTIZATION,
        "Files": FILES,
        "Records": RECORDS,
    }
    return [Kind(group, *entry) for group, entries in groups.items() for entry in entries]
