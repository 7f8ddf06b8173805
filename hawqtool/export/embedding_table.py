"""The token embedding in 8 bits: codes under the name of the weight, and a scale for every row.

transformers 5.17 with compressed-tensors 0.18 loads this form (``int-quantized``), of tied tables too if the head has
scales of its own: its codes are the embedding's. It does not load a packed table (``pack-quantized``): packing takes
the attribute ``weight`` away, which the initialization of an ``nn.Embedding`` reads whether or not anything is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hawqtool.checkpoint.index import CheckpointIndex
from hawqtool.config import RunConfig
from hawqtool.errors import UsageError
from hawqtool.formats import CHANNEL, QuantFormat
from hawqtool.model.skeleton import token_embedding
from hawqtool.parsing import ParseError, load_json
from hawqtool.rounding.grid import Quantized, dequantize
from hawqtool.runtime.reporter import Reporter

TABLE_FORMAT = "int-quantized"
"""Format of a config group whose codes are one byte each."""

TABLE_GROUP = "embedding"
"""Name of that group."""

TABLE = QuantFormat(8, CHANNEL)
"""Format of a table: the error of a row is a hundredth of it, below that of 4-bit layers by far."""

_AS_IT_IS = 16
"""What ``--embedding-bits`` is where the embedding keeps its dtype."""

MOST = 127
"""Largest code."""

CODES, SCALE = ".weight", ".weight_scale"
_ROWS = 1 << 12
"""Rows that are rounded at a time."""


@dataclass(frozen=True)
class EmbeddingTable:
    """A table in 8 bits.

    Args:
        tensor: Its name in the checkpoint.
        modules: Modules that read it, by their names in the checkpoint: the embedding, and a head that is tied to it.
        aliases: Their names in the model that transformers builds, where these are others: it asks for both.
    """

    tensor: str
    modules: tuple[str, ...]
    aliases: tuple[str, ...] = ()

    @property
    def scales(self) -> tuple[str, ...]:
        """Names of the scales, one tensor a module."""
        return tuple(f"{module}{SCALE}" for module in self.modules)


def embedding_table(model: Any, stored_names: Mapping[str, str], index: CheckpointIndex) -> EmbeddingTable:
    """The token embedding of a model.

    Args:
        model: Skeleton.
        stored_names: Name of a parameter to that of its tensor, where they differ.
        index: The checkpoint.

    Raises:
        UsageError: If there is none that can be stored in 8 bits.
    """
    found = find_table(model, stored_names, index)
    if isinstance(found, str):
        raise UsageError(f"--embedding-bits 8: {found}; drop the flag")
    return found


def find_table(model: Any, stored_names: Mapping[str, str], index: CheckpointIndex) -> EmbeddingTable | str:
    """The token embedding, or why it cannot be stored in 8 bits; arguments are those of `embedding_table`."""
    embedding = model.get_input_embeddings() if token_embedding(model) else None
    if not isinstance(embedding, nn.Embedding):
        return f"{type(model).__name__} has no token embedding"
    readers = {name: module for name, module in model.named_modules() if _weight(module) is embedding.weight}
    others = [name for name, module in readers.items() if module not in (embedding, model.get_output_embeddings())]
    names = [stored_names.get(f"{name}.weight", f"{name}.weight") for name in readers]
    tensor = next((name for name in names if name in index.tensors), None)
    if others or tensor is None or index.tensors[tensor].dtype not in ("BF16", "F16", "F32"):
        found = f"{others[0]} reads its weight too" if others else f"{names[0]} is not stored in 16 or 32 bits"
        return f"{found}, expected an embedding that a head alone may share"
    modules = tuple(name.removesuffix(CODES) for name in names)
    return EmbeddingTable(tensor, modules, tuple(name for name in readers if name not in modules))


def with_embedding_bits(
    config: RunConfig, model: Any, stored_names: Mapping[str, str], index: CheckpointIndex, reporter: Reporter
) -> RunConfig:
    """The configuration with the width of the embedding: what is asked for, else 8 bits where that lowers the loss.

    A byte a number costs next to nothing, and under a target size the linears get what it saves, as much as two bits a
    weight in small models. Transformers alone loads it.

    Args:
        config: The run's configuration.
        model: Skeleton.
        stored_names: Name of a parameter to that of its tensor, where they differ.
        index: The checkpoint.
        reporter: Is told where a target size decides.
    """
    if config.embedding_bits is not None:
        return config
    bits = _AS_IT_IS
    if config.target_size is not None and config.profile == "transformers" and config.to != "gguf":
        table = find_table(model, stored_names, index)
        if any(fmt.label == "w8ch-a8i" for fmt in config.special_formats):
            table = "w8ch-a8i on the menu is stored as its codes are"
        if isinstance(table, str):
            reporter.say(f"embedding   stays as it is: {table}")
        else:
            bits = TABLE.bits
            reporter.say("embedding   takes 8 bits, for the target size (--embedding-bits 16 leaves it as it is)")
    return config.model_copy(update={"embedding_bits": bits})


def _weight(module: nn.Module) -> Tensor | None:
    return module._parameters.get("weight")


def table_tensors(table: EmbeddingTable, weight: Tensor) -> dict[str, Tensor]:
    """What is stored of a table: codes ``[tokens, width]`` int8, scales ``[tokens, 1]`` of the weight's dtype.

    Rows are rounded to nearest, with the scale that their largest number needs. Nothing is summed, so that every
    device gives the same bits, by which the table is verified.
    """
    parts = [_rounded(rows) for rows in weight.split(_ROWS)]
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    return {table.tensor: codes, **{name: scales.clone() for name in table.scales}}


def _rounded(weight: Tensor) -> Quantized:
    rows = weight.float()
    largest = rows.abs().amax(1, keepdim=True)
    scales = torch.where(largest > 0, largest / MOST, 1.0).to(weight.dtype)
    return Quantized((rows / scales.float()).round().clamp(-MOST, MOST).to(torch.int8), scales, None)


def restored_table(codes: Tensor, scales: Tensor) -> Tensor:
    """The table that loaders compute with, in the dtype of the scales."""
    return dequantize(codes, scales, None)


def with_tables(config: dict[str, Any], tables: Sequence[EmbeddingTable]) -> dict[str, Any]:
    """A ``quantization_config`` that says so of tables too."""
    if not tables:
        return config
    modules = [module for table in tables for module in (*table.modules, *table.aliases)]
    group = {
        "targets": [f"re:{module.replace('.', chr(92) + '.')}$" for module in modules],
        "weights": {
            "num_bits": TABLE.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel",
            "group_size": None,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": TABLE_FORMAT,
    }
    groups = {**config["config_groups"], TABLE_GROUP: group}
    return {**config, "config_groups": groups, "ignore": [name for name in config["ignore"] if name not in modules]}


def stored_tables(index: CheckpointIndex) -> dict[str, EmbeddingTable]:
    """Tables of a written checkpoint by name of their tensor: codes of one byte with scales beside them."""
    bare = [n.removesuffix(SCALE) for n in index.tensors if n.endswith(SCALE)]
    bare = [module for module in bare if f"{module}.weight_packed" not in index.tensors]
    owners = [module for module in bare if f"{module}{CODES}" in index.tensors]
    found = [module for module in owners if index.tensors[f"{module}{CODES}"].dtype == "I8"]
    if len(found) != 1 or not _has_group(index.folder / "config.json"):
        return {}
    shape = index.tensors[f"{found[0]}{SCALE}"].shape
    tied = [m for m in bare if m not in owners and index.tensors[f"{m}{SCALE}"].shape == shape]
    return {f"{found[0]}{CODES}": EmbeddingTable(f"{found[0]}{CODES}", (found[0], *tied))}


def _has_group(path: Path) -> bool:
    """Whether a configuration tells of a table, whose codes are stored as those of layers with INT8 inputs are."""
    try:
        config = load_json(path)
    except ParseError:
        return True  # nothing tells of such layers
    found = config.get("quantization_config") if isinstance(config, dict) else None
    groups = found.get("config_groups") if isinstance(found, dict) else None
    return not isinstance(groups, dict) or TABLE_GROUP in groups


def table_modules(index: CheckpointIndex) -> tuple[str, ...]:
    """Modules of a written checkpoint that read a table in 8 bits."""
    return tuple(module for table in stored_tables(index).values() for module in table.modules)
