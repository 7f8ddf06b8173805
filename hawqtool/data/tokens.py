"""Fixed token rows from a text, cut into disjoint sets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hawqtool.errors import InputError
from hawqtool.records import Rows


def read_text(path: Path) -> str:
    """Text of a file.

    Raises:
        InputError: If it is missing or no UTF-8 text.
    """
    if not path.is_file():
        raise InputError(f"text {path} was not found; give a UTF-8 text file, or 'self' to sample rows from the model")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def text_rows(tokenizer: Any, path: Path, seq_len: int, seed: int) -> Tensor:
    """All whole rows of a text, ``[rows, seq_len]`` int64.

    With seed 0 in file order, so that other tools can be given the same rows; any other seed shuffles them.
    """
    tokens = tokenizer(read_text(path), return_tensors="pt", verbose=False).input_ids[0]
    count = len(tokens) // seq_len
    rows = tokens[: count * seq_len].view(count, seq_len)
    if seed and count:
        rows = rows[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    return rows


def split_rows(rows: Tensor, counts: Mapping[str, int], source: str) -> dict[str, Rows]:
    """Cut rows into named sets, none of which share a row.

    Raises:
        InputError: If there are too few rows, or a row occurs twice across sets; says how many there are.
    """
    needed = sum(counts.values())
    if len(rows) < needed:
        wanted = ", ".join(f"{n} {name}" for name, n in counts.items())
        raise InputError(
            f"{source} holds {len(rows)} rows of {rows.shape[1]} tokens, {needed} are needed ({wanted}); "
            "give more text, or lower --num-samples or --seq-len"
        )
    sets, first = {}, 0
    for name, count in counts.items():
        part = rows[first : first + count].contiguous()
        sets[name] = Rows(part, source, fingerprint(part))
        first += count
    return sets


def overlap(sets: Mapping[str, Rows]) -> int:
    """Number of rows that occur in more than one set."""
    seen: dict[bytes, str] = {}
    shared = 0
    for name, rows in sets.items():
        for row in rows.tokens:
            shared += seen.setdefault(row.numpy().tobytes(), name) != name
    return shared


def fingerprint(tokens: Tensor) -> str:
    """SHA-256 of shape and tokens."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
