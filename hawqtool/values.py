"""Single values as people write them: sizes, shares, group sizes, weighted sources."""

from __future__ import annotations

import difflib
import re
from typing import Any

from hawqtool.formats import BLOCK_LABELS, CHANNEL, GROUP_STEP, MAX_BITS, MIN_BITS, parse_label
from hawqtool.formats.activations import ACTIVATIONS
from hawqtool.formats.grids import GRIDS
from hawqtool.formats.menus import MENUS
from hawqtool.parsing import shown

MAX_BYTES = 1 << 62
_SIZE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_group_size(value: Any) -> int:
    """A group size of a format from what a user writes.

    Raises:
        ValueError: If it is none of those that there are.
    """
    if str(value) == "channel":
        return CHANNEL
    if re.fullmatch(r"[1-9][0-9]{1,4}", str(value)) and int(value) % GROUP_STEP == 0:
        return int(value)
    raise ValueError(f"expected 32, 64, 128, channel, or another multiple of {GROUP_STEP}")


def format_label(text: str) -> str:
    """A label of a format, or a width such as ``w4``, from what a user writes.

    Raises:
        ValueError: If it is neither; names the nearest label, or the option for what it is.
    """
    if text.upper() in BLOCK_LABELS:
        raise ValueError(f"{text} is a block type of GGUF files; give it in --block-types, with --to gguf")
    try:
        if re.fullmatch(r"w\d", text):
            parse_label(f"{text}ch")
            return text
        size = parse_label(text).group_size
        if size % GROUP_STEP:
            raise ValueError(f"groups of {size} are no multiple of {GROUP_STEP}")
    except ValueError as error:
        known = [
            f"w{bits}{size}" for bits in range(MIN_BITS, MAX_BITS + 1) for size in ("g32", "g64", "g128", "ch", "")
        ]
        near = difflib.get_close_matches(text, [*known, *GRIDS, *ACTIVATIONS, *MENUS], n=1)
        raise ValueError(str(error) + (f", did you mean {near[0]!r}?" if near else "")) from None
    return text


def parse_size(text: str) -> int:
    """Bytes of a size such as ``3.2GiB``, ``900MB`` or ``123456``.

    Raises:
        ValueError: If it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _SIZE_UNITS:
        raise ValueError(f"{shown(text)} is no size; expected for example 3.2GiB, 900MB or a number of bytes")
    size = float(match[1]) * _SIZE_UNITS[match[2].lower()]
    if size > MAX_BYTES:
        raise ValueError(f"{shown(text)} is more than any disk holds; expected for example 3.2GiB")
    return int(size)


def parse_share(value: Any) -> float:
    """A share such as ``5%`` or ``0.05``.

    Raises:
        ValueError: If it is none, or a bare number above 1, which could be meant either way.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*(%?)\s*", str(value).lower())
    if not match or isinstance(value, bool) or (not match[2] and float(match[1]) > 1):
        raise ValueError("expected a percentage such as 5%, or a fraction from 0 to 1 such as 0.05")
    return float(match[1]) / (100 if match[2] else 1)


def split_weight(text: str) -> tuple[str, float]:
    """``SOURCE=WEIGHT`` as a pair; the weight is 1 where none is given."""
    match = re.fullmatch(r"(.*)=([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)
