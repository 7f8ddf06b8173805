"""Rows of images and sounds, with tokens beside them where the model reads both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.data.images import IMAGE, image_processor, image_row
from hawqtool.data.media import MediaRecord, read_media
from hawqtool.data.sounds import SOUND, feature_extractor, sound_row
from hawqtool.data.tokenizer import encode, frame
from hawqtool.errors import InputError
from hawqtool.model.inputs.row_format import IMAGES, RowFormat

_ONE_IMAGE = 3
"""Dimensions of an image."""

Transcribe = Callable[[Tensor, list[int], int], Tensor]
"""Sounds, the tokens that a decoder begins with, and a number of positions to ``[rows, positions]`` tokens."""


@dataclass(frozen=True)
class RowTexts:
    """How the tokens beside an image or a sound are made.

    Args:
        tokenizer: The model's tokenizer.
        positions: Tokens of a row.
        start: Token that a decoder begins with; None where an encoder reads the text.
        transcribe: Gives tokens for sounds without a text; None where each needs one.
        image: Tokens that stand for the image, before the text.
    """

    tokenizer: Any
    positions: int
    start: int | None
    transcribe: Transcribe | None
    image: tuple[int, ...] = ()


@dataclass(frozen=True)
class MediaReader:
    """Reads the rows of a model that takes images or sounds.

    Args:
        form: What it reads of a row.
        folder: Its checkpoint, with the settings of what prepares its inputs.
        texts: How tokens are made, where it reads any.
    """

    form: RowFormat
    folder: Path
    texts: RowTexts | None

    def read(self, source: str, count: int, seed: int) -> tuple[str, Tensor, Tensor | None]:
        """Label of a source, its first values ``[rows, ...]`` and tokens ``[rows, positions]``, if there are any.

        Args:
            source: A folder, or a dataset.
            count: Rows that are needed; there may be fewer.
            seed: As in `read_media`.

        Raises:
            InputError: If a record cannot be used, or values have several shapes.
        """
        kind = IMAGE if self.form.values == IMAGES else SOUND
        found = read_media(kind, source, count, seed, self._value())
        if self.texts is None:
            return found.label, found.values, None
        tokens = [_tokens(self.texts, *record) for record in zip(found.places, found.texts, strict=True)]
        sampled = tokens.count(None)
        label = f"{found.label} ({sampled} transcripts sampled)" if sampled else found.label
        return label, found.values, _filled(self.texts, found.values, tokens)

    def _value(self) -> Callable[[MediaRecord], Tensor]:
        if self.form.values == IMAGES:
            processor = image_processor(self.folder)
            if len(self.form.shape or ()) == _ONE_IMAGE:
                return lambda record: image_row(processor, record)
            processor.do_image_splitting = False  # a list of one image, whole
            return lambda record: _listed(image_row(processor, record))
        extractor, positions = feature_extractor(self.folder), self.texts.positions if self.texts else 1
        return lambda record: sound_row(extractor, str(self.form.values), record, positions)


def _listed(image: Tensor) -> Tensor:
    """A list of one image ``[1, channels, height, width]``, as some processors give it already."""
    return image[None] if image.ndim == _ONE_IMAGE else image


def _tokens(texts: RowTexts, place: str, text: str | None) -> list[int] | None:
    """A record's tokens; None where they are to be sampled.

    Raises:
        InputError: If it has no text where one is needed, or an empty one.
    """
    if text is None:
        if texts.transcribe is None:
            raise InputError(
                f"{place} has no text beside it; expected one, in a file of the same name that ends in "
                ".txt or in a column of the dataset: this model reads both"
            )
        return None
    body = [t for t in encode(texts.tokenizer, text.strip(), special_tokens=False) if t not in texts.image]
    if not body:
        raise InputError(f"the text of {place} is empty; write one, or remove it")
    before, after = _frame(texts)
    room = texts.positions - len(before) - len(after)
    if room < 1:
        raise InputError(f"rows of {texts.positions} tokens leave no room beside special tokens; raise --seq-len")
    return [*before, *(body[index % len(body)] for index in range(room)), *after]


def _filled(texts: RowTexts, values: Tensor, tokens: list[list[int] | None]) -> Tensor:
    """All tokens, those that are missing sampled."""
    missing = [index for index, given in enumerate(tokens) if given is None]
    found: dict[int, Any] = {}
    if missing:
        assert texts.transcribe is not None
        sampled = texts.transcribe(values[missing], _frame(texts)[0], texts.positions)
        found = dict(zip(missing, sampled.tolist(), strict=True))
    return torch.tensor([found.get(index, given) for index, given in enumerate(tokens)], dtype=torch.int64)


def _frame(texts: RowTexts) -> tuple[list[int], list[int]]:
    """Special tokens before and after a text; a decoder's inputs begin with its start token and have no end."""
    before, after = frame(texts.tokenizer)
    if texts.image:
        return [*before, *texts.image], []
    if texts.start is None:
        return before, after
    return (before if before[:1] == [texts.start] else [texts.start, *before]), []
