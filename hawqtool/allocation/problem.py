"""The allocation problem: what each unit may become, what that costs, what it loses; pins and ignored layers."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hawqtool.errors import InputError, UsageError
from hawqtool.formats import MAX_BITS, MIN_BITS, QuantFormat
from hawqtool.parsing import shown
from hawqtool.records import Menu, Score, Unit, UnitFormats, UnitScores

REGEX_PREFIX = "re:"
_HEAD = "lm_head"
"""Name of the output head in the recipes of other tools, whatever a model calls it."""


@dataclass(frozen=True)
class Choice:
    """One format that a unit may take.

    Args:
        quant_format: The format.
        cost_bytes: Stored bytes of all members of the unit under it.
        loss: Predicted loss increase in nats per token.
    """

    quant_format: QuantFormat
    cost_bytes: int
    loss: float


@dataclass(frozen=True)
class AllocationProblem:
    """Pick one choice per unit.

    Args:
        choices: Unit name to its choices, cheapest first; never empty for a unit.
        num_weights: Weights of all units together, the denominator of bits per weight.
    """

    choices: dict[str, tuple[Choice, ...]]
    num_weights: int

    @property
    def minimum_bytes(self) -> int:
        """Stored bytes with the cheapest choice everywhere."""
        return sum(min(c.cost_bytes for c in options) for options in self.choices.values())

    @property
    def maximum_bytes(self) -> int:
        """Stored bytes with the costliest choice everywhere."""
        return sum(max(c.cost_bytes for c in options) for options in self.choices.values())

    @property
    def minimum_bpw(self) -> float:
        """Bits per weight with the cheapest choice everywhere."""
        return self.bpw(self.minimum_bytes)

    @property
    def maximum_bpw(self) -> float:
        """Bits per weight with the costliest choice everywhere."""
        return self.bpw(self.maximum_bytes)

    def bpw(self, stored_bytes: int) -> float:
        """Bits per weight of so many stored bytes."""
        return 8 * stored_bytes / self.num_weights

    def budget_bytes(self, bpw: float) -> int:
        """Most stored bytes that do not exceed ``bpw`` bits per weight."""
        # The tolerance keeps bpw(stored_bytes) -> budget_bytes exact in spite of the division.
        return math.floor(bpw * self.num_weights / 8 + 1e-6)


def require_feasible(problem: AllocationProblem, budget_bytes: int) -> None:
    """Check that the cheapest choices fit.

    Raises:
        UsageError: If they do not; states the achievable range.
    """
    low, high = problem.minimum_bytes, problem.maximum_bytes
    if budget_bytes < low:
        reach = reach_text(low, high, problem.num_weights)
        raise UsageError(
            f"the size target of {problem.bpw(budget_bytes):.3f} bits per weight ({budget_bytes:,} bytes) cannot be "
            f"met: the widths reach {reach}; raise the target, add smaller widths to --bits, use a larger "
            "--group-size, or pin fewer layers"
        )


def reach_text(low: int, high: int, num_weights: int, fixed: int = 0) -> str:
    """Stored bits per weight of a range of sizes, and its bytes with so many ``fixed`` ones."""
    ends = (low,) if low == high else (low, high)
    bits = " to ".join(f"{8 * end / num_weights:.3f}" for end in ends)
    sizes = " to ".join(f"{end + fixed:,}" for end in ends)
    return f"{bits} bits per weight ({sizes} bytes)"


def build_problem(
    units: Sequence[Unit],
    menu: Menu,
    scores: UnitScores,
    pins: UnitFormats,
) -> AllocationProblem:
    """Combine units, formats, scores and pins.

    Args:
        units: Units that are quantized.
        menu: Unit name to the formats that it may take.
        scores: Unit name to format label to score.
        pins: Unit name to the one format that it must take. It needs no score; without one its loss counts as 0.

    Raises:
        UsageError: If there is no unit, a unit has no format, a pin names no unit, or a needed score was not measured.
        InputError: If a needed score is NaN or infinite.
    """
    if not units:
        raise UsageError("no layer is left to quantize, at least one was expected; remove patterns from --ignore")
    unknown = sorted(set(pins) - {unit.name for unit in units})
    if unknown:
        raise UsageError(f"pinned unit {unknown[0]} is not among the {len(units)} quantized units; remove its pin")
    choices: dict[str, tuple[Choice, ...]] = {}
    for unit in units:
        pinned = pins.get(unit.name)
        formats = (pinned,) if pinned else menu.get(unit.name, ())
        if not formats:
            raise UsageError(f"unit {unit.name} has no format to choose from, one was expected; widen --bits")
        measured = scores.get(unit.name, {})
        options = [
            Choice(fmt, unit.stored_bytes(fmt), _loss(unit.name, fmt, measured, pinned is not None)) for fmt in formats
        ]
        choices[unit.name] = tuple(sorted(options, key=lambda c: (c.cost_bytes, c.loss, c.quant_format)))
    return AllocationProblem(choices, sum(unit.num_weights for unit in units))


def _loss(unit: str, quant_format: QuantFormat, measured: Mapping[str, Score], pinned: bool) -> float:
    score = measured.get(quant_format.label)
    if score is None:
        if pinned:
            return 0.0
        labels = ", ".join(sorted(measured)) or "none"
        raise UsageError(
            f"no score of unit {unit} in format {quant_format.label} (measured: {labels}); "
            "measure again with this width and group size, or ask only for measured ones"
        )
    if not math.isfinite(score.value):
        raise InputError(
            f"the score of unit {unit} in format {quant_format.label} is {score.value}, "
            "a finite number was expected; measure again"
        )
    return score.value


def resolve_pins(
    pin_options: Sequence[str], units: Sequence[Unit], group_sizes: Mapping[str, int], symmetric: bool = True
) -> UnitFormats:
    """Formats that ``--pin`` fixes; a pin on one fused member pins its whole unit.

    Args:
        pin_options: ``NAME=WIDTH`` or ``re:PATTERN=WIDTH``; a pattern is matched from the start of a name
            (`re.match`), a plain name exactly. Names are those of modules and of units.
        units: Units that are quantized.
        group_sizes: Unit name to the group size of its format.
        symmetric: Whether grids have no zero points.

    Returns:
        Unit name to format.

    Raises:
        UsageError: If an option is malformed, matches nothing, or contradicts another one.
    """
    pins: dict[str, QuantFormat] = {}
    origin: dict[str, str] = {}
    for option in pin_options:
        pattern, bits = _parse_pin(option)
        for unit in _matching_units(pattern, units, "--pin"):
            chosen = QuantFormat(bits, group_sizes[unit.name], symmetric)
            if pins.setdefault(unit.name, chosen) != chosen:
                raise UsageError(
                    f"--pin {origin[unit.name]} and --pin {option} fix unit {unit.name} to different widths, "
                    "one was expected; narrow one of them"
                )
            origin.setdefault(unit.name, option)
    return pins


def resolve_ignored(patterns: Sequence[str], units: Sequence[Unit], others: Sequence[str] = ()) -> frozenset[str]:
    """Names of the units that ``--ignore`` leaves unquantized; an ignored member ignores its whole unit.

    Args:
        patterns: Names or ``re:`` patterns, as for `resolve_pins`.
        units: All units of the model.
        others: Linears that are never quantized; naming one, as recipes of other tools do, changes nothing.

    Raises:
        UsageError: If a pattern is malformed or matches nothing.
    """
    ignored: set[str] = set()
    for pattern in patterns:
        matches = _matcher(pattern, "--ignore")
        found = any(matches(name) for name in (_HEAD, *others))
        ignored |= {unit.name for unit in _matching_units(pattern, units, "--ignore", required=not found)}
    return frozenset(ignored)


def matching_layers(pattern: str, units: Sequence[Unit], flag: str) -> frozenset[str]:
    """The layers that a name or a ``re:`` pattern means.

    Raises:
        UsageError: If the pattern is malformed or matches nothing.
    """
    matches = _matcher(pattern, flag)
    found = frozenset(member.name for unit in units for member in unit.members if matches(member.name))
    if not found:
        raise UsageError(f"{flag} {pattern} matches no layer that is quantized; {_suggestion(pattern, units)}")
    return found


def ignored_along(patterns: Sequence[str], units: Sequence[Unit]) -> list[str]:
    """Units that ``--ignore`` names in part, one line each: their other members stay unquantized too."""
    matchers = [_matcher(pattern, "--ignore") for pattern in patterns]
    lines = []
    for unit in units:
        if any(matches(unit.name) for matches in matchers):
            continue
        named = [m.name for m in unit.members if any(matches(m.name) for matches in matchers)]
        rest = len(unit.members) - len(named)
        if named and rest:
            lines.append(
                f"--ignore names {len(named)} of the {len(unit.members)} layers of {unit.name} (first {named[0]}); "
                f"engines run them as one, so the other {rest} stay unquantized too"
            )
    return lines


def _parse_pin(option: str) -> tuple[str, int]:
    # From the right: a regular expression may hold "=" itself.
    pattern, equals, width = option.rpartition("=")
    if not equals or not pattern or not re.fullmatch(r"[0-9]{1,9}", width.strip()):
        raise UsageError(f"--pin {shown(option)} is not NAME=WIDTH; write for example --pin 're:.*down_proj=8'")
    bits = int(width)
    if bits == 16:
        raise UsageError(
            f"--pin {option} asks for 16 bits, widths are {MIN_BITS} to {MAX_BITS}; use --ignore {pattern}"
        )
    if not MIN_BITS <= bits <= MAX_BITS:
        raise UsageError(
            f"--pin {option} asks for {bits} bits, widths are {MIN_BITS} to {MAX_BITS}; choose one of these"
        )
    return pattern.strip(), bits


def _matching_units(pattern: str, units: Sequence[Unit], flag: str, required: bool = True) -> list[Unit]:
    matches = _matcher(pattern, flag)
    found = [unit for unit in units if any(matches(name) for name in _names(unit))]
    if not found and required:
        raise UsageError(
            f"{flag} {pattern} matches none of the {len(units)} units or their layers; {_suggestion(pattern, units)}"
        )
    return found


def _matcher(pattern: str, flag: str) -> Callable[[str], bool]:
    if not pattern.startswith(REGEX_PREFIX):
        return lambda name: name == pattern
    try:
        expression = re.compile(pattern.removeprefix(REGEX_PREFIX))
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{flag} {pattern} is not a valid regular expression ({error}); correct it") from None
    return lambda name: expression.match(name) is not None


def _names(unit: Unit) -> list[str]:
    return [unit.name, *(member.name for member in unit.members)]


def _suggestion(pattern: str, units: Sequence[Unit]) -> str:
    names = list(dict.fromkeys(name for unit in units for name in _names(unit)))
    if not names:
        return "every layer is already ignored, remove it"
    # What is left of a pattern without its metacharacters is close to the name that was meant.
    plain = re.sub(r"\\[a-zA-Z]|[\\^$*+?{}\[\]|()]", "", pattern.removeprefix(REGEX_PREFIX)).strip(".")
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.4) or names[:3]
    return f"nearest names: {', '.join(near)}; a pattern is given as re:.*{near[0].rpartition('.')[2]}"


def stored_bytes(units: Sequence[Unit], formats: UnitFormats) -> int:
    """Stored bytes of formats by unit."""
    return sum(unit.stored_bytes(formats[unit.name]) for unit in units)


def predicted_loss(formats: UnitFormats, scores: UnitScores, pins: UnitFormats) -> float | None:
    """Sum of the scores of formats by unit, None if one of them was not measured; pins need no score, as in plans."""
    found = []
    for unit, fmt in formats.items():
        score = scores[unit].get(fmt.label) if unit in scores else None
        if score is None and pins.get(unit) != fmt:
            return None
        found.append(0.0 if score is None else score.value)
    return math.fsum(found)


def achievable(units: Sequence[Unit], menu: Menu, pins: UnitFormats) -> tuple[int, int]:
    """Least and most stored bytes that the menu and the pins allow."""
    lowest = highest = 0
    for unit in units:
        sizes = [unit.stored_bytes(f) for f in ((pins[unit.name],) if unit.name in pins else menu[unit.name])]
        lowest, highest = lowest + min(sizes), highest + max(sizes)
    return lowest, highest
