"""Build the off-lattice copy of a Llama or Qwen2 model: the same function, with every weight moved off its lattice.

Checkpoints that were dequantized from a 4-bit file hold few distinct values per group, which flatters some
roundings. The copy computes the same function with ordinary weights: the gains of the norms are folded
into the linears behind them, random pairs of residual channels are rotated (an RMSNorm of unit gain commutes
with any orthogonal matrix), and the head gets its own weight.

    python scripts/research/build_off_lattice_copy.py MODEL OUT [--seed 0] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOLERANCE = 1e-3
"""Largest accepted difference of logits before the cast, relative to the logits' standard deviation."""
CHECK_TOKENS = 64
MODEL_TYPES = ("llama", "qwen2")
"""What the construction holds for: RMSNorms with plain gains in front of linears, nothing else on the residual."""
NOT_SUPPORTED = 4
FAILED = 1


class UnsupportedModelError(Exception):
    """The model is not one whose structure this script knows."""


@dataclass(frozen=True)
class Rotation:
    """Orthogonal matrix Q that rotates disjoint pairs of residual channels.

    Attributes:
        first: ``[pairs]`` int64, one channel of each pair.
        second: ``[pairs]`` int64, the other one.
        cosine: ``[pairs]`` float64.
        sine: ``[pairs]`` float64.
    """

    first: Tensor
    second: Tensor
    cosine: Tensor
    sine: Tensor

    @classmethod
    def random(cls, channels: int, seed: int) -> Rotation:
        """Draw random pairs with a random angle each; of an odd number one channel stays.

        Args:
            channels: Width of the residual stream.
            seed: Seed of the draw.

        Returns:
            The rotation.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(channels, generator=generator)[: channels // 2 * 2]
        angles = torch.rand(channels // 2, generator=generator, dtype=torch.float64) * (2 * torch.pi)
        return cls(order[::2], order[1::2], angles.cos(), angles.sin())

    def last_axis(self, matrix: Tensor) -> Tensor:
        """Multiply by Q from the right.

        Args:
            matrix: ``[..., channels]`` float64.

        Returns:
            ``matrix @ Q``, same shape.
        """
        result = matrix.clone()
        one, other = matrix[..., self.first], matrix[..., self.second]
        result[..., self.first] = one * self.cosine - other * self.sine
        result[..., self.second] = one * self.sine + other * self.cosine
        return result

    def first_axis(self, matrix: Tensor) -> Tensor:
        """Multiply by the transpose of Q from the left.

        Args:
            matrix: ``[channels]`` or ``[channels, in]`` float64.

        Returns:
            ``Qᵀ @ matrix``, same shape.
        """
        return self.last_axis(matrix.T).T.contiguous() if matrix.dim() > 1 else self.last_axis(matrix)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        arguments: Command line without the program name (default: ``sys.argv[1:]``).

    Returns:
        Exit code: 0, 1 when the copy is not the same function, 4 when the model is not supported.
    """
    parser = argparse.ArgumentParser(description="Build the off-lattice copy of a Llama or Qwen2 model.")
    parser.add_argument("model", type=Path, help="folder of the original")
    parser.add_argument("out", type=Path, help="folder to create (missing or empty)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rotation (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="stored dtype (default: %(default)s)")
    options = parser.parse_args(arguments)
    out: Path = options.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        print(f"error: {out} exists and is not empty; name another folder", file=sys.stderr)
        return FAILED
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        original = load_original(options.model)
    except UnsupportedModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_SUPPORTED
    copy = build_off_lattice_copy(original, options.seed)
    difference = relative_difference(original, copy)
    print(f"max |logits difference| / std(logits), float32: {difference:.2e} (at most {TOLERANCE:.0e} accepted)")
    if not difference <= TOLERANCE:
        print("error: the copy does not compute the same function; nothing was written", file=sys.stderr)
        return FAILED
    round_weights(copy, DTYPES[options.dtype])
    print(f"the same with the weights rounded to {options.dtype}: {relative_difference(original, copy):.2e}")
    save(copy.bfloat16() if options.dtype == "bfloat16" else copy, options.model, out)
    print(f"{out}: built")
    return 0


def load_original(folder: Path) -> PreTrainedModel:
    """Load the original in float32, refusing what the construction is not proven for.

    Args:
        folder: Hugging Face folder.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: Not an unquantized model of these types.
    """
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(f"{folder} holds no config.json; expected a folder of a Llama or Qwen2 model")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(f"{folder} is a {config.model_type} model; supported are {', '.join(MODEL_TYPES)}")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{folder} is quantized; the copy is built from an unquantized model")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    return model


def build_off_lattice_copy(original: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Fold the gains, rotate the residual stream and untie the head, in float64.

    Args:
        original: Float32 model; left as it is.
        seed: Seed of the rotation.

    Returns:
        A float32 model that computes the same function.
    """
    rotation = Rotation.random(original.config.hidden_size, seed)
    tensors = {name: tensor.double() for name, tensor in original.state_dict().items()}
    copied_tensors = transform(tensors, original.config.num_hidden_layers, rotation)
    entries = original.config.to_dict() | {"tie_word_embeddings": False}
    entries.pop("_name_or_path", None)
    copy: PreTrainedModel = type(original)(type(original.config)(**entries)).float()
    copy.load_state_dict({name: tensor.float() for name, tensor in copied_tensors.items()})
    copy.generation_config = original.generation_config
    copy.eval()
    return copy


def transform(tensors: dict[str, Tensor], blocks: int, rotation: Rotation) -> dict[str, Tensor]:
    """Tensors of the copy.

    Args:
        tensors: Float64 tensors of the original by name, the head included.
        blocks: Number of blocks.
        rotation: Rotation of the residual stream.

    Returns:
        Float64 tensors by the same names.
    """
    result = dict(tensors)
    result["model.embed_tokens.weight"] = rotation.last_axis(tensors["model.embed_tokens.weight"])
    fold_norm(result, "model.norm.weight", ["lm_head.weight"], rotation)
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        attention = [f"{prefix}.self_attn.{name}_proj.weight" for name in "qkv"]
        feed_forward = [f"{prefix}.mlp.{name}_proj.weight" for name in ("gate", "up")]
        fold_norm(result, f"{prefix}.input_layernorm.weight", attention, rotation)
        fold_norm(result, f"{prefix}.post_attention_layernorm.weight", feed_forward, rotation)
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            for kind in ("weight", "bias"):
                name = f"{prefix}.{writer}.{kind}"
                if name in result:
                    result[name] = rotation.first_axis(result[name])
    return result


def fold_norm(tensors: dict[str, Tensor], norm: str, linears: list[str], rotation: Rotation) -> None:
    """Move the gains of one norm into the linears behind it and rotate their input side, in place.

    Args:
        tensors: Float64 tensors by name.
        norm: Name of the gain, ``[hidden]``; becomes ones.
        linears: Names of the weights that read the norm's output, ``[out, hidden]`` each.
        rotation: Rotation of the residual stream.
    """
    for linear in linears:
        tensors[linear] = rotation.last_axis(tensors[linear] * tensors[norm])
    tensors[norm] = torch.ones_like(tensors[norm])


@torch.no_grad()
def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round every parameter to the stored dtype and keep computing in float32.

    Args:
        model: Float32 model, changed in place.
        dtype: Stored dtype.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


@torch.no_grad()
def relative_difference(original: PreTrainedModel, copy: PreTrainedModel) -> float:
    """Largest difference of logits on a short row of random tokens.

    Args:
        original: Float32 model.
        copy: Float32 model to compare with it.

    Returns:
        max |difference| / standard deviation of the original's logits.
    """
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(original.config.vocab_size, (1, CHECK_TOKENS), generator=generator)
    expected = original(input_ids=row, use_cache=False).logits
    found = copy(input_ids=row, use_cache=False).logits
    return float((found - expected).abs().max() / expected.std())


def save(copy: PreTrainedModel, model: Path, out: Path) -> None:
    """Save the copy with the original's tokenizer; ``out`` appears only when everything is in it.

    Args:
        copy: Model in the stored dtype.
        model: Folder of the original.
        out: Folder to create.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        copy.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(model).save_pretrained(unfinished)
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
