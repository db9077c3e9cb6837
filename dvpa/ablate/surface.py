"""How much the thresholds matter: quality and cost at every pair of two cuts.

A map of three tiers (base, one in the middle, top) has two cuts. They are put at every pair of
quantiles of the calibrate split's difficulties; requests of the test split then give quality and
cost. N requests, S shares.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dvpa.ablate.models import MeasuredModel
from dvpa.evaluate.baselines import spent

FloatArray = npt.NDArray[np.float64]

STEPS = 20  # of the shares
NEAR = 0.02  # below a cost, of the top tier's: what counts as the same


def threshold_surfaces(models: Sequence[MeasuredModel], cost: float) -> list[dict[str, Any]]:
    """A surface for every tier in the middle, means over `models` (seeds of one recipe).

    Each has `tiers` (three names), `share` [S] (of requests below a cut), `cut` [S] (that
    difficulty; the ends have none), and `quality`, `relative_cost` [S, S]: row, the share below the
    first cut; column, below the second; None under the diagonal. `best`: the pair that does best
    among those that cost no more than `cost` (of the top tier's), on these very requests.
    `at_this_cost`: the least and the greatest quality of the pairs that cost about as much.
    """
    names = models[0].tier_names
    return [_surface(models, middle, cost) for middle in range(1, len(names) - 1)]


def _surface(models: Sequence[MeasuredModel], middle: int, cost: float) -> dict[str, Any]:
    names = models[0].tier_names
    shares = np.linspace(0.0, 1.0, STEPS + 1)
    found = [_of_model(model, middle, shares) for model in models]
    cuts = np.mean([cut for cut, _, _ in found], axis=0)
    quality = np.mean([own for _, own, _ in found], axis=0)
    costs = np.mean([own for _, _, own in found], axis=0)
    result: dict[str, Any] = {
        "tiers": [names[0], names[middle], names[-1]],
        "share": _rounded(shares),
        "cut": _rounded(np.where((shares > 0) & (shares < 1), cuts, np.nan)),
        "quality": [_rounded(row) for row in quality],
        "relative_cost": [_rounded(row) for row in costs],
        "cost": cost,
    }
    affordable = np.where(costs <= cost, quality, np.nan)  # NaN compares false
    if np.isfinite(affordable).any():
        first, second = np.unravel_index(np.nanargmax(affordable), affordable.shape)
        result["best"] = {
            "share": [float(shares[first]), float(shares[second])],
            "quality": float(quality[first, second]),
            "relative_cost": float(costs[first, second]),
        }
    near = quality[(costs <= cost) & (costs >= cost - NEAR)]
    if near.size:
        result["at_this_cost"] = [float(near.min()), float(near.max())]
    return result


def _of_model(
    model: MeasuredModel, middle: int, shares: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Cuts [S], quality and relative cost [S, S] of one seed; NaN where the cuts would cross."""
    test = model.parts["test"]
    prices = model.costs(test) + model.overhead
    rows, top = np.arange(len(test)), len(model.tier_names) - 1
    cuts = np.quantile(model.parts["calibrate"].difficulty, shares)
    edges = np.concatenate(([-np.inf], cuts[1:-1], [np.inf]))  # all below, none below
    quality = np.full((len(shares), len(shares)), np.nan)
    costs = quality.copy()
    for first in range(len(shares)):
        for second in range(first, len(shares)):
            above = np.digitize(test.difficulty, [edges[first], edges[second]])
            tiers = np.array([0, middle, top])[above]
            quality[first, second] = test.quality[rows, tiers].mean()
            costs[first, second] = spent(prices, tiers) / model.whole_costs[-1]
    return cuts, quality, costs


def _rounded(values: FloatArray) -> list[float | None]:
    return [round(float(value), 5) if np.isfinite(value) else None for value in values]
