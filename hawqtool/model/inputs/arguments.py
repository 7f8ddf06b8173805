"""Arguments of a model for rows of what it reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hawqtool.errors import InputError
from hawqtool.model.inputs.row_format import IMAGES, SOUNDS, RowFormat
from hawqtool.model.tasks import feeds_decoder, has_two_towers, model_images, model_task

_SOUND_POSITIONS = 500
"""What encoders of samples make of ten seconds."""

_FREE_IMAGE = 224, 224
"""Height and width of an example where a model takes images of any."""


def row_format(model: Any) -> RowFormat:
    """What a model reads of one row.

    Raises:
        InputError: If nothing says how many bands its spectra have.
    """
    main = str(model.main_input_name)
    images = model_images(model)
    if images is not None:
        return RowFormat("input_ids", IMAGES, *images)
    if has_two_towers(model):
        return RowFormat("input_ids", IMAGES, _image_sizes(model.config))
    if main == IMAGES:
        return RowFormat(None, IMAGES, _image_sizes(model.config))
    if main in SOUNDS:
        return RowFormat("decoder_input_ids" if feeds_decoder(model) else None, main, _sound_shape(model, main))
    return RowFormat(main)


def model_inputs(model: Any, rows: Tensor) -> dict[str, Tensor]:
    """Arguments of a model for rows of what it reads.

    A decoder beside an encoder of texts gets the same tokens ``[rows, seq_len]``, one place later. A classifier of such
    a pair is read where a row ends, so that its rows have one end token, at their end.

    Args:
        model: The model.
        rows: Tokens; images or sounds in the model's dtype; tokens joined with these (see `RowFormat`), of which the
            numbers come back in the rows' dtype.

    Raises:
        InputError: If nothing says what a decoder begins with.
    """
    form = row_format(model)
    if form.is_joint:
        return form.split(rows)
    decodes = form.values is None and feeds_decoder(model)
    if decodes and model_task(model).per_row:
        rows = _with_one_end(model.config, rows)
    inputs = {str(form.tokens or form.values): rows}
    if decodes:
        start = first_decoder_token(model.config)
        inputs["decoder_input_ids"] = rows.roll(1, 1).index_fill(1, rows.new_zeros(1), start)
    return inputs


def _with_one_end(config: Any, rows: Tensor) -> Tensor:
    """Rows of tokens that end in the end token and hold it nowhere else; unchanged where the config names none."""
    end, padding = config.eos_token_id, getattr(config, "pad_token_id", None)
    if not isinstance(end, int):
        return rows
    rows = rows.masked_fill(rows == end, padding if isinstance(padding, int) else first_decoder_token(config))
    return rows.index_fill(1, rows.new_tensor([rows.shape[1] - 1]), end)


def row_positions(model: Any, tokens: int) -> int:
    """Positions of a row that most of a forward pass computes, roughly; one where they are an image's.

    Args:
        model: The model.
        tokens: Tokens of a row, where it has any.
    """
    form = row_format(model)
    if form.values in SOUNDS:
        longest = getattr(model.config, "max_source_positions", None)
        return max(tokens if form.is_joint else 0, longest if isinstance(longest, int) else _SOUND_POSITIONS)
    return 1 if form.tokens is None else tokens


def image_shape(config: Any) -> tuple[int, tuple[int, int] | None]:
    """Channels, and height and width, of the images that a model takes; None for a size that is free."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    channels = int(getattr(vision, "num_channels", 3))
    return channels, size if size is None else (size, size) if isinstance(size, int) else tuple(size)


def _image_sizes(config: Any) -> tuple[int, ...]:
    channels, size = image_shape(config)
    return channels, *(size or _FREE_IMAGE)


def _sound_shape(model: Any, argument: str) -> tuple[int, ...]:
    """Shape of a row's sound, by what configurations call the sizes of spectra."""
    parts = [getattr(model.config, name, None) for name in ("encoder_config", "audio_config")]
    configs = [model.config, *(part for part in parts if part is not None)]

    def size(name: str) -> int | None:
        return next((int(getattr(c, name)) for c in configs if isinstance(getattr(c, name, None), int)), None)

    bands, frames = size("num_mel_bins"), size("max_source_positions")
    if argument == "input_values":
        longest = size("max_length") if bands else None
        return (-1,) if bands is None or longest is None else (longest, bands)
    if bands is not None and frames is not None:
        return bands, 2 * frames  # the encoder's second convolution halves them
    bands = bands or size("feature_projection_input_dim") or size("input_feat_per_channel")
    if bands is None:
        raise InputError(f"config.json of {model.config.model_type} does not say how many bands its spectra have")
    return -1, bands


def first_decoder_token(config: Any) -> int:
    """Token that a decoder beside an encoder begins with.

    Raises:
        InputError: If the config names none.
    """
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            token = getattr(part, name, None)
            if isinstance(token, int):
                return token
    raise InputError(
        f"config.json of {config.model_type} names no token for its decoder to begin with; "
        "expected decoder_start_token_id"
    )
