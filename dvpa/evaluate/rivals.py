"""What others would have chosen at the adaptive router's cost, all on the test split.

The routers of `compare_routers` as choices per request, so that they can be compared in pairs over
several seeds too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dvpa.evaluate.baselines import (
    FloatArray,
    IntArray,
    Scores,
    cascade_costs,
    length_scores,
    oracle_tiers,
    oracle_tiers_at_budget,
    route_by_score,
    uncertainty_scores,
)
from dvpa.evaluate.table import OutcomeTable


@dataclass(frozen=True, eq=False)
class Choice:
    """The tier that answers each request [N], and what answering costs at each tier [T] or [N, T].

    `pays_twice`: a second call is paid on top of the base tier's.
    """

    tiers: IntArray
    prices: FloatArray
    pays_twice: bool = False

    def quality(self, outcomes: FloatArray) -> FloatArray:
        """Of each request [N], from outcomes [N, T]."""
        return np.asarray(outcomes[np.arange(len(self.tiers)), self.tiers])


def rival_choices(
    fit: OutcomeTable,
    calibrate: OutcomeTable,
    test: OutcomeTable,
    tier_costs: Sequence[float],
    tier_names: Sequence[str],
    costs: FloatArray,
    target: float,
    *,
    scores: Mapping[str, Scores] | None = None,
    kind: str = "gain",
    seed: int = 0,
) -> dict[str, Choice]:
    """Routers that spend `target`, mean activated parameters per test request.

    Args:
        tier_costs: what the score-based routers' maps are fitted with [T].
        costs: of the test requests [N, T].
        scores: further routers by score, such as tfidf, entropy.
        kind: of the score-based routers' maps.

    Returns: length, those of `scores`, cascade (both calls paid; absent without uncertainties);
    dataset_oracle (knows the mean outcomes of each task kind), oracle_at_budget, oracle.
    """
    scored = {"length": length_scores(fit, calibrate, test, seed), **(scores or {})}
    uncertainty = uncertainty_scores(fit, calibrate, test)
    if uncertainty is not None:
        scored["cascade"] = uncertainty
    found = {}
    for name, own in scored.items():
        twice = name == "cascade"
        prices = cascade_costs(costs) if twice else costs
        fitted_with = cascade_costs(list(tier_costs)) if twice else np.asarray(tier_costs)
        tiers = route_by_score(
            own, fit, calibrate, fitted_with.tolist(), tier_names, target, kind, seed, prices
        )
        found[name] = Choice(tiers, prices, twice)
    limit = max(target, float(costs[:, 0].mean()))
    of_kind = mean_by_kind(test)
    found["dataset_oracle"] = Choice(oracle_tiers_at_budget(of_kind, costs, limit), costs)
    found["oracle_at_budget"] = Choice(oracle_tiers_at_budget(test.quality, costs, limit), costs)
    found["oracle"] = Choice(oracle_tiers(test.quality), costs)
    return found


def mean_by_kind(test: OutcomeTable) -> FloatArray:
    """Each request's outcomes [N, T] replaced by the mean ones of its task kind."""
    kinds = np.array(test.kind)
    means = np.empty_like(test.quality)
    for kind in set(test.kind):
        means[kinds == kind] = test.quality[kinds == kind].mean(axis=0)
    return means
