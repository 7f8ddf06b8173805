"""The record beside a GGUF file: which tensor holds which matrix, and what the file has to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from hawqtool.checkpoint.gguf.header import read_gguf
from hawqtool.errors import InputError
from hawqtool.export.gguf.template import Piece
from hawqtool.pipeline.run.files import read_json
from hawqtool.report.documents import GgufDocument, GgufMatrix

SCHEMA = "hawqtool.gguf/1"
RECORD = ".json"
"""What the name of the record ends in, behind that of the file."""


@dataclass(frozen=True)
class Place:
    """Where the rows of a matrix of the checkpoint lie in the file.

    Args:
        tensor: Name of the tensor.
        first_row: First row there; others than 0 in experts.
        piece: The matrix and the order of its rows.
        transposed: Whether the checkpoint stores it as ``[in, out]``.
    """

    tensor: str
    first_row: int
    piece: Piece
    transposed: bool = False


def record_path(path: Path) -> Path:
    """Where the record of a file lies."""
    return path.with_name(path.name + RECORD)


def read_record(path: Path) -> GgufDocument:
    """The record beside a file.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    place = record_path(path)
    if not place.is_file():
        read_gguf(path)  # says what is wrong with a file that is none
        raise InputError(
            f"{path} has no record {place.name} beside it; expected a GGUF file that hawqtool wrote; put that back"
        )
    document = read_json(place, SCHEMA)
    missing = sorted(GgufDocument.__required_keys__ - document.keys())
    if missing:
        raise InputError(f"{place} has no {missing[0]}; expected the record of {path.name}; write both again")
    return cast(GgufDocument, document)


def matrix_records(places: Mapping[str, Place], errors: Mapping[str, float]) -> dict[str, GgufMatrix]:
    """JSON form of places, with the error of each matrix."""
    return {
        name: {
            "tensor": place.tensor,
            "first_row": place.first_row,
            "rows": None if place.piece.rows is None else place.piece.rows.tolist(),
            "transposed": place.transposed,
            "weight_error": errors[name],
        }
        for name, place in places.items()
    }


def recorded_places(path: Path, document: GgufDocument) -> dict[str, Place]:
    """Places by the name of the checkpoint's tensor.

    Raises:
        InputError: If the record is damaged.
    """
    found = {}
    for name, matrix in document["matrices"].items():
        try:
            rows = None if matrix["rows"] is None else torch.tensor(matrix["rows"], dtype=torch.int64)
            if rows is not None and not torch.equal(rows.sort().values, torch.arange(len(rows))):
                raise ValueError("rows are no permutation")
            place = Place(matrix["tensor"], int(matrix["first_row"]), Piece(name, rows), bool(matrix["transposed"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{record_path(path)}: {name} is damaged ({error}); write the file again") from None
        found[name] = place
    return found
