"""The optimum at one budget, proven by integer programming (HiGHS), with an optional second budget.

The linear relaxation prices bytes (and the second cost). At these prices every unit has a cheapest choice, together
a lower bound of the loss; any other choice is dearer by its reduced price. A choice whose reduced price exceeds the
gap between a known plan and the bound is in no better plan, so only the few others go to HiGHS. Reduced prices
divided by that gap lie between 0 and 1 and bytes are counted in their common divisor, so that neither losses of 1e-9
nor sizes of 1e9 meet the solver's tolerances. Whether a plan fits is decided in whole bytes, not by HiGHS.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import coo_array, csr_array, vstack

from hawqtool.allocation.frontier import Frontier, efficient_choices, frontier
from hawqtool.allocation.frontier import solve as solve_hull
from hawqtool.allocation.problem import AllocationProblem, Choice
from hawqtool.errors import NumericalError, UsageError
from hawqtool.formats import QuantFormat
from hawqtool.records import BitPlan

TIME_LIMIT = 60.0
"""Seconds after which the search is given up."""

# HiGHS ends at an absolute gap of 1e-6; objectives of up to 1e4 put that at 1e-10 of the gap that is to be closed.
_OBJECTIVE_RANGE = 1e4
# Whole numbers up to here are told apart by its feasibility tolerance of 1e-6; larger ones are scaled down to it.
_COST_RANGE = 1e5
# Second costs are floats, such as seconds: a sum may miss its limit by so much of it.
_COST_TOLERANCE = 1e-9
# Part of the gap that is searched first where no close plan is known, and the factor by which that grows.
_FIRST_WINDOW, _WINDOW_GROWTH = 1e-6, 8
_TIME_LIMIT_REACHED, _INFEASIBLE = 1, 2


class TimeLimitError(NumericalError):
    """No plan was proven optimal in the time allowed."""


class _SolverFailure(NumericalError):
    """HiGHS ended without an answer."""


@dataclass(frozen=True)
class SecondCost:
    """A second budget, such as a latency or bytes read per token.

    Args:
        costs: Unit name to format to cost, for every choice of the problem.
        limit: Most that the costs of a plan may add up to.
    """

    costs: Mapping[str, Mapping[QuantFormat, float]]
    limit: float

    def total(self, formats: Mapping[str, QuantFormat]) -> float:
        """Cost of a plan."""
        return math.fsum(self.costs[unit][fmt] for unit, fmt in formats.items())

    def allows(self, formats: Mapping[str, QuantFormat]) -> bool:
        """Whether a plan stays within the limit, but for rounding of the sum."""
        return self.total(formats) <= self.limit + _COST_TOLERANCE * abs(self.limit)


def solve(
    problem: AllocationProblem,
    budget_bytes: int,
    metric: str | None = None,
    curve: Frontier | None = None,
    second: SecondCost | None = None,
    time_limit: float = TIME_LIMIT,
) -> BitPlan:
    """Plan of least predicted loss within a budget.

    Of equally good plans that of the frontier is taken if it is one of them. The result depends neither on the
    order of units nor, unless the limit is reached, on the speed of the machine.

    Args:
        problem: The problem.
        budget_bytes: Most stored bytes allowed.
        metric: Name of the scores, for the record.
        curve: ``frontier(problem)`` if it is at hand.
        second: A second budget.
        time_limit: Seconds for HiGHS.

    Raises:
        UsageError: If the cheapest choices exceed a budget, or no plan meets both.
        TimeLimitError: If the optimum was not proven in time.
        NumericalError: If HiGHS failed.
    """
    deadline = time.monotonic() + time_limit
    curve = curve or frontier(problem)
    known = solve_hull(problem, budget_bytes, metric, curve)
    if second is not None:
        known = _within_both(problem, known, second, deadline)
    search = _Search(problem, budget_bytes, second)
    prices = np.array([curve.price(budget_bytes)]) if second is None else search.prices()
    formats, bound = search.improve(known, prices, deadline, time_limit)
    stored, loss = search.totals(formats)
    return replace(
        known,
        formats={unit: formats[unit] for unit in problem.choices},
        stored_bytes=stored,
        predicted_loss=loss,
        solver="exact",
        lower_bound=min(bound, loss),
        cost=None if second is None else second.total(formats),
        max_cost=None if second is None else second.limit,
    )


def _within_both(problem: AllocationProblem, hull: BitPlan, second: SecondCost, deadline: float) -> BitPlan:
    """A plan that meets both budgets: the frontier's, or else the one of least second cost."""
    if second.allows(hull.formats):
        return hull
    choices = {
        unit: tuple(replace(c, loss=second.costs[unit][c.quant_format]) for c in options)
        for unit, options in problem.choices.items()
    }
    budget = hull.budget_bytes or 0
    least = solve(replace(problem, choices=choices), budget, time_limit=deadline - time.monotonic())
    if not second.allows(least.formats):
        raise UsageError(
            f"the second budget of {second.limit:g} cannot be met within {budget:,} bytes: the least cost of a "
            f"plan of that size is {second.total(least.formats):g}; raise one of the two budgets"
        )
    return replace(hull, formats=least.formats)


class _Search:
    """One problem as arrays over all choices of all units, the units in order of name.

    Args:
        problem: The problem.
        budget: Most stored bytes.
        second: A second budget.
    """

    def __init__(self, problem: AllocationProblem, budget: int, second: SecondCost | None) -> None:
        self.problem, self.budget, self.second = problem, budget, second
        # A choice that is beaten in bytes and loss may still be the best in the second cost.
        options = {
            unit: efficient_choices(choices) if second is None else choices
            for unit, choices in sorted(problem.choices.items())
        }
        self.names = list(options)
        self.choices: list[Choice] = [choice for choices in options.values() for choice in choices]
        self.unit = np.repeat(np.arange(len(options)), [len(choices) for choices in options.values()])
        self.first = np.searchsorted(self.unit, np.arange(len(options)))
        self.loss = np.array([c.loss for c in self.choices])
        costs = [np.array([c.cost_bytes for c in self.choices], float)]
        limits = [float(budget)]
        if second is not None:
            names = np.array(self.names, object)[self.unit]
            costs.append(
                np.array([second.costs[n][c.quant_format] for n, c in zip(names, self.choices, strict=True)], float)
            )
            limits.append(second.limit)
        self.costs, self.limits = np.stack(costs), np.array(limits)

    def totals(self, formats: Mapping[str, QuantFormat]) -> tuple[int, float]:
        """Stored bytes and loss of a plan."""
        chosen = [next(c for c in self.problem.choices[u] if c.quant_format == f) for u, f in formats.items()]
        return sum(c.cost_bytes for c in chosen), math.fsum(c.loss for c in chosen)

    def improve(
        self, known: BitPlan, prices: np.ndarray, deadline: float, time_limit: float
    ) -> tuple[dict[str, QuantFormat], float]:
        """The optimum and a lower bound of all plans.

        Args:
            known: A plan that fits.
            prices: ``[costs]``, loss per byte and per second cost. Any prices >= 0 give a valid bound.
            deadline: Monotonic time at which to give up.
            time_limit: Seconds that were allowed, for the message.
        """
        priced = self.loss + prices @ self.costs
        reduced = priced - np.minimum.reduceat(priced, self.first)[self.unit]
        # Of equal choices the first, which is the cheapest.
        base = np.array([start + int(np.argmin(part)) for start, part in self._by_unit(reduced)])
        spare = self.limits - np.array([math.fsum(row[base]) for row in self.costs])
        bound = math.fsum([*self.loss[base], *(-prices * spare)])
        best, best_loss = known.formats, self.totals(known.formats)[1]
        gap = best_loss - bound
        # What is left below this is rounding of the sums, not a better plan.
        if gap <= 1e-15 * math.fsum(np.abs(self.loss[base])):
            return best, bound
        # One budget has a close plan to begin with. With two it may be far off, and few choices prove faster.
        window = gap if self.second is None else gap * _FIRST_WINDOW
        while True:
            core = _Core(self, base, reduced, prices, spare, window)
            if not len(core.columns) and window < gap:
                # Only the base plan is left, which a wider window holds as well: nothing for HiGHS to decide yet.
                window = min(gap, window * _WINDOW_GROWTH)
                continue
            try:
                found = self._run(core, best_loss, deadline, time_limit)
            except _SolverFailure:
                # A very narrow window scales badly; a wider one holds all its plans.
                if window >= gap:
                    raise
                found = None
            if found is not None:
                best, best_loss = found
                gap = best_loss - bound
            if gap <= window:
                return best, bound
            window = min(gap, window * _WINDOW_GROWTH)

    def _run(
        self, core: _Core, best_loss: float, deadline: float, time_limit: float
    ) -> tuple[dict[str, QuantFormat], float] | None:
        """Formats and loss of the best plan of a core; None if none is better than the one known."""
        while True:
            left = deadline - time.monotonic()
            result = core.run(left) if left > 0 else None
            if result is None or result.status == _TIME_LIMIT_REACHED:
                raise TimeLimitError(
                    f"no plan for {len(self.names)} units was proven optimal within {time_limit:g} s, "
                    "an optimum was expected; " + _remedy(self.second)
                )
            if result.status == _INFEASIBLE:
                return None
            if result.x is None:
                raise _SolverFailure(
                    f"HiGHS ended with {result.message!r}, an optimum was expected; " + _remedy(self.second)
                )
            chosen = core.chosen(result.x)
            formats = {name: self.choices[i].quant_format for name, i in zip(self.names, chosen, strict=True)}
            stored, loss = self.totals(formats)
            if loss >= best_loss:
                return None
            if stored <= self.budget and (self.second is None or self.second.allows(formats)):
                return formats, loss
            # Over a budget by less than the solver's tolerance: not this one.
            core.exclude(chosen)

    def _by_unit(self, values: np.ndarray) -> list[tuple[int, np.ndarray]]:
        return list(zip(self.first.tolist(), np.split(values, self.first[1:]), strict=True))

    def prices(self) -> np.ndarray:
        """``[costs]``, loss per byte and per second cost in the linear relaxation."""
        count, units = len(self.choices), len(self.names)
        one_each = coo_array((np.ones(count), (self.unit, np.arange(count))), shape=(units, count)).tocsr()
        # Differences within a unit, so that what all its choices share does not blur them.
        loss = self.loss - self.loss[self.first][self.unit]
        costs = self.costs - self.costs[:, self.first][:, self.unit]
        limits = self.limits - self.costs[:, self.first].sum(axis=1)
        scale = np.maximum(np.abs(costs).max(axis=1), np.finfo(float).tiny)
        unit_loss = float(np.abs(loss).max()) or 1.0
        result = linprog(
            loss / unit_loss,
            A_ub=costs / scale[:, None],
            b_ub=limits / scale,
            A_eq=one_each,
            b_eq=np.ones(units),
            method="highs",
        )
        if result.x is None:
            raise NumericalError(f"HiGHS ended with {result.message!r}, prices were expected; " + _remedy(self.second))
        return np.maximum(-result.ineqlin.marginals, 0) * unit_loss / scale


class _Core:
    """What HiGHS solves: which units leave their base choice for another that the gap allows.

    Minimises reduced prices plus the price of budget left over, both as shares of the gap. Every plan whose loss
    exceeds the bound by no more than the gap is made of these choices.

    Args:
        search: The whole problem.
        base: ``[units]``, index of each unit's base choice.
        reduced: ``[choices]``, reduced prices; 0 for base choices.
        prices: ``[costs]``, loss per unit of cost.
        spare: ``[costs]``, what the base choices leave of the budgets; may be negative.
        gap: How far above the bound the plans that are sought may be.
    """

    def __init__(
        self,
        search: _Search,
        base: np.ndarray,
        reduced: np.ndarray,
        prices: np.ndarray,
        spare: np.ndarray,
        gap: float,
    ) -> None:
        inside = reduced <= gap * (1 + 1e-9)
        inside[base] = False
        self.base, self.columns = base, np.flatnonzero(inside)
        count, rows = len(self.columns), len(prices)
        self.owner = search.unit[self.columns]
        costs = search.costs[:, self.columns] - search.costs[:, base[self.owner]]
        scale = np.array([_row_scale(costs[0], whole=True), *(_row_scale(row, whole=False) for row in costs[1:])])
        left_price = prices * scale / gap
        self.objective = _OBJECTIVE_RANGE * np.concatenate([reduced[self.columns] / gap, left_price])
        with np.errstate(divide="ignore"):
            most_left = np.where(left_price > 0, 1 / left_price, np.inf) * (1 + 1e-9)
        self.bounds = Bounds(0, np.concatenate([np.ones(count), most_left]))
        self.integrality = np.concatenate([np.ones(count), np.zeros(rows)])
        units, place = np.unique(self.owner, return_inverse=True)
        one_each = coo_array((np.ones(count), (place, np.arange(count))), shape=(len(units), count + rows))
        spend = np.hstack([costs / scale[:, None], np.eye(rows)])
        self.matrix = vstack([one_each, csr_array(spend)]).tocsr()
        self.lower = np.concatenate([np.zeros(len(units)), spare / scale])
        self.upper = np.concatenate([np.ones(len(units)), spare / scale])

    def run(self, seconds: float) -> OptimizeResult:
        """One run of HiGHS."""
        constraints = LinearConstraint(self.matrix, self.lower, self.upper)
        options = {"time_limit": seconds, "mip_rel_gap": 0.0}
        return milp(
            self.objective, integrality=self.integrality, bounds=self.bounds, constraints=constraints, options=options
        )

    def chosen(self, solution: np.ndarray) -> np.ndarray:
        """``[units]``, index of each unit's choice."""
        taken = np.flatnonzero(solution[: len(self.columns)] > 0.5)
        chosen = self.base.copy()
        chosen[self.owner[taken]] = self.columns[taken]
        return chosen

    def exclude(self, chosen: np.ndarray) -> None:
        """Forbid one plan: another choice must take the place of at least one of its."""
        taken = chosen[self.owner] == self.columns
        moved = chosen[self.owner] != self.base[self.owner]
        # A moved unit loses its choice (-1), or a unit at its base takes one (+1).
        row = np.where(taken, -1.0, np.where(moved, 0.0, 1.0))
        row = np.concatenate([row, np.zeros(self.matrix.shape[1] - len(row))])
        self.matrix = vstack([self.matrix, csr_array(row[None])]).tocsr()
        self.lower = np.append(self.lower, 1 - taken.sum())
        self.upper = np.append(self.upper, np.inf)


def _remedy(second: SecondCost | None) -> str:
    return "use --solver hull" if second is None else "change the second budget a little, or offer fewer --bits"


def _row_scale(costs: np.ndarray, whole: bool) -> float:
    """Unit in which a row of costs is counted: the common divisor of whole numbers, more if these get too large."""
    largest = float(np.abs(costs).max(initial=0.0))
    if not largest:
        return 1.0
    if not whole:
        return largest
    divisor = reduce(math.gcd, {abs(int(cost)) for cost in costs})
    return max(float(divisor), largest / _COST_RANGE)
