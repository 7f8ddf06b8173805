"""Gradients of the loss behind the scores: labels drawn from the model, or a random direction of an embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hawqtool.errors import NumericalError
from hawqtool.streaming.stream import ModelStream

_OUTPUTS = 512
"""Outputs whose labels are drawn together: their cumulative probabilities are as large as all logits."""

_POSITIONS = 256
"""Positions whose logits a CPU holds at a time; half as many took a sixth longer."""


def loss_gradients(
    stream: ModelStream,
    rows: Sequence[Tensor],
    hidden: Sequence[Tensor],
    generator: torch.Generator,
    together: int = _POSITIONS,
) -> tuple[list[Tensor], int]:
    """Gradient of each row's summed loss at the last block's output, and the outputs that a row has.

    Rows go one by one, because logits are large.

    Args:
        stream: The original model.
        rows: Batches of ``[rows, seq_len]`` tokens, or images.
        hidden: The last block's output per batch.
        generator: Draws the labels.
        together: Positions whose logits are computed together on a CPU.

    Raises:
        NumericalError: If the model's outputs are not finite.
    """
    gradients, count = [], 0
    at_outputs = _label_gradient if stream.task.logits else _embedding_gradient
    for part, states in zip(rows, hidden, strict=True):
        found = []
        for row, state in zip(part, states, strict=True):
            pieces, count = [], 0
            for positions in stream.output_parts(len(state), together):
                leaf = state[None, positions].detach().requires_grad_()
                outputs = stream.outputs(row[None, positions] if stream.task.generates else row[None], leaf)[0].float()
                if not bool(torch.stack(outputs.detach().aminmax()).isfinite().all()):
                    raise NumericalError("the original model gives outputs that are NaN or Inf; check its weights")
                count += len(outputs)
                pieces.append(torch.autograd.grad(outputs, leaf, at_outputs(outputs.detach(), generator))[0])
            found.append(torch.cat(pieces, 1))
        gradients.append(torch.cat(found))
    return gradients, count


def head_rows(
    stream: ModelStream, rows: Tensor, hidden: Sequence[Tensor], seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs of the head and gradients at the logits, row by row; labels are drawn anew."""
    generator = torch.Generator(stream.device).manual_seed(seed + 1)
    states = (state for part in hidden for state in part)
    for row, state in zip(rows, states, strict=True):
        with torch.no_grad():
            x = stream.head_inputs(row[None], state[None])
            logits = stream.outputs(row[None], state[None])[0].float()
        yield x, _label_gradient(logits, generator)


def draw_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A label per output ``[outputs]`` int64 from ``[outputs, classes]`` probabilities.

    One uniform number per output finds its label in the cumulative probabilities. `torch.multinomial` draws a random
    number for every class: half a second a row at 49,152 classes, more than the product with the head.
    """
    uniform = torch.rand(len(probabilities), 1, generator=generator, device=probabilities.device)
    parts = zip(probabilities.split(_OUTPUTS), uniform.split(_OUTPUTS), strict=True)
    return torch.cat([_labels_at(part, places) for part, places in parts])


def _labels_at(probabilities: Tensor, places: Tensor) -> Tensor:
    """Labels ``[outputs]`` at ``[outputs, 1]`` places from 0 to 1 of the cumulative probabilities."""
    # A GPU sums in no fixed order: in float64 that decides on a label once in some billion.
    cumulative = (probabilities.double() if probabilities.is_cuda else probabilities).cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total, which a product may be rounded to; a label of probability zero is never hit from the right.
    found = torch.minimum(places * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, found, right=True)[:, 0]


def _label_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient at ``[outputs, classes]`` of the summed negative log-likelihood of labels drawn from the model."""
    probabilities = logits.softmax(-1)
    labels = draw_labels(probabilities, generator)
    probabilities[torch.arange(len(labels), device=labels.device), labels] -= 1
    return probabilities


def _embedding_gradient(embedding: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient at ``[1, width]`` of a random projection, half whose mean squared change is ‖Δe‖² / ‖e‖²."""
    direction = torch.randn(embedding.shape, generator=generator, device=embedding.device)
    return 2**0.5 * direction / embedding.norm()
