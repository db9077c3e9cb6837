"""Requests that no tier can answer: a gain map leaves them where they are cheap."""

from dataclasses import replace

import numpy as np
import pytest
from request_world import COSTS, NAMES, Requests, draw

from dvpa.tiers.calibrate import Budget, fit_tier_map
from dvpa.tiers.tier_map import TierMap

FIT, CALIBRATE, FRESH = (draw(seed, 4000) for seed in (1, 2, 3))


def fitted(min_quality: float, kind: str, upper_cut: bool = False) -> TierMap:
    return fit_tier_map(
        FIT.split, CALIBRATE.split, COSTS, Budget(min_quality=min_quality), NAMES, kind,
        upper_cut=upper_cut,
    )  # fmt: skip


def spent(tier_map: TierMap, requests: Requests) -> dict[str, float]:
    """Expected quality, mean cost, and what of it goes to hopeless requests."""
    tiers = tier_map.tiers(requests.split.difficulty)
    costs = np.asarray(COSTS)[tiers]
    hopeless = requests.is_hopeless
    return {
        "quality": requests.chance[np.arange(len(tiers)), tiers].mean(),
        "cost": costs.mean(),
        "hopeless": costs[hopeless].mean(),
        "hopeless_at_top": (tiers[hopeless] == len(COSTS) - 1).mean(),
    }


@pytest.mark.parametrize(
    ("min_quality", "at_top", "of_cost"), [(0.9, 0.1, 0.7), (0.95, 0.15, 0.75), (0.98, 0.3, 0.85)]
)
def test_a_gain_map_spends_less_on_them_at_equal_quality(
    min_quality: float, at_top: float, of_cost: float
) -> None:
    """`at_top`, `of_cost`: a high floor must pay for some of them. A fourth of the hopeless ones
    look like requests of which the top tier answers 5 % or more that the base tier does not
    (d < 0.85).
    """
    gain, threshold = (spent(fitted(min_quality, kind), FRESH) for kind in ("gain", "threshold"))
    assert gain["quality"] == pytest.approx(threshold["quality"], abs=0.015)
    assert gain["hopeless"] < 0.5 * threshold["hopeless"]
    assert threshold["hopeless_at_top"] > 0.9
    assert gain["hopeless_at_top"] < at_top
    assert gain["cost"] < of_cost * threshold["cost"]


def test_an_upper_cut_makes_a_threshold_map_do_the_same() -> None:
    gain, cut = spent(fitted(0.95, "gain"), FRESH), spent(fitted(0.95, "threshold", True), FRESH)
    assert cut["quality"] == pytest.approx(gain["quality"], abs=0.015)
    assert cut["hopeless"] == pytest.approx(gain["hopeless"], rel=0.3)


def test_without_hopeless_requests_the_two_are_alike() -> None:
    parts = [draw(seed, 4000, hopeless=0.0) for seed in (1, 2, 3)]
    found = []
    for kind in ("gain", "threshold"):
        tier_map = fit_tier_map(
            parts[0].split, parts[1].split, COSTS, Budget(min_quality=0.95), NAMES, kind
        )
        found.append(
            spent(
                replace(tier_map, statistics=None),
                replace(parts[2], is_hopeless=np.ones(4000, dtype=bool)),
            )
        )
    assert found[0]["cost"] == pytest.approx(found[1]["cost"], rel=0.1)
