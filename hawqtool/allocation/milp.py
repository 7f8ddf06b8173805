"""What of an allocation problem goes to HiGHS, scaled so that its tolerances do no harm."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array, csr_array, vstack

from hawqtool.runtime.stdout import stdout_discarded

# HiGHS ends at an absolute gap of 1e-6; objectives of up to 1e4 put that at 1e-10 of the gap that is to be closed.
_OBJECTIVE_RANGE = 1e4
# Whole numbers up to here are told apart by its feasibility tolerance of 1e-6; larger ones are scaled down to it.
_COST_RANGE = 1e5
# Part of a window by which what HiGHS proves may be wrong, for its tolerances.
_BOUND_TOLERANCE = 1e-6


class Milp:
    """What HiGHS solves: which units leave their base choice for another that the gap allows.

    Minimises reduced prices plus the price of budget left over, both as shares of the gap. Every plan whose loss
    exceeds the bound by no more than the gap is made of these choices.

    Args:
        unit: ``[choices]``, index of each choice's unit.
        costs: ``[costs, choices]``, bytes first.
        base: ``[units]``, index of each unit's base choice.
        reduced: ``[choices]``, reduced prices; 0 for base choices.
        prices: ``[costs]``, loss per unit of cost.
        spare: ``[costs]``, what the base choices leave of the budgets; may be negative.
        gap: How far above the bound the plans that are sought may be.
    """

    def __init__(
        self,
        unit: np.ndarray,
        costs: np.ndarray,
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
        self.owner = unit[self.columns]
        costs = costs[:, self.columns] - costs[:, base[self.owner]]
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

    def run(self, seconds: float, allowed: float) -> OptimizeResult:
        """One run of HiGHS, to a gap given as share of the window, which is at least what it minimises."""
        constraints = LinearConstraint(self.matrix, self.lower, self.upper)
        options = {"time_limit": seconds, "mip_rel_gap": min(allowed, 1.0)}
        with stdout_discarded():
            return milp(
                self.objective,
                integrality=self.integrality,
                bounds=self.bounds,
                constraints=constraints,
                options=options,
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


def proven_share(result: OptimizeResult) -> float:
    """Share of its window below which HiGHS proved no plan to lie; 0, the linear bound, if it proved nothing."""
    proven = result.mip_dual_bound
    return 0.0 if proven is None else max(float(proven) / _OBJECTIVE_RANGE - _BOUND_TOLERANCE, 0.0)


def _row_scale(costs: np.ndarray, whole: bool) -> float:
    """Unit in which a row of costs is counted: the common divisor of whole numbers, more if these get too large."""
    largest = float(np.abs(costs).max(initial=0.0))
    if not largest:
        return 1.0
    if not whole:
        return largest
    divisor = reduce(math.gcd, {abs(int(cost)) for cost in costs})
    return max(float(divisor), largest / _COST_RANGE)
