"""Fitting one map variant: at its budget, and at every budget for the frontier.

N requests, T tiers, M of them that the map may use.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dvpa.ablate.models import MeasuredModel
from dvpa.ablate.study import MapVariant
from dvpa.evaluate.baselines import spent
from dvpa.evaluate.metrics import apgr
from dvpa.evaluate.table import OutcomeTable
from dvpa.tiers.budget import Budget, Split
from dvpa.tiers.calibrate import fit_tier_map
from dvpa.tiers.tier_map import TierMap

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NUM_BUDGETS = 13  # of a frontier


@contextmanager
def _without_advice() -> Iterator[None]:
    """A sweep fits hundreds of maps on the same splits: their size is in the report instead."""
    logger = logging.getLogger(fit_tier_map.__module__)

    def is_other(record: logging.LogRecord) -> bool:
        return "are advised" not in str(record.msg)

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A tier map over some of a model's tiers (`columns` [M], rising)."""

    tier_map: TierMap
    columns: IntArray

    def tiers(self, difficulty: FloatArray) -> IntArray:
        """The model's tier of each request [N]."""
        return np.asarray(self.columns[self.tier_map.tiers(difficulty)])

    def narrow(self, table: OutcomeTable) -> OutcomeTable:
        """The table with the map's tiers only."""
        wide = ("quality", "nll", "completion_tokens", "activated_params", "flops", "ms")
        return replace(table, **{name: getattr(table, name)[:, self.columns] for name in wide})


class MapFitter:
    """Fits one variant on one model, at any budget.

    Raises:
        ValueError: a tier that the model does not have, or a list of the wrong length.
    """

    def __init__(self, model: MeasuredModel, variant: MapVariant) -> None:
        self.model, self.variant = model, variant
        self.columns = np.array(variant.columns(model.tier_names), dtype=np.int64)
        fit, calibrate = model.parts["fit"], model.parts["calibrate"]
        charged = (model.costs(calibrate) + model.overhead)[:, self.columns]
        self._fit = Split(fit.difficulty, fit.quality[:, self.columns])
        quality = calibrate.quality[:, self.columns]
        self._calibrate = Split(calibrate.difficulty, quality, charged)
        self.prices = charged.mean(axis=0)

    @property
    def limit(self) -> float | None:
        """The stated budget in activated parameters; None without one."""
        if not self.variant.budget:
            return None
        budget = Budget.parse(self.variant.budget)
        if budget.fraction is not None:  # of the top tier as it costs alone
            return budget.fraction * self.model.whole_costs[-1]
        return budget.mean_activated

    def fit(self) -> Fitted:
        """The map as the variant states it."""
        variant = self.variant
        if variant.shares or variant.cuts:
            cuts = variant.cuts or self._quantiles()
            any_map = self._map(Budget(mean_activated=float(self.prices[-1])), kind="gain")
            placed = replace(any_map, kind="threshold", gain_lambda=None, thresholds=tuple(cuts))
            return Fitted(replace(placed, budget=None, statistics=None), self.columns)
        limit = self.limit
        budget = Budget.parse(variant.budget) if limit is None else Budget(mean_activated=limit)
        return Fitted(self._map(budget, variant.kind), self.columns)

    def at(self, limit: float) -> Fitted:
        """The same with another budget, in activated parameters."""
        return Fitted(self._map(Budget(mean_activated=limit), self.variant.kind), self.columns)

    def _map(self, budget: Budget, kind: str) -> TierMap:
        variant = self.variant
        names = [self.model.tier_names[t] for t in self.columns]
        with _without_advice():
            return fit_tier_map(
                self._fit,
                self._calibrate,
                costs=self.prices.tolist(),
                budget=budget,
                tier_names=names,
                kind=kind,
                guard_alpha=variant.alpha,
                guard_delta=variant.delta,
                upper_cut=variant.upper_cut,
            )

    def _quantiles(self) -> tuple[float, ...]:
        """Cuts that give each tier its share of the calibrate split."""
        cumulative = np.cumsum(self.variant.shares)[:-1]
        cuts = np.quantile(self._calibrate.difficulty, np.clip(cumulative, 0.0, 1.0))
        return tuple(np.clip(cuts, 0.0, 1.0).tolist())


@dataclass(frozen=True, eq=False)
class Curve:
    """Realised points of a swept router on the test split, and the choices behind them."""

    cost: list[float]
    quality: list[float]
    tiers: list[IntArray]
    model: MeasuredModel

    def apgr_within(self, kind: str) -> float:
        """APGR of the same maps among requests of one task kind."""
        model, inside = self.model, np.array(self.model.parts["test"].kind) == kind
        test, whole = model.parts["test"].select(inside), model.whole.select(inside)
        prices = model.costs(test) + model.overhead
        rows = np.arange(len(test))
        quality = [float(test.quality[rows, tiers[inside]].mean()) for tiers in self.tiers]
        cost = [spent(prices, tiers[inside]) for tiers in self.tiers]
        base, top = (
            (model.whole_costs[t], float(whole.quality[:, t].mean())) for t in (0, -1)
        )  # fmt: skip
        return apgr(cost, quality, base, top)


def sweep_map(fitter: MapFitter) -> Curve:
    """Budgets from the cheapest to the dearest that the map may use; one point where it has none.

    Budgets that a guard does not allow are left out.
    """
    model = fitter.model
    test = model.parts["test"]
    prices = model.costs(test) + model.overhead
    found: list[IntArray] = []
    if not fitter.variant.budget:
        found.append(fitter.fit().tiers(test.difficulty))
    else:
        for limit in np.linspace(fitter.prices[0], fitter.prices[-1], NUM_BUDGETS).tolist():
            try:
                found.append(fitter.at(limit).tiers(test.difficulty))
            except ValueError:
                continue  # below what the guard needs
    rows = np.arange(len(test))
    return Curve(
        cost=[spent(prices, tiers) for tiers in found],
        quality=[float(test.quality[rows, tiers].mean()) for tiers in found],
        tiers=found,
        model=model,
    )


def most_mixed_kind(table: OutcomeTable) -> str:
    """The task kind whose requests need the most different tiers.

    By the entropy of the cheapest tier that does best; chosen without the test split.
    """
    kinds, needed = np.array(table.kind), table.quality.argmax(axis=1)

    def entropy(kind: str) -> float:
        share = np.bincount(needed[kinds == kind], minlength=table.num_tiers).astype(float)
        share = share[share > 0] / share.sum()
        return float(-(share * np.log(share)).sum())

    return max(sorted(set(table.kind)), key=entropy)
