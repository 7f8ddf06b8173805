"""The second cost of a run: what a format costs besides bytes, from a file of the user's or by a roofline."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawqtool.allocation.problem import REGEX_PREFIX
from hawqtool.allocation.roofline import RooflineCosts, names_hardware
from hawqtool.errors import InputError, UsageError
from hawqtool.formats import MAX_BITS, MIN_BITS, QuantFormat, parse_label
from hawqtool.parsing import MAX_JSON_BYTES, parse_json, read_bounded, short
from hawqtool.records import Menu, Unit, UnitFormats

if TYPE_CHECKING:
    from hawqtool.allocation.exact import SecondCost

_COLUMNS = ("unit", "format", "cost")
_NAMED = 3


class CostTable:
    """Costs by name and format, as a file states them.

    Plain names win over ``re:`` patterns (matched from the start of a name, the first in the file wins), and format
    labels over widths. A unit costs what the file says of it, or else what it says of its layers together. Entries
    that match nothing are allowed, so that one file serves several models' menus and ``--ignore``.

    Args:
        path: A ``.csv`` file with columns unit, format and cost, or JSON: a list of objects with these keys.

    Raises:
        InputError: If the file cannot be read or an entry is malformed; names the entry.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._plain: dict[tuple[str, str], float] = {}
        self._patterns: list[tuple[re.Pattern[str], str, float]] = []
        for place, entry in enumerate(_entries(path), 1):
            try:
                self._add(str(entry["unit"]), str(entry["format"]).strip(), float(entry["cost"]))
            except KeyError as error:
                raise InputError(f"{path}: entry {place} has no {error}, expected unit, format and cost") from None
            except (ValueError, TypeError, OverflowError, RecursionError, re.error) as error:
                raise InputError(f"{path}: entry {place} is malformed ({short(str(error))})") from None

    def _add(self, name: str, kind: str, cost: float) -> None:
        if kind.isdigit():
            if not MIN_BITS <= int(kind) <= MAX_BITS:
                raise ValueError(f"width {kind}, expected {MIN_BITS} to {MAX_BITS}")
        else:
            parse_label(kind)
        if not math.isfinite(cost) or cost < 0:
            raise ValueError(f"cost {cost}, expected a finite number that is not negative")
        if name.startswith(REGEX_PREFIX):
            self._patterns.append((re.compile(name.removeprefix(REGEX_PREFIX)), kind, cost))
        elif self._plain.setdefault((name, kind), cost) != cost:
            raise ValueError(f"{name} in format {kind} has two costs, {self._plain[name, kind]:g} and {cost:g}")

    def cost(self, unit: Unit, quant_format: QuantFormat) -> float | None:
        """Cost of a unit in a format; None if the file does not say."""
        whole = self._find(unit.name, quant_format)
        if whole is not None:
            return whole
        parts = [self._find(member.name, quant_format) for member in unit.members]
        return None if None in parts else math.fsum(part for part in parts if part is not None)

    def _find(self, name: str, quant_format: QuantFormat) -> float | None:
        kinds = (quant_format.label, str(quant_format.bits))
        for kind in kinds:
            if (name, kind) in self._plain:
                return self._plain[name, kind]
        found = (cost for kind in kinds for pattern, k, cost in self._patterns if k == kind and pattern.match(name))
        return next(found, None)

    def of_menu(self, units: Sequence[Unit], menu: Menu) -> dict[str, dict[Any, float]]:
        """Unit name to format to cost, for all formats of a menu.

        Raises:
            UsageError: If the file lacks some; names the first.
        """
        costs: dict[str, dict[Any, float]] = {unit.name: {} for unit in units}
        missing = []
        for unit in units:
            for quant_format in menu[unit.name]:
                cost = self.cost(unit, quant_format)
                if cost is None:
                    missing.append(f"{unit.name} in {quant_format.label}")
                else:
                    costs[unit.name][quant_format] = cost
        if missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise UsageError(
                f"{self._path} has no cost of {', '.join(missing[:_NAMED])}{more}; every unit needs one in every "
                "format that it may take: add them (a re: pattern covers many), or restrict --bits"
            )
        return costs


def second_cost(costs: str, max_cost: float, units: Sequence[Unit], menu: Menu, pins: UnitFormats) -> SecondCost:
    """The second budget of an allocation.

    Args:
        costs: File of costs (see `CostTable`), or hardware with the tokens of a step (see `RooflineCosts`).
        max_cost: Most that the formats of all units may cost together.
        units: Units to allocate for.
        menu: Formats that each may take.
        pins: Those that have one format.

    Raises:
        InputError: If the file of costs is damaged.
        UsageError: If it lacks costs, the hardware lacks a format, or even the cheapest formats exceed the budget.
    """
    table = RooflineCosts(costs) if names_hardware(costs) else CostTable(Path(costs))
    return _feasible(table.of_menu(units, _allowed(units, menu, pins)), max_cost, "--max-cost")


def active_bytes(max_bytes: int, units: Sequence[Unit], menu: Menu, pins: UnitFormats) -> SecondCost:
    """The second budget in bytes of quantized weights that one token reads: of routed experts their share.

    Args:
        max_bytes: Most of them.
        units: Units to allocate for, with their active shares.
        menu: Formats that each may take.
        pins: Those that have one format.

    Raises:
        UsageError: If even the smallest formats exceed the budget.
    """
    allowed = _allowed(units, menu, pins)
    by_unit = {u.name: {fmt: u.active_share * u.stored_bytes(fmt) for fmt in allowed[u.name]} for u in units}
    return _feasible(by_unit, max_bytes, "--max-active")


def _allowed(units: Sequence[Unit], menu: Menu, pins: UnitFormats) -> Menu:
    return {unit.name: (pins[unit.name],) if unit.name in pins else menu[unit.name] for unit in units}


def _feasible(by_unit: dict[str, dict[Any, float]], max_cost: float, flag: str) -> SecondCost:
    from hawqtool.allocation.exact import SecondCost

    least, most = (math.fsum(end(by_format.values()) for by_format in by_unit.values()) for end in (min, max))
    second = SecondCost(by_unit, max_cost)
    if not second.allows({unit: min(by_format, key=by_format.__getitem__) for unit, by_format in by_unit.items()}):
        raise UsageError(
            f"the second budget of {max_cost:g} cannot be met: costs from {least:g} to {most:g} are in reach; "
            f"raise {flag}, add cheaper widths to --bits, or pin fewer layers"
        )
    return second


def _entries(path: Path) -> list[dict[str, Any]]:
    if not os.path.isfile(path):
        raise InputError(f"{short(str(path))} was not found; check the path, or name hardware such as hopper:64")
    try:
        text = read_bounded(path, MAX_JSON_BYTES).decode("utf-8-sig")
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(text.splitlines(), strict=True)
            entries: Any = list(reader)
            if missing := set(_COLUMNS) - set(reader.fieldnames or ()):
                raise InputError(f"{path} has no column {min(missing)}, expected {', '.join(_COLUMNS)}")
        else:
            entries = parse_json(text)
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path} is neither CSV (then it must end in .csv) nor JSON: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path} holds no list of objects, expected entries with {', '.join(_COLUMNS)}")
    return entries
