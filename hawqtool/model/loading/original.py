"""What transformers fails on whatever is packed: found before the work, without the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from hawqtool.errors import InputError, one_line
from hawqtool.model.block_list import cache_error
from hawqtool.model.tasks import model_task
from hawqtool.model.trace import trace_walk

_HALF = (torch.float16, torch.bfloat16)
FAILS = "it fails on the original itself"


def cache_obstacle(model: Any) -> str | None:
    """Why transformers cannot run a language model as it does by default, keeping keys and values; None where it can.

    Args:
        model: Skeleton; its buffers are real.
    """
    if not isinstance(model, PreTrainedModel) or not model_task(model).generates:
        return None
    error = cache_error(model)
    return None if error is None else f"{FAILS}, where it keeps keys and values, as it does by default ({error})"


def scale_obstacle(model: Any, linears: Iterable[str], dtype: torch.dtype) -> str | None:
    """Why transformers would read scales of packed linears in another dtype than they are stored in.

    A class names parameters that are kept in float32 by parts of their names. ``scale`` is such a part in HY V4, and
    hits the ``weight_scale`` of every packed linear, whose weight then is float32 beside activations of 16 bits.

    Args:
        model: Skeleton.
        linears: Names of the modules that are to be packed.
        dtype: dtype of their weights.
    """
    from transformers.core_model_loading import build_glob_alternation

    names: list[str] = sorted(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if not names or dtype not in _HALF:
        return None
    exact, *_ = build_glob_alternation(list(names))
    hit = next((name for name in linears if exact.search(f"{name}.weight_scale")), None)
    return None if hit is None else f"it reads the scales of {hit} in float32 beside inputs of 16 bits"


def precision_obstacle(model: Any, dtype: torch.dtype, skeleton: Callable[[], Any]) -> str | None:
    """Why transformers cannot run a model in 16 bits, because parts of it stay float32 whatever it is loaded in.

    Args:
        model: Skeleton in any dtype.
        dtype: What transformers loads the model in.
        skeleton: Builds the skeleton in that dtype.
    """
    if not isinstance(model, PreTrainedModel) or dtype not in _HALF:
        return None
    with torch.device("meta"):
        built: Any = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    if all(parameter.dtype == dtype for parameter in built.parameters()):
        return None
    try:
        trace_walk(skeleton())
    except InputError as error:
        name, cause = str(dtype).removeprefix("torch."), error.__cause__ or error
        return f"{FAILS} in {name}, of which it keeps parts in float32 ({one_line(cause)})"
    return None
