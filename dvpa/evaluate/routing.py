"""The comparison at equal cost: the adaptive router next to what anyone could do without it.

`compare_routers` gives one row per router on the test split; `routing_frontier` sweeps budgets for
the figure; `difficulty_metrics` asks whether the head knows more than prompt length. Pure
NumPy/SciPy/scikit-learn on outcome tables: no model, no torch. The metrics and baselines themselves
live in `metrics` and `baselines`, re-exported here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dvpa.evaluate.baselines import (
    RandomMix,
    Scores,
    cascade_costs,
    fit_tiers,
    length_scores,
    oracle_tiers,
    oracle_tiers_at_budget,
    question_scores,
    random_mix,
    realised,
    route_by_score,
    spent,
    tfidf_scores,
    uncertainty_scores,
)
from dvpa.evaluate.metrics import (
    apgr,
    auroc,
    bootstrap_ci,
    bootstrap_draw_means,
    bootstrap_means,
    cpt,
    paired_bootstrap,
    partial_spearman,
    percentile_interval,
    pgr,
    pgr_curve,
    spearman,
)
from dvpa.evaluate.rivals import Choice, rival_choices
from dvpa.evaluate.table import OutcomeTable
from dvpa.tiers.tier_map import TierMap

__all__ = [
    "RandomMix",
    "Scores",
    "adaptive_tiers",
    "apgr",
    "auroc",
    "bootstrap_ci",
    "bootstrap_draw_means",
    "bootstrap_means",
    "cascade_costs",
    "compare_routers",
    "cpt",
    "difficulty_metrics",
    "fit_tiers",
    "length_scores",
    "oracle_tiers",
    "oracle_tiers_at_budget",
    "paired_bootstrap",
    "partial_spearman",
    "percentile_interval",
    "pgr",
    "pgr_curve",
    "question_scores",
    "random_mix",
    "realised",
    "route_by_score",
    "routing_frontier",
    "spearman",
    "spent",
    "tfidf_scores",
    "uncertainty_scores",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Draws of the random router's assignments that the bootstrap cycles through.
_NUM_DRAWS = 64


def adaptive_tiers(tier_map: TierMap, difficulty: FloatArray) -> IntArray:
    """The tier map's choice per request [N]; requests without a difficulty (NaN) get its default
    tier.
    """
    tiers = np.full(len(difficulty), tier_map.default_tier, dtype=np.int64)
    known = np.isfinite(difficulty)
    tiers[known] = tier_map.tiers(difficulty[known])
    return tiers


def compare_routers(
    fit: OutcomeTable,
    calibrate: OutcomeTable,
    test: OutcomeTable,
    tier_map: TierMap,
    *,
    questions: Mapping[str, str] | None = None,
    tfidf: Scores | None = None,
    overhead: Sequence[float] | None = None,
    request_costs: FloatArray | None = None,
    ms: Mapping[str, Sequence[float]] | None = None,
    whole: OutcomeTable | None = None,
    whole_costs: Sequence[float] | None = None,
    baseline_kind: str | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """One row per router, all on the test split, those with a choice spending what `adaptive`
    spends.

    questions      request id -> question text; with it the `tfidf` row is computed.
    tfidf          the scores for it, if already computed.
    request_costs  activated parameters of each test request at each tier [N, T], so scaled that
    the mean over requests is the mean over tokens: a long answer at a tier costs more than a short
    one. Default: the tier map's costs for every request.
    overhead       extra activated parameters per request that the head costs when it picks each
    tier [T] (default 0);
                   charged to `adaptive`, and granted to every router that is matched to it.
    ms             measured milliseconds per request by answering tier [T], three times: `whole`
    (the tier reads the prompt), `routed` (the base tier does), `adaptive` (it also scores it); rows
    then carry `ms_per_request`.
    whole, whole_costs  the test requests answered by one tier from the first prompt token on, and
    what that costs [T]; the `always_<tier>` rows then show these, where the routers' tables have
    the base tier read the prompt. Default: the same as the routers'.
    baseline_kind  tier map kind of the score-based baselines; default: the kind
    of `tier_map`.

    A row: quality, mean_activated_params, ci95 (bootstrap over requests), standard_error,
    relative_cost (of the top tier), tier_share [T], and `adaptive_minus`: {difference, ci95,
    standard_error} of the paired bootstrap. Rows: always_<tier>, random, length, tfidf, cascade
    (both calls charged), adaptive, dataset_oracle, oracle_at_budget, oracle.
    """
    tier_costs = np.asarray(tier_map.costs, dtype=float)
    names = list(tier_map.tier_names)
    for split, table in (("fit", fit), ("calibrate", calibrate), ("test", test)):
        if table.num_tiers != len(tier_costs):
            raise ValueError(
                f"{split} table has {table.num_tiers} tiers, the tier map {len(tier_costs)}"
            )
        if len(table) == 0:
            raise ValueError(f"{split} table has no requests")
    quality = test.quality
    whole = test if whole is None else whole
    whole_quality = whole.quality
    costs = per_request(tier_map, test, request_costs)
    whole_price = tier_costs if whole_costs is None else np.asarray(whole_costs, dtype=float)
    if whole.ids != test.ids:
        raise ValueError("whole must hold the requests of the test table, in their order")
    adaptive = adaptive_tiers(tier_map, test.difficulty)
    extra = np.zeros(len(names)) if overhead is None else np.asarray(overhead, dtype=float)
    target = spent(costs + extra, adaptive)
    kind = baseline_kind or tier_map.kind

    choices = {
        f"always_{name}": Choice(np.full(len(test), tier, dtype=np.int64), whole_price)
        for tier, name in enumerate(names)
    }
    mix = random_mix(costs.mean(axis=0), target)
    if questions is not None and tfidf is None:
        tfidf = question_scores(fit, calibrate, test, questions, seed)
    scores = {} if tfidf is None else {"tfidf": tfidf}
    rivals = rival_choices(
        fit,
        calibrate,
        test,
        tier_costs.tolist(),
        names,
        costs,
        target,
        scores=scores,
        kind=kind,
        seed=seed,
    )
    choices |= {"adaptive": Choice(adaptive, costs + extra), **rivals}
    oracles = [name for name in rivals if "oracle" in name]
    order = [*(f"always_{name}" for name in names), "random"]
    order += [name for name in rivals if name not in oracles]
    order += ["adaptive", *oracles]
    values = {
        name: choice.quality(whole_quality if name.startswith("always_") else quality)
        for name, choice in choices.items()
    }
    values["random"] = mix.expected(quality)
    columns = np.stack([values[name] for name in order], axis=1)
    replicates = dict(zip(order, bootstrap_means(columns, num_resamples, seed).T, strict=True))
    draws = mix.draws(quality, _NUM_DRAWS, seed)
    replicates["random"] = bootstrap_draw_means(draws, num_resamples, seed)

    rows: dict[str, dict[str, Any]] = {}
    for name in order:
        if name == "random":
            share = np.zeros(len(names))
            share[mix.high] += mix.share
            share[mix.low] += 1 - mix.share
            mean_cost = float(share @ costs.mean(axis=0))
        else:
            choice = choices[name]
            share = np.bincount(choice.tiers, minlength=len(names)) / len(choice.tiers)
            mean_cost = spent(choice.prices, choice.tiers)
        row: dict[str, Any] = {
            "quality": float(values[name].mean()),
            "mean_activated_params": mean_cost,
            "ci95": list(percentile_interval(replicates[name])),
            "standard_error": float(replicates[name].std(ddof=1)),
            "relative_cost": mean_cost / float(whole_price[-1]),
            "tier_share": share.tolist(),
        }
        if ms is not None:
            way = "whole" if name.startswith("always_") else "routed"
            times = np.asarray(ms["adaptive" if name == "adaptive" else way], dtype=float)
            second_call = float((1 - share[0]) * times[0]) if name == "cascade" else 0.0
            row["ms_per_request"] = float(share @ times) + second_call
        if name != "adaptive":
            difference = replicates["adaptive"] - replicates[name]
            row["adaptive_minus"] = {
                "difference": float(values["adaptive"].mean() - values[name].mean()),
                "ci95": list(percentile_interval(difference)),
                "standard_error": float(difference.std(ddof=1)),
            }
        rows[name] = row
    return rows


def routing_frontier(
    fit: OutcomeTable,
    calibrate: OutcomeTable,
    test: OutcomeTable,
    tier_map: TierMap,
    *,
    overhead: Sequence[float] | None = None,
    request_costs: FloatArray | None = None,
    num_points: int = 13,
    seed: int = 0,
) -> dict[str, dict[str, list[float]]]:
    """Curves {cost: [...], quality: [...]} on the test split for budgets from the base to the top
    tier's cost.

    `adaptive` (refitted on fit + calibrate at every budget; absent without difficulties), `length`,
    `random` (through the always-tiers) and `oracle`. Costs are realised mean activated parameters.
    """
    tier_costs = np.asarray(tier_map.costs, dtype=float)
    costs = per_request(tier_map, test, request_costs)
    names = list(tier_map.tier_names)
    extra = np.zeros(len(names)) if overhead is None else np.asarray(overhead, dtype=float)
    budgets = np.linspace(tier_costs[0], tier_costs[-1], num_points)
    mean_costs = costs.mean(axis=0)
    curves: dict[str, dict[str, list[float]]] = {
        "random": {"cost": mean_costs.tolist(), "quality": test.quality.mean(axis=0).tolist()},
        "oracle": {"cost": [], "quality": []},
    }
    for budget in np.linspace(mean_costs[0], mean_costs[-1], num_points):
        tiers = oracle_tiers_at_budget(test.quality, costs, float(budget))
        _append(curves["oracle"], realised(test.quality, costs, tiers))
    sweeps = {"length": (length_scores(fit, calibrate, test, seed), np.zeros(len(names)))}
    tables = (fit, calibrate, test)
    if all(bool(np.isfinite(table.difficulty).all()) for table in tables):
        head = Scores(fit.difficulty, calibrate.difficulty, test.difficulty)
        sweeps["adaptive"] = (head, extra)
    for name, (scores, added) in sweeps.items():
        curves[name] = {"cost": [], "quality": []}
        for budget in budgets:
            tiers = fit_tiers(
                scores, fit, calibrate, tier_costs.tolist(), names, float(budget), tier_map.kind
            )
            _append(curves[name], realised(test.quality, costs + added, tiers))
    return curves


def per_request(
    tier_map: TierMap, test: OutcomeTable, request_costs: FloatArray | None
) -> FloatArray:
    """Costs [N, T] of the test requests. ValueError for the wrong shape."""
    shape = (len(test), len(tier_map.costs))
    given = tier_map.costs if request_costs is None else request_costs
    if request_costs is not None and request_costs.shape != shape:
        raise ValueError(f"request_costs must have shape {shape}, got {request_costs.shape}")
    return np.broadcast_to(np.asarray(given, dtype=float), shape)


def difficulty_metrics(
    test: OutcomeTable, questions_score: FloatArray | None = None
) -> dict[str, Any]:
    """How well the difficulty predicts failure at each tier, next to prompt length (and TF-IDF, if
    given).

    Per tier [T]: AUROC of "fails" (quality < 0.5), Spearman with the quality lost, and partial
    Spearman with log prompt length held fixed. `by_kind`: sizes, quality per tier and AUROC at the
    base tier within each task kind, where a score that only recognises the kind is worth nothing.
    """
    lost = 1 - test.quality
    fails = test.quality < 0.5
    length = np.log(test.prompt_tokens)
    tiers = range(test.num_tiers)
    kinds = np.array(test.kind)
    by_kind = []
    for kind in sorted(set(test.kind)):
        inside = kinds == kind
        by_kind.append(
            {
                "kind": kind,
                "num_requests": int(inside.sum()),
                "quality_by_tier": test.quality[inside].mean(axis=0).tolist(),
                "auroc_base": auroc(test.difficulty[inside], fails[inside, 0]),
                "auroc_base_length": auroc(length[inside], fails[inside, 0]),
            }
        )
    report: dict[str, Any] = {
        "auroc_by_tier": [auroc(test.difficulty, fails[:, t]) for t in tiers],
        "spearman_by_tier": [spearman(test.difficulty, lost[:, t]) for t in tiers],
        "partial_spearman_by_tier": [
            partial_spearman(test.difficulty, lost[:, t], length) for t in tiers
        ],
        "length_auroc_by_tier": [auroc(length, fails[:, t]) for t in tiers],
        "length_spearman_by_tier": [spearman(length, lost[:, t]) for t in tiers],
        "by_kind": by_kind,
    }
    if questions_score is not None:
        report["tfidf_auroc_by_tier"] = [auroc(questions_score, fails[:, t]) for t in tiers]
    return report


def _append(curve: dict[str, list[float]], point: tuple[float, float]) -> None:
    curve["quality"].append(point[0])
    curve["cost"].append(point[1])
