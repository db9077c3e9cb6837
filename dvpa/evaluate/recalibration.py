"""A tier map for the traffic that came: from a server's log, with shadow outcomes where there are.

The budget is met on the logged requests' difficulties, which need no label. With enough shadow
outcomes the calibration curves (and a guard) are fitted anew on those; without, the map keeps its
curves, which trusts that a difficulty means what it meant.

Shadow outcomes say how a tier compares with the top tier, not who is right: to them a hopeless
request is one on which the tiers differ.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dvpa.evaluate.calibration import CalibrationOptions, of_whole
from dvpa.evaluate.server_logs import ServerLog
from dvpa.pricing import ModelPrice
from dvpa.tiers.budget import Split, Traffic
from dvpa.tiers.calibrate import MIN_REQUESTS, fit_tier_map, refit_budget
from dvpa.tiers.drift import Drift
from dvpa.tiers.tier_map import TierMap

FloatArray = npt.NDArray[np.float64]
MIN_SHADOWS = 2 * MIN_REQUESTS  # half to fit the curves, half for the guard


def recalibrate(
    log: ServerLog,
    tier_map: TierMap,
    model_price: ModelPrice,
    options: CalibrationOptions,
    by_nll: bool = False,
    read_prompt: str = "tier",
) -> tuple[TierMap, dict[str, Any]]:
    """A map that meets the budget on the logged requests, and what changed.

    Args:
        tier_map: the one that was in force.
        by_nll: quality of a shadow outcome by the nll of the top tier's answer, not by agreement.
        read_prompt: the server's setting of that name.

    Raises:
        ValueError: fewer than 30 routed requests; too few shadow outcomes for a guard, or for a
            quality floor; a budget that cannot be kept; milliseconds of a tier that hardly any
            request ended at.
    """
    budget = of_whole(options.budget, float(model_price.tiers[-1].activated_params))
    costs = logged_costs(log, model_price, budget.unit, read_prompt)
    traffic = Traffic(log.difficulty, costs)
    num_shadows = len(log.shadow_difficulty)
    has_labels = num_shadows >= MIN_SHADOWS
    if not has_labels and (options.alpha is not None or budget.min_quality is not None):
        name = "alpha" if options.alpha is not None else "min_quality"
        raise ValueError(
            f"{name}: needs {MIN_SHADOWS} shadow outcomes, the log has {num_shadows} (set "
            "shadow_share when serving)"
        )
    if has_labels:
        quality = log.shadow_quality(by_nll)
        order = np.random.default_rng(options.seed).permutation(num_shadows)
        fit, calibrate = (
            Split(log.shadow_difficulty[rows], quality[rows])
            for rows in (order[: num_shadows // 2], order[num_shadows // 2 :])
        )
        found = fit_tier_map(
            fit,
            calibrate,
            tier_map.costs,
            budget,
            tier_map.tier_names,
            options.kind or tier_map.kind,
            options.alpha,
            options.delta,
            tier_map.default_tier,
            options.upper_cut,
            traffic,
        )
    else:
        found = refit_budget(tier_map, traffic, budget, options.kind, options.upper_cut)
    return replace(found, budget=options.budget.to_dict()), {
        "requests": len(log),
        "unscored": log.num_unscored,
        "other_lines": log.num_other,
        "shadow_outcomes": num_shadows,
        "curves": "shadow outcomes" if has_labels else "kept",
        "guard_dropped": tier_map.guard is not None and found.guard is None,
        "drift": _drift(tier_map, log),
        "budget": {
            "stated": options.budget.to_dict(),
            "unit": budget.unit,
            "limit": budget.mean_limit(tier_map.costs),
            "before": _mean(costs, log.tier),
            "after": _mean(costs, found.tiers(log.difficulty)),
        },
    }


def logged_costs(
    log: ServerLog, model_price: ModelPrice, unit: str, read_prompt: str = "tier"
) -> FloatArray:
    """What each logged request costs, or would have cost, at each tier [N, T].

    An answer is taken to be as long at every tier as it was at its own. Activated parameters are
    scaled so that the mean over requests is the mean over tokens; milliseconds are each tier's mean
    over the requests that ended there, so every tier needs 30 of those.
    """
    tiers = model_price.tiers
    tokens = log.tokens.astype(float)
    if unit == "activated_params":
        activated = [tier.activated_params for tier in tiers]
        return _by_tier(log, activated, read_prompt) / tokens.mean()
    if unit == "flops":
        plain = _by_tier(log, [tier.flops_per_token for tier in tiers], read_prompt)
        extra = [
            [model_price.scoring_flops(prompt, tier, read_prompt) for tier in range(len(tiers))]
            for prompt in log.prompt_tokens.tolist()
        ]
        return plain + np.array(extra, dtype=float)
    counts = np.bincount(log.tier, minlength=len(tiers))
    if counts.min() < MIN_REQUESTS:
        scarce = int(counts.argmin())
        raise ValueError(
            f"budget: milliseconds need {MIN_REQUESTS} logged requests at every tier, "
            f"{tiers[scarce].name} has {counts[scarce]}"
        )
    means = np.bincount(log.tier, log.ms, minlength=len(tiers)) / counts
    return np.tile(means, (len(log), 1))


def _by_tier(log: ServerLog, per_token: Sequence[int], read_prompt: str) -> FloatArray:
    """[N, T] over all tokens of each request; read by base, all but the prompt's last are its."""
    read = np.maximum(log.prompt_tokens - 1, 0).astype(float) if read_prompt == "base" else 0.0
    price = np.asarray(per_token, dtype=float)
    return np.asarray(
        (price[0] * read + np.zeros(len(log)))[:, None] + np.outer(log.tokens - read, price)
    )


def _drift(tier_map: TierMap, log: ServerLog) -> float | None:
    """The logged difficulties against the map's calibration; None without a histogram there."""
    drift = Drift(tier_map, window=len(log))
    for difficulty in log.difficulty.tolist():
        drift.add(difficulty)
    return drift.index


def _mean(costs: FloatArray, tiers: npt.NDArray[np.int64]) -> float:
    return float(costs[np.arange(len(tiers)), tiers].mean())
