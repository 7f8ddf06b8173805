"""The optimum at one budget, proven to a small gap by integer programming (HiGHS), with an optional second budget.

The linear relaxation prices bytes (and the second cost). At these prices every unit has a cheapest choice, together
a lower bound of the loss; any other choice is dearer by its reduced price. A choice whose reduced price exceeds the
gap between a known plan and the bound is in no better plan, so only the few others go to HiGHS. Reduced prices
divided by that gap lie between 0 and 1 and bytes are counted in their common divisor, so that neither losses of 1e-9
nor sizes of 1e9 meet the solver's tolerances. Whether a plan fits is decided in whole bytes, not by HiGHS. The linear
bound alone often proves the frontier's plan, as its gap is that of one unit among all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from hawqtool.allocation.frontier import Frontier, efficient_choices, frontier
from hawqtool.allocation.frontier import solve as solve_hull
from hawqtool.allocation.milp import Milp, proven_share
from hawqtool.allocation.problem import AllocationProblem, Choice
from hawqtool.errors import NumericalError, UsageError
from hawqtool.formats import QuantFormat
from hawqtool.records import BitPlan, UnitFormats
from hawqtool.runtime.stdout import stdout_discarded

TIME_LIMIT = 60.0
"""Seconds after which the search ends with the best plan so far."""

GAP = 1e-4
"""Loss above the proven lower bound, relative to the loss, at which the search ends."""

# Second costs are floats, such as seconds: a sum may miss its limit by so much of it.
_COST_TOLERANCE = 1e-9
# Of the second cost's price, to find a plan that meets its limit when whole units are taken.
_PRICE_FACTORS = (1.0, 1.001, 1.003, 1.01, 1.03, 1.1, 1.3, 2.0)
# Part of the gap that is searched first where no close plan is known, and the factor by which that grows.
_FIRST_WINDOW, _WINDOW_GROWTH = 1e-6, 8
_OUT_OF_TIME, _FAILED = "out of time", "HiGHS failed"
_OPTIMAL, _TIME_LIMIT_REACHED, _INFEASIBLE = 0, 1, 2


class TimeLimitError(NumericalError):
    """No plan that meets both budgets was found in the time allowed."""


@dataclass(frozen=True)
class SecondCost:
    """A second budget, such as a latency or bytes read per token.

    Args:
        costs: Unit name to format to cost, for every choice of the problem.
        limit: Most that the costs of a plan may add up to.
    """

    costs: Mapping[str, Mapping[QuantFormat, float]]
    limit: float

    def total(self, formats: UnitFormats) -> float:
        """Cost of a plan."""
        return math.fsum(self.costs[unit][fmt] for unit, fmt in formats.items())

    def allows(self, formats: UnitFormats) -> bool:
        """Whether a plan stays within the limit, but for rounding of the sum."""
        return self.total(formats) <= self.limit + _COST_TOLERANCE * abs(self.limit)


def solve(
    problem: AllocationProblem,
    budget_bytes: int,
    metric: str | None = None,
    curve: Frontier | None = None,
    second: SecondCost | None = None,
    time_limit: float = TIME_LIMIT,
    gap: float = GAP,
) -> BitPlan:
    """Plan of least predicted loss within a budget, to a relative gap that the plan records.

    Where plans are equally good that of the frontier is taken if it is one of them. The result depends neither on
    the order of units nor, unless the time limit is reached, on the speed of the machine. At the limit, or if HiGHS
    fails, the best plan so far is returned; ``solver`` then says so.

    Args:
        problem: The problem.
        budget_bytes: Most stored bytes allowed.
        metric: Name of the scores, for the record.
        curve: ``frontier(problem)`` if it is at hand.
        second: A second budget.
        time_limit: Seconds for HiGHS.
        gap: Relative gap between loss and lower bound at which the search may end.

    Raises:
        UsageError: If the cheapest choices exceed a budget, or no plan meets both.
        TimeLimitError: If no plan that meets both budgets was found in time.
    """
    start = time.monotonic()
    curve = curve or frontier(problem)
    known = solve_hull(problem, budget_bytes, metric, curve)
    search = _Search(problem, budget_bytes, second)
    prices = search.prices(curve.price(budget_bytes))
    if second is not None and not second.allows(known.formats):
        close = _close_to_both(problem, known, second, prices[1])
        known = close or _least_second_cost(problem, known, second, start + time_limit)
    found = search.improve(known, prices, start + time_limit, gap)
    stored, loss = search.totals(found.formats)
    return replace(
        known,
        formats={unit: found.formats[unit] for unit in problem.choices},
        stored_bytes=stored,
        predicted_loss=loss,
        solver=f"exact ({found.stopped})" if found.stopped else "exact",
        lower_bound=min(found.bound, loss),
        seconds=time.monotonic() - start,
        cost=None if second is None else second.total(found.formats),
        max_cost=None if second is None else second.limit,
    )


def _with_losses(problem: AllocationProblem, second: SecondCost, share: float, price: float) -> AllocationProblem:
    """The problem with a share of the losses, and the second cost at a price added to them."""
    choices = {
        unit: tuple(replace(c, loss=share * c.loss + price * second.costs[unit][c.quant_format]) for c in options)
        for unit, options in problem.choices.items()
    }
    return replace(problem, choices=choices)


def _close_to_both(problem: AllocationProblem, hull: BitPlan, second: SecondCost, price: float) -> BitPlan | None:
    """The frontier's plan where the second cost has its price, or a little more, if that is enough."""
    for factor in _PRICE_FACTORS:
        priced = _with_losses(problem, second, 1.0, factor * price)
        formats = solve_hull(priced, hull.budget_bytes or 0).formats
        if second.allows(formats):
            return replace(hull, formats=formats)
    return None


def _least_second_cost(problem: AllocationProblem, hull: BitPlan, second: SecondCost, deadline: float) -> BitPlan:
    """A plan within both budgets, sought among those of least second cost."""
    cheapest = _with_losses(problem, second, 0.0, 1.0)
    budget = hull.budget_bytes or 0
    for gap in (GAP, 0.0):
        least = solve(cheapest, budget, time_limit=max(deadline - time.monotonic(), 0.0), gap=gap)
        if second.allows(least.formats):
            return replace(hull, formats=least.formats)
        if least.lower_bound is not None and least.lower_bound > second.limit:
            break
    else:
        if least.solver != "exact":
            raise TimeLimitError(
                f"no plan for {len(problem.choices)} units that meets both budgets was found in time, nor "
                f"proven not to exist (least second cost found: {least.predicted_loss:g}); "
                "raise one of the two budgets a little"
            )
    most = math.fsum(max(c.loss for c in options) for options in cheapest.choices.values())
    raise UsageError(
        f"the second budget of {second.limit:g} cannot be met within {budget:,} bytes: costs from "
        f"{second.total(least.formats):g} (the least of a plan of that size) to {most:g} are in reach; raise one of "
        "the two budgets"
    )


@dataclass(frozen=True)
class _Found:
    """End of a search.

    Args:
        formats: The best plan.
        bound: Loss below which no plan can fall.
        stopped: Why the gap was not closed; None if it was.
    """

    formats: UnitFormats
    bound: float
    stopped: str | None = None


@dataclass(frozen=True)
class _Outcome:
    """What HiGHS says of a milp.

    Args:
        plan: Formats and loss of a plan better than the one known.
        floor: Share of the window above the linear bound below which no plan of the milp can fall.
        stopped: Why HiGHS ended early.
    """

    plan: tuple[UnitFormats, float] | None
    floor: float
    stopped: str | None = None


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

    def totals(self, formats: UnitFormats) -> tuple[int, float]:
        """Stored bytes and loss of a plan."""
        chosen = [next(c for c in self.problem.choices[u] if c.quant_format == f) for u, f in formats.items()]
        return sum(c.cost_bytes for c in chosen), math.fsum(c.loss for c in chosen)

    def improve(self, known: BitPlan, prices: np.ndarray, deadline: float, allowed: float) -> _Found:
        """The best plan, to a gap.

        Args:
            known: A plan that fits.
            prices: ``[costs]``, loss per byte and per second cost. Any prices >= 0 give a valid bound.
            deadline: Monotonic time at which to end.
            allowed: Relative gap at which to end.
        """
        priced = self.loss + prices @ self.costs
        reduced = priced - np.minimum.reduceat(priced, self.first)[self.unit]
        # Of equal choices the first, which is the cheapest.
        base = np.array([start + int(np.argmin(part)) for start, part in self._by_unit(reduced)])
        spare = self.limits - np.array([math.fsum(row[base]) for row in self.costs])
        linear = bound = math.fsum([*self.loss[base], *(-prices * spare)])
        best, best_loss = known.formats, self.totals(known.formats)[1]
        # What is left below this is rounding of the sums, not a better plan.
        rounding = 1e-15 * math.fsum(np.abs(self.loss[base]))
        # One budget has a close plan to begin with. With two it may be far off, and few choices prove faster.
        window = best_loss - linear
        if self.second is not None:
            window = min(window, max(window * _FIRST_WINDOW, allowed * abs(best_loss)))
        while best_loss - bound > max(rounding, allowed * abs(best_loss)):
            milp = Milp(self.unit, self.costs, base, reduced, prices, spare, window)
            outcome = _Outcome(None, 1.0)
            # Without columns only the base plan is left, which a wider window holds as well: nothing to decide yet.
            if len(milp.columns) or window >= best_loss - linear:
                outcome = self._run(milp, best_loss, deadline, allowed * abs(best_loss) / window)
            best, best_loss = outcome.plan or (best, best_loss)
            # All plans up to the end of the window were in the milp.
            bound = max(bound, linear + window * min(outcome.floor, 1.0))
            if outcome.stopped == _OUT_OF_TIME or (outcome.stopped and window >= best_loss - linear):
                return _Found(best, bound, outcome.stopped)
            if outcome.plan is None and best_loss - linear <= window:
                break
            # A plan far better than the last makes the same relative gap a smaller one, which is still to be closed.
            window = min(best_loss - linear, window * _WINDOW_GROWTH)
        return _Found(best, bound)

    def _run(self, milp: Milp, best_loss: float, deadline: float, allowed: float) -> _Outcome:
        """The best plan of a milp, to a gap given as share of its window."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return _Outcome(None, 0.0, _OUT_OF_TIME)
            result = milp.run(left, allowed)
            if result.status == _INFEASIBLE:
                return _Outcome(None, 1.0)
            stopped = None
            if result.status != _OPTIMAL:
                stopped = _OUT_OF_TIME if result.status == _TIME_LIMIT_REACHED else _FAILED
            floor = proven_share(result)
            if result.x is None:
                return _Outcome(None, floor, stopped or _FAILED)
            chosen = milp.chosen(result.x)
            formats = {name: self.choices[i].quant_format for name, i in zip(self.names, chosen, strict=True)}
            stored, loss = self.totals(formats)
            if loss >= best_loss:
                return _Outcome(None, floor, stopped)
            if stored <= self.budget and (self.second is None or self.second.allows(formats)):
                return _Outcome((formats, loss), floor, stopped)
            # Over a budget by less than the solver's tolerance: not this one.
            milp.exclude(chosen)

    def _by_unit(self, values: np.ndarray) -> list[tuple[int, np.ndarray]]:
        return list(zip(self.first.tolist(), np.split(values, self.first[1:]), strict=True))

    def prices(self, byte_price: float) -> np.ndarray:
        """``[costs]``, loss per byte and second cost in the relaxation; ``byte_price`` is that without a second."""
        if self.second is None:
            return np.array([byte_price])
        count, units = len(self.choices), len(self.names)
        one_each = coo_array((np.ones(count), (self.unit, np.arange(count))), shape=(units, count)).tocsr()
        # Differences within a unit, so that what all its choices share does not blur them.
        loss = self.loss - self.loss[self.first][self.unit]
        costs = self.costs - self.costs[:, self.first][:, self.unit]
        limits = self.limits - self.costs[:, self.first].sum(axis=1)
        scale = np.maximum(np.abs(costs).max(axis=1), np.finfo(float).tiny)
        unit_loss = float(np.abs(loss).max()) or 1.0
        with stdout_discarded():
            result = linprog(
                loss / unit_loss,
                A_ub=costs / scale[:, None],
                b_ub=limits / scale,
                A_eq=one_each,
                b_eq=np.ones(units),
                method="highs-ipm",
            )
        if result.x is None:
            # The price of bytes alone bounds the loss as well, only less closely.
            return np.array([byte_price, *np.zeros(len(limits) - 1)])
        return np.maximum(-result.ineqlin.marginals, 0) * unit_loss / scale


def plan_warnings(plan: BitPlan) -> list[str]:
    """What the user should know of how a plan was found: that the exact solver was stopped."""
    if not plan.solver or not plan.solver.startswith("exact ("):
        return []
    reason = plan.solver.removeprefix("exact (").removesuffix(")")
    within = "no bound is known" if plan.gap is None else f"it is within {100 * plan.gap:.2g} % of the optimum"
    return [f"the plan's optimality was not proven ({reason}); its predicted loss is the best found, {within}"]
