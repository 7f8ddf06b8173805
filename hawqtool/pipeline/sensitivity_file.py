"""What a sensitivity.json must hold before anything computes with it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, field_validator

from hawqtool.formats import parse_label
from hawqtool.parsing import shown

MAX_FEATURES = 1 << 40

Count = Annotated[StrictInt, Field(gt=0, le=MAX_FEATURES)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=1000)]


class Member(BaseModel):
    """One linear layer of a unit; the fields of `hawqtool.records.LinearSpec`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    out_features: Count
    in_features: Count
    block: StrictInt
    unit: Name
    scale_bytes: Annotated[StrictInt, Field(ge=1, le=8)]
    module: Name | None = None
    transposed: StrictBool = False


class SensitivityFile(BaseModel):
    """The document; a score is ``[value, standard error or null]``."""

    model_config = ConfigDict(frozen=True)

    units: dict[Name, Annotated[list[Member], Field(min_length=1)]]
    scores: dict[str, dict[str, dict[str, Annotated[list[float | None], Field(min_length=2, max_length=2)]]]]
    rounding: StrictStr
    model: StrictStr
    model_fingerprint: StrictStr
    rows: dict[str, str]
    settings: dict[str, int | float | str]
    # Files that do not say so were written before there were other grids.
    symmetric: StrictBool = True
    projections: dict[str, dict[str, list[float]]] = {}
    curvature: dict[str, dict[str, float | None]] = {}
    warnings: list[str] = []
    unquantized_bytes: Annotated[StrictInt, Field(ge=0)]

    @field_validator("scores")
    @classmethod
    def _check_scores(cls, scores: dict[str, dict[str, dict[str, list[float | None]]]]) -> Any:
        for metric, by_unit in scores.items():
            for unit, by_label in by_unit.items():
                for label, (value, _) in by_label.items():
                    parse_label(label)
                    if value is None or not abs(value) < float("inf"):
                        raise ValueError(f"{shown(metric)} of {shown(unit)} in {label} is {value}, expected a number")
        return scores


def first_problem(error: ValidationError) -> str:
    """Where the first thing that is wrong stands, and what it is."""
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    return f"{shown(place)}: {problem['msg'].removeprefix('Value error, ')}, found {shown(problem['input'])}"
