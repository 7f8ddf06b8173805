"""What a model is for, hence how it is built, fed and judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
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
_SOUNDS = "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"
_TOWERS = ("text_model", "vision_model"), ("image_embeds", "text_embeds")
"""Attributes and outputs of a model of two encoders, of texts and of images."""
_TOGETHER = "multi_label_classification"
"""What configurations say of classifiers of which several labels may be right."""

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
    ModelTask(
        *("speech-to-text model", True, False, False),
        mapping="MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        auto_class="AutoModelForSpeechSeq2Seq",
    ),
    ModelTask("speech recognizer by CTC", True, False, False, "MODEL_FOR_CTC_MAPPING_NAMES"),
    ModelTask("sound classifier", True, True, False, _SOUNDS),
    ModelTask("masked language model", True, False, False, MASKED),
    ModelTask("sequence classifier", True, True, False, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ModelTask("image classifier", True, True, False, _IMAGES),
    ModelTask("embedding model", False, True, False, "MODEL_MAPPING_NAMES"),
    ModelTask("embedding model", False, True, False, "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
)


IMAGES_READ = "_images_read"
"""Attribute of a model that `model_images` gives."""


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
    if task is not None and model_images(model) is not None:
        task = replace(task, generates=False)
    if task is not None and task.generates and _encoder_class(model) == type(model).__name__:
        task = next(other for other in TASKS if other.mapping == MASKED)
    if task is not None:
        _refuse_scores(model, task)
        _refuse_other_inputs(model, task)
        _refuse_both_directions(model, task)
        return task
    if model.is_custom_code():
        return TASKS[0]
    raise InputError(f"{type(model).__name__} is no {', '.join(t.name for t in TASKS)}; this model is not supported")


def model_images(model: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape of the image of a row, and the tokens that stand for it, of a language model that is to read both.

    None where it reads texts alone; `hawqtool.model.vision.read_images` sets it.
    """
    found: tuple[tuple[int, ...], tuple[int, ...]] | None = getattr(model, IMAGES_READ, None)
    return found


def feeds_decoder(model: Any) -> bool:
    """Whether a model has a decoder beside its encoder; a classifier of sounds has Whisper's encoder alone."""
    task = class_task(type(model).__name__)
    encoder_alone = task is not None and task.mapping == _SOUNDS
    return bool(getattr(model.config, "is_encoder_decoder", False)) and not encoder_alone


def has_two_towers(model: Any) -> bool:
    """Whether a model gives embeddings of texts and of images, each by an encoder of its own."""
    return not model_task(model).logits and all(hasattr(model, name) for name in _TOWERS[0])


def judged_output(model: Any, result: Any) -> Tensor:
    """Of what a model gives, the tensor that it is judged by.

    Returns:
        Logits, the last hidden state ``[rows, positions, width]``, or ``[rows, 2, width]``: of an image and of a text.
    """
    if has_two_towers(model):
        return torch.stack([result[name] for name in _TOWERS[1]], 1)
    found: Tensor = result.logits if model_task(model).logits else result.last_hidden_state
    return found


def traced_output(model: Any, result: Any) -> Any:
    """What `judged_output` is computed from, without the norms that two towers divide by: of zeros they make NaN."""
    if has_two_towers(model):
        return result.vision_model_output, result.text_model_output
    return judged_output(model, result)


def row_outputs(model: Any, result: Any) -> Tensor:
    """Of what a model gives, the outputs that its rows are judged by.

    Returns:
        Logits ``[rows, positions, classes]``, with one position where a row has one output, or embeddings
        ``[rows, 1, width]``: the mean of the last hidden state over positions; two of them from two towers. Of rows
        of an image and a text, the positions of the text count. Labels that do not exclude each other are outputs of
        their own, ``[rows, labels, 2]``, as is the one of rerankers and reward models: a score s stands for the logits
        0 and s, since such models are trained on the probability σ(s).
    """
    found, task = judged_output(model, result), model_task(model)
    images = model_images(model)
    if images is not None:
        return found[:, len(images[1]) :]
    if not task.logits:
        return found if has_two_towers(model) else found.mean(1, keepdim=True)
    if task.per_row:
        return torch.stack([torch.zeros_like(found), found], -1) if _scores_apart(model) else found[:, None]
    return found


def row_labels(model: Any) -> int:
    """Outputs of a row of a model that gives no output for every position."""
    return int(model.config.num_labels) if model_task(model).logits and _scores_apart(model) else 1


def _scores_apart(model: Any) -> bool:
    """Whether the labels of a classifier do not exclude each other, or are one."""
    return model.config.num_labels == 1 or model.config.problem_type == _TOGETHER


def _refuse_scores(model: Any, task: ModelTask) -> None:
    """Classifiers are judged by KL, which quantities do not have."""
    if not (task.logits and task.per_row):
        return
    config = model.config
    if config.num_labels < 1 or config.problem_type == "regression":
        kind = config.problem_type or "scores"
        raise InputError(
            f"{type(model).__name__} (num_labels {config.num_labels}, {kind}) gives no probabilities, by which "
            "classifiers are judged; expected scores of classes or labels"
        )


def _refuse_other_inputs(model: Any, task: ModelTask) -> None:
    """Language models are calibrated and judged on texts, image classifiers on images, which some cannot read alone."""
    if task.mapping == _IMAGES and model.main_input_name != "pixel_values":
        raise InputError(
            f"{type(model).__name__} reads {model.main_input_name}; expected an image classifier that reads "
            "pixel_values alone: only on these is it calibrated and judged"
        )
    if not task.logits and hasattr(model, "text_model") and hasattr(model, "image_model"):
        raise InputError(
            f"{type(model).__name__} gives embeddings of texts, images and both, no last hidden state; expected one of "
            "its models, saved alone"
        )
    if task.generates and model.main_input_name != "input_ids":
        raise InputError(
            f"{type(model).__name__} needs {model.main_input_name} beside a text; expected a language model that "
            "reads texts alone: only on these is it calibrated and judged"
        )


def _refuse_both_directions(model: Any, task: ModelTask) -> None:
    """An encoder under a decoder's head would see the token that it predicts."""
    encoder = _encoder_class(model)
    if task.generates and encoder is not None:
        raise InputError(
            f"{type(model).__name__} without is_decoder sees later tokens, so it is no causal language model; expected "
            f"the class that was trained under architectures in config.json, such as {encoder}"
        )


def _encoder_class(model: Any) -> str | None:
    """Class of the masked language model of a configuration; None where that is a decoder's. XLM has one for both."""
    from transformers.models.auto import modeling_auto

    if getattr(model.config, "is_decoder", False):
        return None
    found: str | None = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model.config.model_type)
    return found
