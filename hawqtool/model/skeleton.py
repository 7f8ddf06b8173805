"""Build a model from its config without its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hawqtool.errors import HawqError, InputError, one_line
from hawqtool.model.experts import split_experts
from hawqtool.model.loading.initialization import compute_unstored
from hawqtool.model.stored_names import stored_names, why_unread
from hawqtool.model.tasks import MASKED, TASKS, class_task, model_task
from hawqtool.parsing import shown

SENTENCE_ENCODER = "modules.json"
"""File by which sentence-transformers knows its models; it loads them without a head."""

_LARGE = 1 << 14
_FILLS = {"normal_", "trunc_normal_", "uniform_", "zero_", "zeros_", "ones_", "fill_", "constant_"}
_MAX_MODULES = 10_000
"""Most blocks, or experts of a block: modules take memory and time even without weights."""


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Large uninitialised tensors, the weights, go to the meta device; buffers such as rotary tables stay real.

    Building all on meta would lose the buffers that are computed in constructors and stored nowhere. What fills tensors
    is left out on meta, where it changes nothing and takes longer than on real ones.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and _num_elements(args, kwargs) >= _LARGE:
            kwargs = {**kwargs, "device": "meta"}
        if getattr(func, "__name__", "") in _FILLS:
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                return filled
        return func(*args, **kwargs)


def _num_elements(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    size = kwargs.get("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
    total = 1
    for extent in size:
        total *= int(extent)
    return total


def build_skeleton(
    folder: Path,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    tensors: Iterable[str] = (),
    vllm: bool = False,
) -> nn.Module:
    """Model of the folder's config, every parameter on the meta device, buffers real, experts split.

    Args:
        folder: Holds ``config.json``.
        dtype: dtype of the parameters.
        trust_remote_code: Whether code from the folder may run.
        tensors: Names in the checkpoint, for `untie_stored`.
        vllm: As in `why_unread`: experts that the profile's engines do not read one by one stay stacked.

    Raises:
        InputError: If transformers does not know the architecture, it is not supported, or it needs code from the
            folder that is not trusted.
    """
    config = _read_config(folder, trust_remote_code)
    try:
        with _LargeTensorsOnMeta(), torch.random.fork_rng(devices=[]):
            model = _build(config, dtype, trust_remote_code, (folder / SENTENCE_ENCODER).is_file())
    except HawqError:
        raise
    except Exception as error:  # configuration classes raise errors of any type on values that make no sense
        raise InputError(f"{folder}: transformers cannot build this model: {one_line(error)}") from error
    model_task(model)
    model.eval().requires_grad_(False)
    _configure(model)
    split_experts(model, why_unread(model, vllm))
    untie_stored(model, tensors)
    if tensors:
        compute_unstored(model, tensors)
    to_meta(model)
    return model


def _read_config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any type, as below
        raise InputError(f"{folder}: transformers cannot build this model: {one_line(error)}") from error
    _refuse_absurd(folder, config)
    _drop_quantization(config)
    return config


def _drop_quantization(config: Any) -> None:
    """Build the 16-bit model of a quantized original, whose weights are dequantized as they are read."""
    config.__dict__.pop("quantization_config", None)
    for name in getattr(config, "sub_configs", None) or ():
        if getattr(config, name, None) is not None:
            _drop_quantization(getattr(config, name))


def _refuse_absurd(folder: Path, config: Any) -> None:
    """Refuse sizes that would fill the memory with empty modules."""
    text = config.get_text_config(decoder=True)
    for key in ("num_hidden_layers", "num_experts", "num_local_experts"):
        count = getattr(text, key, None)
        if isinstance(count, int) and count > _MAX_MODULES:
            raise InputError(
                f"{folder}: config.json says {key} {shown(count)}; expected at most {_MAX_MODULES:,}; download it again"
            )


def _build(config: Any, dtype: torch.dtype, trust_remote_code: bool, encodes_sentences: bool) -> Any:
    """The class that the checkpoint names; a causal language model where it names none, or code of its own.

    A sentence encoder that names the masked language model it was made from has no head: it is the base model.
    """
    import transformers

    named = (getattr(config, "architectures", None) or [None])[0]
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if named is None or own_code:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    task = class_task(named)
    if encodes_sentences and task is not None and task.mapping == MASKED:
        return transformers.AutoModel.from_config(config, dtype=dtype)
    if task is None:
        tasks = ", ".join(task.name for task in TASKS)
        raise InputError(f"architecture {named} is not supported; expected a model of one of these kinds: {tasks}")
    return getattr(transformers, named)._from_config(config, dtype=dtype)


def _configure(model: nn.Module) -> None:
    """Have the model and all models inside of it return named outputs and keep no keys and values."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in configs:  # stacks may have copies of their own
        for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
            if part is not None:
                part.use_cache = False
                part.return_dict = True


def untie_stored(model: Any, tensors: Iterable[str]) -> None:
    """Give tied parameters that a checkpoint stores apart, such as a head beside the embedding, values of their own.

    That is what transformers does on loading, whatever config.json says.

    Args:
        model: Skeleton.
        tensors: Names in the checkpoint.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = stored_names(model, tensors) if tied else {}
    for name, other in tied.items():
        if name in names and other in names and names[name] != names[other]:
            owner, _, leaf = name.rpartition(".")
            apart = torch.empty_like(model.get_parameter(name), device="meta")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(apart, requires_grad=False))


def to_meta(module: nn.Module) -> None:
    """Drop the data of all parameters; sharing between modules is kept."""
    seen: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                owner._parameters[name] = seen.setdefault(id(parameter), empty)


def max_positions(model: Any) -> int | None:
    """Tokens that a row can have; None where the config names no limit."""
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin number positions from the one after their padding's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    return int(longest) if longest is not None and longest > 0 else None


def token_embedding(model: Any) -> tuple[int, int] | None:
    """Tokens and width of a model's input embedding; None where it reads images, or embeds tokens by hashes."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return None
    return (int(weight.shape[0]), int(weight.shape[1])) if weight is not None and weight.ndim == 2 else None
