"""Rules of single values: what a flag or a YAML file may say of each setting, and what is made of it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_serializer, field_validator

from hawqtool.formats import (
    BLOCK_LABELS,
    CHANNEL,
    GROUP_STEP,
    MAX_BITS,
    MIN_BITS,
    UNQUANTIZED,
    names_width,
    parse_label,
)
from hawqtool.formats.menus import menu_labels
from hawqtool.records import EXTRA_METRICS, SCORE_METRICS
from hawqtool.settings.fields import SELF, Fields
from hawqtool.values import format_label, parse_group_size, parse_share, parse_size, split_weight

_GroupSize = Annotated[int, Field(gt=0, multiple_of=GROUP_STEP)] | Literal["channel"]


class CheckedFields(Fields):
    """Every setting, its value parsed and checked by itself."""

    model_config = ConfigDict(defer_build=True)  # help pages need no validators

    @property
    def keeps_weight_names(self) -> bool:
        """Whether all formats of a run are named and store codes under the weights' own names."""
        labels = () if self.pin or self.plan else self.formats or ()
        return bool(labels) and all(not names_width(label) and parse_label(label).keeps_name for label in labels)

    @field_validator("bits", mode="before", json_schema_input_type=str | int | list[int] | None)
    @classmethod
    def _parse_bits(cls, value: Any) -> Any:
        if isinstance(value, (str, int)):
            value = [part.strip() for part in str(value).split(",")]
        if value is None:
            return None
        if (
            not isinstance(value, (list, tuple))
            or not value
            or not all(re.fullmatch(r"\d+", str(v)) and MIN_BITS <= int(v) <= MAX_BITS for v in value)
        ):
            raise ValueError(f"expected widths from {MIN_BITS} to {MAX_BITS}, such as 2,3,4,8")
        return tuple(sorted({int(v) for v in value}))

    @field_validator("block_types", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _parse_block_types(cls, value: Any) -> Any:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(str(part).upper() in BLOCK_LABELS for part in parts):
            raise ValueError(f"expected block types of {', '.join(BLOCK_LABELS)}")
        return tuple(dict.fromkeys(str(part).upper() for part in parts))

    @field_validator("embedding_type", mode="before", json_schema_input_type=str)
    @classmethod
    def _parse_embedding_type(cls, value: Any) -> Any:
        if value in ("auto", "keep") or str(value).upper() in BLOCK_LABELS:
            return value if value in ("auto", "keep") else str(value).upper()
        raise ValueError(f"expected auto, keep or one of {', '.join(BLOCK_LABELS)}")

    @field_validator("group_size", mode="before", json_schema_input_type=_GroupSize | None)
    @classmethod
    def _parse_group_size(cls, value: Any) -> int | None:
        return value if value is None else parse_group_size(value)

    @field_validator("formats", mode="before", json_schema_input_type=str | list[str] | None)
    @classmethod
    def _parse_formats(cls, value: Any) -> Any:
        if value is None:
            return None
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not parts:
            raise ValueError("expected labels such as w3g64,w4ch")
        return tuple(dict.fromkeys(format_label(label) for part in parts for label in menu_labels(str(part))))

    @field_validator("extra_group_sizes", mode="before", json_schema_input_type=str | int | list[int | str])
    @classmethod
    def _parse_extra_group_sizes(cls, value: Any) -> tuple[int, ...]:
        parts = [part.strip() for part in str(value).split(",")] if isinstance(value, (str, int)) else value
        return tuple(dict.fromkeys(parse_group_size(part) for part in parts or ()))

    @field_serializer("group_size", "extra_group_sizes", when_used="json")
    def _name_channel(self, value: int | tuple[int, ...] | None) -> Any:
        if isinstance(value, tuple):
            return [size or "channel" for size in value]
        return "channel" if value == CHANNEL else value

    @field_validator("extra_metrics", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _parse_extra_metrics(cls, value: Any) -> Any:
        names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not all(name in EXTRA_METRICS for name in names):
            raise ValueError(f"expected {', '.join(EXTRA_METRICS)}")
        return tuple(dict.fromkeys(names))

    @field_validator("target_shift", mode="before", json_schema_input_type=float | str | bool | None)
    @classmethod
    def _parse_shift(cls, value: Any) -> Any:
        return value if value is None else cls._parse_share_or_auto(value)

    @field_validator("foem_beta", mode="before", json_schema_input_type=float | str | bool)
    @classmethod
    def _parse_share_or_auto(cls, value: Any) -> Any:
        # YAML reads a bare off as false.
        if value is False or value == "off":
            return 0.0
        if value == "auto":
            return value
        try:
            share = float(value)
        except (TypeError, ValueError, OverflowError):
            share = math.nan
        if isinstance(value, bool) or not 0 <= share <= 1:
            raise ValueError("expected a number from 0 to 1, or auto")
        return share

    @field_validator("output_feedback", "rotate", mode="before", json_schema_input_type=str | bool | None)
    @classmethod
    def _parse_switch(cls, value: Any) -> Any:
        # YAML reads bare words on and off as true and false.
        return ("on" if value else "off") if isinstance(value, bool) else value

    @field_validator(
        "pin", "ignore", "calibration", "selection_data", mode="before", json_schema_input_type=str | list[str]
    )
    @classmethod
    def _parse_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("calibration")
    @classmethod
    def _check_calibration(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [split_weight(source)[0] for source in value]
        if not names or not all(names):
            raise ValueError("expected a source, such as self, text.txt or text.txt=2")
        if not all(0 < split_weight(source)[1] < float("inf") for source in value):
            raise ValueError("expected weights above 0 that are finite")
        if len(set(names)) < len(names):
            raise ValueError("a source is given twice; give it once, with a weight")
        return value

    @field_validator("selection_data")
    @classmethod
    def _check_selection_data(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value) or len(set(value)) < len(value):
            raise ValueError("expected sources such as self or text.txt, each once")
        return value

    @field_validator("eval_data")
    @classmethod
    def _check_eval_data(cls, value: str | None) -> str | None:
        if value == SELF:
            raise ValueError("expected text that the model did not write; leave it out for further calibration rows")
        return value

    @field_validator("sensitivity")
    @classmethod
    def _check_sensitivity(cls, value: str) -> str:
        if value not in ("auto", *SCORE_METRICS) and not os.path.isfile(value):
            raise ValueError(f"expected auto, {', '.join(SCORE_METRICS)} or an existing sensitivity.json")
        return value

    @field_validator("max_memory")
    @classmethod
    def _check_memory(cls, value: str) -> str:
        if value != "auto":
            parse_size(value)
        return value

    @field_validator(
        "max_ppl_increase",
        "min_same_top",
        "max_flips",
        "max_task_drop",
        "max_regression",
        "max_kept",
        mode="before",
        json_schema_input_type=float | str | None,
    )
    @classmethod
    def _parse_share(cls, value: Any) -> Any:
        return value if value is None else parse_share(value)

    @field_validator("target_size", "max_size", "max_active")
    @classmethod
    def _check_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value


_INTEGERS_ALONE = ("distill_steps", "gram_steps", "sensitivity_steps", "scale_refit", "swaps")
"""Settings that know of integer codes, one step apart, and of inputs as they are."""


def check_special_formats(config: CheckedFields, labels: Sequence[str]) -> None:
    """Check that nothing is asked for that is not known to work on grids of floats and on layers with rounded inputs.

    Args:
        config: The configuration.
        labels: Such formats of its menu.

    Raises:
        ValueError: If something is.
    """
    if not labels:
        return
    label = labels[0]
    if config.formats == (UNQUANTIZED,):
        raise ValueError("formats has 16 alone, in which nothing is quantized; add another, such as fp8-a8f")
    if config.profile == "portable":
        raise ValueError(f"profile portable is for integers of 4 and 8 bits, found {label} in formats; drop one")
    if config.embedding_bits == 8 and "w8ch-a8i" in labels:
        raise ValueError("embedding_bits 8 is stored as w8ch-a8i is, and loaders must tell them apart; drop one")
    rounds = next((text for text in labels if "-" in text), None)
    if rounds and config.proof == "layerwise":
        raise ValueError(f"proof layerwise compares layers by inputs as they are, found {rounds}; drop one of the two")
    if rounds and config.quantize_lm_head:
        raise ValueError(f"an output head keeps its inputs as they are, found quantize_lm_head and {rounds}; drop one")
    if rounds and ("kl" in config.extra_metrics or config.sensitivity == "kl"):
        raise ValueError(f"metric kl knows nothing of rounded inputs, found {rounds}; drop one of the two")
    if rounds and config.refine_steps:
        raise ValueError(f"refine_steps run blocks on inputs as they are, found {rounds}; drop one of the two")
    if config.refine_learner == "gumbel" and any(parse_label(text).floats for text in labels):
        raise ValueError(f"refine_learner gumbel chooses among integer codes, found {label}; use adam")
    for name in _INTEGERS_ALONE:
        if getattr(config, name):
            raise ValueError(
                f"{name} works on integer grids without rounded inputs, found {label}; drop one of the two"
            )
