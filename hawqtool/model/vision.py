"""Vision towers of language models as parts of a walk: rows of an image and a text go through both."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import install_all_output_capturing_hooks

from hawqtool.errors import UsageError, one_line
from hawqtool.model.block_list import TRACE_ERRORS, block_lists
from hawqtool.model.carried.nested import all_nonzero, leaves
from hawqtool.model.carried.trace import Trace
from hawqtool.model.inputs.arguments import image_shape
from hawqtool.model.kept import is_linear
from hawqtool.model.tasks import IMAGES_READ, model_task

_PLACEHOLDERS = ("image_token_id", "image_token_index")
_BEGINS, _ENDS = ("boi_token_id", "boi_token_index"), ("eoi_token_id", "eoi_token_index")
"""What configurations call the tokens that stand for an image, and those around them."""


def read_images(model: Any) -> None:
    """Have a multimodal language model be walked on rows of an image and a text, its vision tower included.

    Args:
        model: Skeleton; its buffers are real.

    Raises:
        UsageError: If it is no such model, or needs more of an image than its values.
    """
    kind, advice = type(model).__name__, "drop --quantize-vision"
    token = _named(model.config, _PLACEHOLDERS)
    if not (model_task(model).generates and hasattr(model, "get_image_features")) or token is None:
        raise UsageError(f"--quantize-vision: {kind} is no language model that reads images; {advice}")
    # Towers whose states before the last are read collect them by hooks, which stand-ins take over from blocks.
    install_all_output_capturing_hooks(model)
    channels, size = image_shape(model.config)
    if size is None:
        raise UsageError(f"--quantize-vision: {kind} takes images of any size, expected one of its own; {advice}")
    shapes, reasons = ((channels, *size), (1, channels, *size)), list[str]()
    for shape in shapes:  # of an image, or of a row's list of images
        try:
            count = _num_features(model, shape)
        except TRACE_ERRORS as error:
            reasons.append(one_line(error))
        else:
            around = [_named(model.config, names) for names in (_BEGINS, _ENDS)]
            begin, end = ([] if other is None else [other] for other in around)
            setattr(model, IMAGES_READ, (shape, (*begin, *[token] * count, *end)))
            return
    raise UsageError(f"--quantize-vision: {kind} does not read an image by its values alone ({reasons[-1]}); {advice}")


def _named(config: Any, names: tuple[str, ...]) -> int | None:
    return next((int(getattr(config, name)) for name in names if isinstance(getattr(config, name, None), int)), None)


class _Features(nn.Module):
    """What a model makes of images, in the place of its embeddings of tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        found = self.model.get_image_features(pixel_values=images)
        return getattr(found, "pooler_output", found)


@all_nonzero()
def _num_features(model: Any, shape: tuple[int, ...]) -> int:
    """Places of a row of tokens that an image takes; blocks run on the meta device, and what lies around on zeros."""
    probe = copy.deepcopy(model)
    names = [
        f"{name}.{number}"
        for name, found in block_lists(probe).items()
        if any(is_linear(module) for module in found.modules())
        for number in range(len(found))
    ]
    images, features = torch.ones(1, *shape, dtype=model.dtype), list[Tensor]()

    def outputs() -> Any:
        module = _Features(probe)
        weights = {n: torch.zeros((), dtype=p.dtype).expand(p.shape) for n, p in module.named_parameters()}
        found = torch.func.functional_call(module, weights, (images,))
        features.extend(leaves(found))
        return found

    Trace(probe, names, [probe.get_submodule(name) for name in names]).run(outputs)
    width = features[0].shape[-1]
    return sum(feature.numel() for feature in features) // width
