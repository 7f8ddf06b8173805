"""Truly sequential rounding on a live transformers model in float64: the oracle for the streamed walk.

Written without the walk: for every weight, in the order in which the model uses them, the whole model runs from
its inputs, the rows that meet the weight are collected, the weight is rounded by the slow column loop of
`tests.support.oracles`, and its dequantized values are put in place before the next run. What it takes from
hawqtool are the scales (`search_scales`) and the arithmetic of dequantization.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from hawqtool.checkpoint.packing import unpack_codes
from hawqtool.formats import QuantFormat
from hawqtool.records import UnitFormats
from hawqtool.rounding.grid import dequantize, expand_scales, search_scales
from tests.support import oracles
from tests.support.tiny_zoo import Kind, value_shape

PRODUCTS = {"linear": (0, 1), "matmul": (0, 1), "__matmul__": (0, 1), "addmm": (1, 2)}
"""Operations that apply a weight, with the places of the input and of the weight among their arguments."""

_DISK_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": (
        (r"\.mlp\.", ".block_sparse_moe."),
        (r"\.gate_proj$", ".w1"),
        (r"\.up_proj$", ".w3"),
        (r"\.down_proj$", ".w2"),
    ),
    "nemotron-h": ((r"^model\.", "backbone."),),
    "deepseek-v4": (
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.compressor\.indexer\.(kv|gate)_proj$", r".indexer.compressor.\1_proj"),
        (r"\.compressor\.indexer\.(scorer\.)?", ".indexer."),
        (r"\.compressor\.gate_proj$", ".compressor.wgate"),
        (r"\.q_([ab])_proj$", r".wq_\1"),
        (r"\.o_([ab])_proj$", r".wo_\1"),
        (r"\.kv_proj$", ".wkv"),
        (r"\.gate_proj$", ".w1"),
        (r"\.up_proj$", ".w3"),
        (r"\.down_proj$", ".w2"),
    ),
    "ernie-vl": ((r"^model\.language_model\.", "model."),),
    "gemma3-images": ((r"^model\.language_model\.", "language_model.model."),),
    "swin": (
        (r"\.attention\.q_proj$", ".attention.self.query"),
        (r"\.attention\.k_proj$", ".attention.self.key"),
        (r"\.attention\.v_proj$", ".attention.self.value"),
        (r"\.attention\.o_proj$", ".attention.output.dense"),
        (r"\.mlp\.fc1$", ".intermediate.dense"),
        (r"\.mlp\.fc2$", ".output.dense"),
    ),
    "llava-vision": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.", "vision_tower."),
    ),
    "qwen2-vl": ((r"^model\.language_model\.", "model."),),
    "vit": (
        (r"\.layers\.", ".encoder.layer."),
        (r"\.attention\.o_proj$", ".attention.output.dense"),
        (r"\.q_proj$", ".attention.query"),
        (r"\.k_proj$", ".attention.key"),
        (r"\.v_proj$", ".attention.value"),
        (r"\.mlp\.fc1$", ".intermediate.dense"),
        (r"\.mlp\.fc2$", ".output.dense"),
    ),
}
"""Where module names and names in the checkpoint differ: patterns and replacements, applied in turn."""


@dataclass(frozen=True)
class Packed:
    """What the file holds of one weight: codes ``[out, in]``, scales ``[out, groups]``."""

    codes: Tensor
    scales: Tensor
    quant_format: QuantFormat


def read_packed(folder: Path) -> dict[str, Packed]:
    """Every packed weight of a folder by its name in the checkpoint; formats follow from the shapes alone."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    found = {}
    for key, words in tensors.items():
        if key.endswith(".weight_packed"):
            name = key.removesuffix(".weight_packed")
            scales = tensors[f"{name}.weight_scale"]
            columns = int(tensors[f"{name}.weight_shape"][1])
            bits = words.shape[1] * 32 // columns
            quant_format = QuantFormat(bits, columns // scales.shape[1])
            found[name] = Packed(unpack_codes(words, bits, columns), scales, quant_format)
    return found


def live_weights(kind: Kind, model: nn.Module) -> dict[str, Tensor]:
    """Every matrix of a live model that could be packed, by its name in the checkpoint.

    The ``[out, in]`` values are views: to write to one is to change the model.
    """
    views: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            views[name] = module.weight.data
        elif isinstance(module, Conv1D):
            views[name] = module.weight.data.t()
        elif isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            views |= _experts(name, module)
        elif isinstance(getattr(module, "up_proj", None), nn.Parameter):
            for role in ("up_proj", "down_proj"):
                views |= {f"{name}.{number}.{role}": view for number, view in enumerate(getattr(module, role).data)}
    return {_disk_name(kind, name): view for name, view in views.items()}


def _experts(name: str, module: Any) -> dict[str, Tensor]:
    views = {}
    for number, (both, down) in enumerate(zip(module.gate_up_proj.data, module.down_proj.data, strict=True)):
        if type(module).__name__.startswith("Llama4"):
            both, down = both.t(), down.t()
        gate, up = both.chunk(2)
        views |= {f"{name}.{number}.gate_proj": gate, f"{name}.{number}.up_proj": up}
        views[f"{name}.{number}.down_proj"] = down
    return views


def _disk_name(kind: Kind, name: str) -> str:
    for pattern, replacement in _DISK_NAMES.get(kind.name, ()):
        name = re.sub(pattern, replacement, name)
    return name


class _Products(TorchFunctionMode):
    """Shows every product of an input with a weight, ``see(input, weight)``, while the context lasts."""

    def __init__(self, see: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = PRODUCTS.get(getattr(func, "__name__", ""))
        if places:
            self._see(args[places[0]], args[places[1]])
        if getattr(func, "__name__", "") == "bmm" and isinstance(args[1], nn.Parameter):
            for states, weight in zip(*args, strict=True):  # experts; those that were not chosen get zeros
                self._see(states[states.any(1)], weight)
        return func(*args, **(kwargs or {}))


def _holds(weight: Tensor, view: Tensor) -> bool:
    """Whether the operand of a product contains a layer's values (an expert's operand holds two layers).

    An expanded operand has more numbers than its memory, hence the look at the storage.
    """
    if weight.untyped_storage().data_ptr() != view.untyped_storage().data_ptr():
        return False
    first, last = weight.data_ptr(), weight.data_ptr() + weight.numel() * weight.element_size()
    return first <= view.data_ptr() < last


def arguments_of(kind: Kind, model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """Arguments of a live model for rows of inputs; a decoder beside an encoder gets the same, one place later."""
    dtype = next(model.parameters()).dtype
    if kind.task in ("speech", "towers", "vision"):
        values = inputs[..., 1:].reshape(len(inputs), *value_shape(kind)).to(dtype)
        names = ("decoder_input_ids", "input_features") if kind.task == "speech" else ("input_ids", "pixel_values")
        return dict(zip(names, (inputs[..., 0].long(), values), strict=True))
    if kind.task in ("image", "ctc"):
        return {"pixel_values" if kind.task == "image" else "input_values": inputs.to(dtype)}
    arguments: dict[str, Any] = {"input_ids": inputs}
    if kind.task in ("causal", "multimodal", "seq2seq"):
        arguments["use_cache"] = False
    if kind.task == "seq2seq":
        config: Any = model.config
        start = torch.full((len(inputs), 1), config.decoder_start_token_id)
        arguments["decoder_input_ids"] = torch.cat((start, inputs[:, :-1]), 1)
    return arguments


def run(kind: Kind, model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits, the last hidden state of a model without a head, or the embeddings of two towers."""
    with torch.no_grad():
        output = model(**arguments_of(kind, model, inputs))
    if kind.task == "towers":
        return torch.stack([output.image_embeds, output.text_embeds], 1)
    return output.last_hidden_state if kind.task == "embedding" else output.logits


def use_order(kind: Kind, model: nn.Module, inputs: Tensor, views: dict[str, Tensor]) -> list[str]:
    """Names of the weights in the order in which the model first uses them."""
    order: dict[str, None] = {}

    def see(_: Tensor, weight: Tensor) -> None:
        order.update({name: None for name, view in views.items() if _holds(weight, view)})

    with _Products(see):
        run(kind, model, inputs)
    return list(order)


def input_rows(kind: Kind, model: nn.Module, inputs: Tensor, view: Tensor) -> Tensor:
    """All rows that meet a weight in one pass of the whole model, ``[tokens, in]``."""
    seen: list[Tensor] = []

    def see(x: Tensor, weight: Tensor) -> None:
        if _holds(weight, view):
            seen.append(x.flatten(0, -2))

    with _Products(see):
        run(kind, model, inputs)
    return torch.cat(seen)


SAME_ERROR = 1e-5
"""Relative difference of two scales' errors, in float32 sums, up to which either may be chosen."""


@dataclass(frozen=True)
class Problem:
    """One weight to round, columns in visiting order, as the references of `oracles` take it."""

    weight: oracles.Matrix
    grid: oracles.Grid
    hessian: oracles.Matrix
    scales: Tensor
    order: NDArray[np.int64]


def pose(weight: Tensor, rows: Tensor, quant_format: QuantFormat, dtype: torch.dtype, given: Tensor | None) -> Problem:
    """The problem that a weight ``[out, in]`` and its input rows ``[tokens, in]`` in float64 make.

    Its scales are those that `search_scales` finds, or the given ones where these are as good.
    """
    gram = (rows.T @ rows / len(rows)).numpy()
    # The rule of `default_damping`, spelled out.
    hessian = oracles.damped(gram, 0.05 if len(rows) >= 8 * rows.shape[1] else 0.2)
    importance = torch.from_numpy(np.diag(hessian).copy())
    scales = search_scales(weight.float().contiguous(), importance.float(), quant_format, dtype, both_signs=True)
    if given is not None:
        error, least = (scale_errors(weight, importance, item, quant_format) for item in (given, scales))
        scales = torch.where(error <= least * (1 + SAME_ERROR), given, scales)
    step = expand_scales(scales, weight.shape[1]).double().numpy()
    order = oracles.visiting_order(gram)
    zero = np.zeros_like(step)
    grid = oracles.Grid(step[:, order], zero, quant_format.min_code, quant_format.max_code)
    return Problem(weight.numpy()[:, order], grid, hessian[np.ix_(order, order)], scales, order)


def scale_errors(weight: Tensor, importance: Tensor, scales: Tensor, quant_format: QuantFormat) -> Tensor:
    """Weighted squared error of plain rounding in each group, ``[out, groups]`` float64."""
    step = expand_scales(scales, weight.shape[1]).double()
    codes = (weight / step).round().clamp(quant_format.min_code, quant_format.max_code)
    return (importance * (weight - codes * step) ** 2).unflatten(1, (scales.shape[1], -1)).sum(-1)


def replay(
    kind: Kind,
    folder: Path,
    inputs: Tensor,
    formats: UnitFormats,
    dtype: torch.dtype,
    scales: dict[str, Tensor] | None = None,
) -> dict[str, Packed]:
    """Round a saved model weight after weight.

    Args:
        kind: Its kind.
        folder: Where it lies.
        inputs: All calibration rows: token ids, or pixels.
        formats: Format of every weight to round, by its name in the checkpoint.
        dtype: Dtype in which weights are stored.
        scales: Scales to take where they are as good as those that are found here, by the weight's name.

    Returns:
        What a file should hold, by the weight's name in the checkpoint.
    """
    rounded: dict[str, Packed] = {}
    for name, view, rows in _sequence(kind, folder, inputs, formats):
        problem = pose(view, rows, formats[name], dtype, given=(scales or {}).get(name))
        ordered, _ = oracles.gptq(problem.weight, problem.grid, problem.hessian)
        natural = np.empty_like(ordered)
        natural[:, problem.order] = ordered
        codes = torch.from_numpy(natural).to(torch.int8)
        rounded[name] = Packed(codes, problem.scales, formats[name])
        view.copy_(dequantize(codes, problem.scales))
    return rounded


def excesses(kind: Kind, folder: Path, inputs: Tensor, packed: dict[str, Packed]) -> dict[str, float]:
    """How far from right the worst code of each weight is, given all codes before it as the file has them.

    In a free replay one code on a tie changes many after it; here every code is judged alone.

    Returns:
        By weight the largest distance, in steps, of a code from its target beyond one half: not above zero for right
        codes, up to rounding errors. Infinite where a scale is worse than the one that the search finds.
    """
    worst = {}
    for name, view, rows in _sequence(kind, folder, inputs, packed):
        layer = packed[name]
        problem = pose(view, rows, layer.quant_format, layer.scales.dtype, given=layer.scales)
        values = oracles.gptq_targets(
            problem.weight, problem.grid, problem.hessian, layer.codes.double().numpy()[:, problem.order]
        )
        reachable = np.clip(values, problem.grid.lowest, problem.grid.highest)
        distance = np.abs(reachable - layer.codes.numpy()[:, problem.order]).max() - 0.5
        worst[name] = float(distance) if torch.equal(problem.scales, layer.scales) else float("inf")
        view.copy_(dequantize(layer.codes, layer.scales))
    return worst


def _sequence(kind: Kind, folder: Path, inputs: Tensor, names: Collection[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, live ``[out, in]`` values and input rows of each weight; the caller replaces the values before the next."""
    model = load(kind, folder, torch.float64, attn_implementation="eager", experts_implementation="eager")
    views = _only(live_weights(kind, model), names)
    order = use_order(kind, model, inputs, views)
    assert set(order) == set(names), f"never used: {sorted(set(names) - set(order))}"
    for name in order:
        yield name, views[name], input_rows(kind, model, inputs, views[name])


def load(kind: Kind, folder: Path, dtype: torch.dtype | Literal["auto"], **settings: Any) -> nn.Module:
    """A saved model, loaded as a user would."""
    model: nn.Module = kind.auto_class.from_pretrained(folder, dtype=dtype, **settings).eval()
    return model


def put_in_place(kind: Kind, model: nn.Module, packed: dict[str, Packed]) -> None:
    """Replace the weights of a live model by what a file holds, multiplied in the dtype of the scales."""
    views = _only(live_weights(kind, model), packed)
    for name, layer in packed.items():
        views[name].copy_(dequantize(layer.codes, layer.scales))


def _only(views: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    missing = sorted(set(names) - set(views))
    assert not missing, f"packed, but no matrix of the model: {missing}"
    return {name: views[name] for name in names}


def silence_loaders() -> None:
    """No progress bars and no notes from transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@dataclass(frozen=True)
class DefaultPath:
    """What the default path rounds with beside the rows.

    Args:
        importance: ``[rows, positions]`` of every weight's tokens, by its name in the checkpoint.
        shift: Share of the target shift.
    """

    importance: dict[str, Tensor]
    shift: float


def replay_default(
    kind: Kind, folder: Path, inputs: Tensor, packed: dict[str, Packed], path: DefaultPath
) -> dict[str, float]:
    """Share of the codes of each weight that the default path gives: importance, shifted targets, two scale searches.

    Each weight is judged with those before it as the file has them, so that what one tie changes stays in one layer.
    """
    settings = {"attn_implementation": "eager", "experts_implementation": "eager"}
    original = load(kind, folder, torch.float64, **settings)
    originals, shares = live_weights(kind, original), {}
    for name, view, rows in _sequence(kind, folder, inputs, packed):
        layer, counts = packed[name], path.importance[name].flatten().double()
        before = input_rows(kind, original, inputs, originals[name])
        gram = (rows.T * counts) @ rows / len(rows)
        drift = ((before - rows).T * counts) @ rows / len(rows)
        hessian = oracles.damped(gram.numpy(), 0.05 if len(rows) >= 8 * rows.shape[1] else 0.2)
        target = view.numpy() + path.shift * oracles.full_shift(view.numpy(), drift.numpy(), hessian)
        order = oracles.visiting_order(gram.numpy())
        codes = _two_searches(target, hessian, order, layer.quant_format, layer.scales.dtype)
        shares[name] = float((torch.from_numpy(codes) == layer.codes).double().mean())
        view.copy_(dequantize(layer.codes, layer.scales))
    return shares


def _two_searches(
    target: oracles.Matrix, hessian: oracles.Matrix, order: NDArray[np.int64], fmt: QuantFormat, dtype: torch.dtype
) -> oracles.Matrix:
    """Codes ``[out, in]`` of the better of two passes in each row; the second's scales are for what the first met."""
    ordered = hessian[np.ix_(order, order)]
    costs = np.empty(len(order))
    costs[order] = np.diag(oracles.right_factor(ordered)) ** 2
    least = np.full(len(target), np.inf)
    best, searched = np.zeros_like(target), target
    for _ in range(2):
        values = torch.from_numpy(searched).float().contiguous()
        scales = search_scales(values, torch.from_numpy(costs).float(), fmt, dtype, both_signs=True)
        step = expand_scales(scales, target.shape[1]).double().numpy()
        grid = oracles.Grid(step[:, order], np.zeros_like(step), fmt.min_code, fmt.max_code)
        visited, met = oracles.gptq(target[:, order], grid, ordered)
        codes, searched = np.empty_like(target), np.empty_like(target)
        codes[:, order], searched[:, order] = visited, met * step[:, order]
        error = target - codes * step
        loss = np.einsum("ri,ij,rj->r", error, hessian, error)
        best = np.where((loss < least)[:, None], codes, best)
        least = np.minimum(loss, least)
    return best
