"""What a model is for, hence how it is built, fed and judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hawqtool.errors import InputError


@dataclass(frozen=True)
class ModelTask:
    """A kind of model.

    Args:
        name: As people call it.
        logits: Whether the output is judged as logits (by KL) or as embeddings (by relative error).
        per_row: Whether a row has one output; otherwise it has one per token.
        generates: Whether rows can be sampled from the model, and perplexity means something.
        mapping: Name of transformers' table of the classes of this task.
        auto_class: Class of transformers that loads what rows are sampled from.
    """

    name: str
    logits: bool
    per_row: bool
    generates: bool
    mapping: str
    auto_class: str = "AutoModelForCausalLM"


MASKED = "MODEL_FOR_MASKED_LM_MAPPING_NAMES"
_IMAGES = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"

TASKS = (
    ModelTask("causal language model", True, False, True, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ModelTask(
        *("multimodal language model", True, False, True),
        mapping="MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
        auto_class="AutoModelForMultimodalLM",
    ),
    ModelTask(
        *("sequence-to-sequence model", True, False, False),
        mapping="MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        auto_class="AutoModelForSeq2SeqLM",
    ),
    ModelTask("masked language model", True, False, False, MASKED),
    ModelTask("sequence classifier", True, True, False, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ModelTask("image classifier", True, True, False, _IMAGES),
    ModelTask("embedding model", False, True, False, "MODEL_MAPPING_NAMES"),
    ModelTask("embedding model", False, True, False, "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
)


def class_task(class_name: str) -> ModelTask | None:
    """Task of a transformers model class, None for what is not supported."""
    from transformers.models.auto import modeling_auto

    for task in TASKS:
        for names in getattr(modeling_auto, task.mapping).values():
            if class_name in ((names,) if isinstance(names, str) else names):
                return task
    return None


def model_task(model: Any) -> ModelTask:
    """Task of a built model; code from a checkpoint counts as a causal language model.

    Raises:
        InputError: If its class has none of the supported tasks, or its outputs are not what the task is judged by.
    """
    task = class_task(type(model).__name__)
    if task is not None:
        _refuse_scores(model, task)
        _refuse_other_inputs(model, task)
        _refuse_both_directions(model, task)
        return task
    if model.is_custom_code():
        return TASKS[0]
    raise InputError(f"{type(model).__name__} is no {', '.join(t.name for t in TASKS)}; this model is not supported")


def image_shape(config: Any) -> tuple[int, tuple[int, int] | None]:
    """Channels, and height and width, of the images that a model takes; None for a size that is free."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    channels = int(getattr(vision, "num_channels", 3))
    return channels, size if size is None else (size, size) if isinstance(size, int) else tuple(size)


def model_inputs(model: Any, rows: Tensor) -> dict[str, Tensor]:
    """Arguments of a model for rows of what it reads.

    A decoder beside an encoder gets the same tokens ``[rows, seq_len]``, one place later. A classifier of such a pair
    is read where a row ends, so that its rows have one end token, at their end.

    Args:
        model: The model.
        rows: Tokens, or images in the model's dtype.

    Raises:
        InputError: If nothing says what a decoder begins with.
    """
    if feeds_decoder(model) and model_task(model).per_row:
        rows = _with_one_end(model.config, rows)
    inputs = {str(model.main_input_name): rows}
    if feeds_decoder(model):
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


def feeds_decoder(model: Any) -> bool:
    """Whether a model has a decoder beside its encoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


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


def judged_output(model: Any, result: Any) -> Tensor:
    """Of what a model gives, the tensor that it is judged by: logits, or the last hidden state."""
    found: Tensor = result.logits if model_task(model).logits else result.last_hidden_state
    return found


def _refuse_scores(model: Any, task: ModelTask) -> None:
    """Classifiers are judged by KL, which a single score, or labels that do not exclude each other, do not have."""
    if not (task.logits and task.per_row):
        return
    config = model.config
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        kind = config.problem_type or "scores"
        raise InputError(
            f"{type(model).__name__} with {config.num_labels} labels ({kind}) gives no distribution over classes, by "
            "which classifiers are judged; expected two or more classes of which one is right"
        )


def _refuse_other_inputs(model: Any, task: ModelTask) -> None:
    """Language models are calibrated and judged on texts, image classifiers on images, which some cannot read alone."""
    if task.mapping == _IMAGES and model.main_input_name != "pixel_values":
        raise InputError(
            f"{type(model).__name__} reads {model.main_input_name}; expected an image classifier that reads "
            "pixel_values alone: only on these is it calibrated and judged"
        )
    if not task.logits and hasattr(model, "text_model") and hasattr(model, "vision_model"):
        raise InputError(
            f"{type(model).__name__} reads an image beside each text; expected one of its two models, saved alone, "
            "which reads texts or images"
        )
    if task.generates and model.main_input_name != "input_ids":
        raise InputError(
            f"{type(model).__name__} needs {model.main_input_name} beside a text; expected a language model that "
            "reads texts alone: only on these is it calibrated and judged"
        )


def _refuse_both_directions(model: Any, task: ModelTask) -> None:
    """An encoder under a decoder's head would see the token that it predicts."""
    from transformers.models.auto import modeling_auto

    encoders = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if task.generates and model.config.model_type in encoders and not getattr(model.config, "is_decoder", False):
        raise InputError(
            f"{type(model).__name__} without is_decoder sees later tokens, so it is no causal language model; expected "
            f"the class that was trained under architectures in config.json, such as "
            f"{encoders[model.config.model_type]}"
        )
