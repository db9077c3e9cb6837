"""Routers to compare with: what each would have chosen, as pure functions of outcomes, scores and
costs.

Letters: `N` requests, `T` tiers (base first), `R` random draws. `costs` are activated parameters
per tier, [T], or where requests differ in length [N, T] (see `compare_routers`). Score-based
baselines (length, TF-IDF, cascade) are fitted by the same `fit_tier_map` as the product's own tier
map, on the fit and calibrate splits only. Their budget is then set so that they spend what the
adaptive router spends on the test requests; that reads test scores and answer lengths, never test
outcomes, and removes a difference in cost from the comparison.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dvpa.evaluate.table import OutcomeTable
from dvpa.tiers.calibrate import Budget, Split, fit_tier_map

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

LENGTH_BINS = 32


@dataclass(frozen=True)
class Scores:
    """One difficulty-like score per request on each split, scaled to [0, 1], higher is harder."""

    fit: FloatArray
    calibrate: FloatArray
    test: FloatArray


def spent(costs: Sequence[float] | FloatArray, tier: IntArray) -> float:
    """Mean cost of the choice `tier` [N] at `costs` [T] or [N, T]."""
    wide = np.broadcast_to(np.asarray(costs, dtype=float), (len(tier), np.shape(costs)[-1]))
    return float(wide[np.arange(len(tier)), tier].mean())


def realised(
    quality: FloatArray, costs: Sequence[float] | FloatArray, tier: IntArray
) -> tuple[float, float]:
    """(mean quality, mean cost) of the choice `tier` [N] on outcomes `quality` [N, T]."""
    return float(quality[np.arange(len(tier)), tier].mean()), spent(costs, tier)


def cascade_costs(costs: Sequence[float] | FloatArray) -> FloatArray:
    """Cost [..., T] of a cascade that ends at each tier: the base call is paid before a second."""
    charged = np.array(costs, dtype=float)
    charged[..., 1:] += charged[..., :1]
    return charged


@dataclass(frozen=True)
class RandomMix:
    """A coin that sends a request to `high` with probability `share`, else to `low`."""

    low: int
    high: int
    share: float

    def expected(self, quality: FloatArray) -> FloatArray:
        """Expected quality [N] of each request."""
        return (1 - self.share) * quality[:, self.low] + self.share * quality[:, self.high]

    def draws(self, quality: FloatArray, num_draws: int, seed: int) -> FloatArray:
        """Quality [N, R] under `num_draws` seeded assignments, each with exactly round(share * N)
        at `high`.
        """
        rng = np.random.default_rng(seed)
        num_high = round(self.share * len(quality))
        chosen = np.zeros((len(quality), num_draws), dtype=bool)
        for draw in range(num_draws):
            chosen[rng.permutation(len(quality))[:num_high], draw] = True
        return np.where(chosen, quality[:, [self.high]], quality[:, [self.low]])


def random_mix(costs: Sequence[float] | FloatArray, cost: float) -> RandomMix:
    """The mix of the two tiers next to `cost` on the cost axis whose mean cost is `cost` (clipped
    to the tiers').
    """
    axis = np.asarray(costs, dtype=float)
    high = int(np.clip(np.searchsorted(axis, cost), 1, len(axis) - 1)) if len(axis) > 1 else 0
    low = max(high - 1, 0)
    span = axis[high] - axis[low]
    share = float(np.clip((cost - axis[low]) / span, 0, 1)) if span > 0 else 0.0
    return RandomMix(low=low, high=high, share=share)


def oracle_tiers(quality: FloatArray) -> IntArray:
    """Per request the cheapest tier that reaches the request's best quality (tiers are ordered by
    cost) [N].
    """
    return np.asarray(np.argmax(quality, axis=1), dtype=np.int64)


def oracle_tiers_at_budget(
    quality: FloatArray, costs: Sequence[float] | FloatArray, mean_cost: float
) -> IntArray:
    """Tiers [N] of the best choice made with the outcomes known, at a mean cost of at most
    `mean_cost`; `costs` [T] or [N, T].

    Multiple-choice knapsack, solved through its LP relaxation: each request starts at the base tier
    and moves up its own concave hull; steps are bought in order of quality per cost. At most one
    step per tier pair is lost to rounding.
    """
    axis = np.broadcast_to(np.asarray(costs, dtype=float), quality.shape)
    least = float(axis[:, 0].mean())
    if mean_cost < least * (1 - 1e-12):
        raise ValueError(
            f"mean_cost must be at least the base tier's {least:.0f}, got {mean_cost:.0f}"
        )
    # (-gain per cost, request, tier reached, extra cost); equal rows share one hull.
    hulls: dict[bytes, list[tuple[float, int, float]]] = {}
    steps: list[tuple[float, int, int, float]] = []
    for request, row in enumerate(quality):
        hull = hulls.setdefault(row.tobytes() + axis[request].tobytes(), [])
        if not hull:
            hull.extend(_hull_steps(row, axis[request]))
        steps.extend((-gain, request, reached, extra) for gain, reached, extra in hull)
    steps.sort(key=lambda step: step[0])  # stable: a request's own steps keep their order
    tiers = np.zeros(len(quality), dtype=np.int64)
    left = (mean_cost - least) * len(quality) + 1e-12 * mean_cost * len(quality)
    skipped: set[int] = set()
    for _, request, reached, extra in steps:
        if extra > left or request in skipped:
            skipped.add(request)
            continue
        tiers[request] = reached
        left -= extra
    return tiers


def _hull_steps(row: FloatArray, costs: FloatArray) -> list[tuple[float, int, float]]:
    """Steps (gain per cost, tier reached, extra cost) up the concave hull of one request's (cost,
    quality) points.
    """
    steps: list[tuple[float, int, float]] = []
    current = 0
    while current < len(costs) - 1:
        extra = costs[current + 1 :] - costs[current]
        slope = (row[current + 1 :] - row[current]) / extra
        step = int(
            np.argmax(slope)
        )  # of equal slopes the shortest step: a finer choice, on the same hull
        if slope[step] <= 0:
            break
        current += 1 + step
        steps.append((float(slope[step]), current, float(extra[step])))
    return steps


def length_scores(
    fit: OutcomeTable, calibrate: OutcomeTable, test: OutcomeTable, seed: int
) -> Scores:
    """Prompt length as difficulty: how often the base tier failed at such lengths on the fit split.

    Longer is not always harder, so up to `LENGTH_BINS` bins of equal mass are ordered by failure
    rate, not by length; a difficulty is a place in that order, scaled by the fit split. Inside a
    bin a seeded jitter decides, so that a cut may fall there (at random): else the length router
    could not spend the budget it is given.
    """
    rng = np.random.default_rng(seed)
    inner = np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]
    edges = np.unique(np.quantile(fit.prompt_tokens, inner, method="higher"))
    fails = (fit.quality[:, 0] < 0.5).astype(float)
    bins = np.searchsorted(edges, fit.prompt_tokens, side="right")
    count = np.bincount(bins, minlength=len(edges) + 1)
    failed = np.bincount(bins, weights=fails, minlength=len(edges) + 1)
    # Two requests' worth of the overall rate steadies bins of few requests.
    place = np.argsort(np.argsort((failed + 2 * fails.mean()) / (count + 2), kind="stable"))

    def position(table: OutcomeTable) -> FloatArray:
        bins = np.searchsorted(edges, table.prompt_tokens, side="right")
        return np.asarray(place[bins] + rng.uniform(0, 1, len(table)))

    keys = [position(table) for table in (fit, calibrate, test)]
    order = np.sort(keys[0])
    return Scores(*(np.searchsorted(order, key) / len(order) for key in keys))


def uncertainty_scores(
    fit: OutcomeTable, calibrate: OutcomeTable, test: OutcomeTable
) -> Scores | None:
    """The cascade's signal: quantile (on the fit split) of the base tier's uncertainty about its
    own answer.

    None if the tables were collected without it.
    """
    signals = [table.uncertainty for table in (fit, calibrate, test)]
    if any(np.isnan(signal).any() for signal in signals):
        return None
    return quantile_scores(signals[0], signals[1], signals[2])


def quantile_scores(fit: FloatArray, calibrate: FloatArray, test: FloatArray) -> Scores:
    """A signal in any unit, higher is harder, as its quantile on the fit split."""
    order = np.sort(fit)
    scaled = [np.searchsorted(order, signal) / len(order) for signal in (fit, calibrate, test)]
    return Scores(*scaled)


def tfidf_scores(
    fit_texts: Sequence[str],
    calibrate_texts: Sequence[str],
    test_texts: Sequence[str],
    fit_failure: npt.NDArray[np.bool_],
    seed: int = 0,
) -> Scores | None:
    """P(base tier fails) from character n-grams of the question: TF-IDF (1 to 4) and logistic
    regression.

    On the fit split the probabilities are out-of-fold (5 folds), else the tier map would be fitted
    to scores that have seen their labels. None if fewer than 5 requests of either outcome exist.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    num_folds = 5
    if min(int(fit_failure.sum()), int((~fit_failure).sum())) < num_folds:
        return None
    pipeline = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000, random_state=seed),
    )
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    texts = list(fit_texts)
    in_fit = cross_val_predict(pipeline, texts, fit_failure, cv=folds, method="predict_proba")[:, 1]
    pipeline.fit(texts, fit_failure)
    outside = [
        np.asarray(pipeline.predict_proba(list(part))[:, 1])
        for part in (calibrate_texts, test_texts)
    ]
    return Scores(np.asarray(in_fit), outside[0], outside[1])


def question_scores(
    fit: OutcomeTable,
    calibrate: OutcomeTable,
    test: OutcomeTable,
    questions: Mapping[str, str],
    seed: int = 0,
) -> Scores | None:
    """`tfidf_scores` of three tables, from request id -> question text. ValueError if one is
    missing.
    """
    texts = []
    for table in (fit, calibrate, test):
        missing = [key for key in table.ids if key not in questions]
        if missing:
            raise ValueError(f"questions must hold every request id, {missing[0]!r} is missing")
        texts.append([questions[key] for key in table.ids])
    return tfidf_scores(texts[0], texts[1], texts[2], fit.quality[:, 0] < 0.5, seed)


def route_by_score(
    scores: Scores,
    fit: OutcomeTable,
    calibrate: OutcomeTable,
    costs: Sequence[float],
    tier_names: Sequence[str],
    mean_cost: float,
    kind: str,
    seed: int = 0,
    charged: FloatArray | None = None,
    max_fits: int = 6,
) -> IntArray:
    """Tiers [N] on the test split of a router on `scores` that spends `mean_cost` there, at the
    prices `charged` [N, T] (default: `costs` [T], which the maps are fitted with).

    Tier maps are fitted at budgets that close in on the realised test cost. What is left between
    the nearest one below and the nearest one above (at the ends: always-base, always-top) is spent
    by a seeded coin between the two, so that coarse scores do not leave money on the table.
    """
    num_requests, num_tiers = len(scores.test), len(costs)
    prices = np.broadcast_to(
        np.asarray(costs if charged is None else charged, dtype=float), (num_requests, num_tiers)
    )
    below = np.zeros(num_requests, dtype=np.int64)
    above = np.full(num_requests, num_tiers - 1, dtype=np.int64)
    target = float(np.clip(mean_cost, spent(prices, below), spent(prices, above)))
    low, high = float(costs[0]), float(costs[-1])
    budget = float(np.clip(target, low, high))
    for _ in range(max_fits):
        tiers = fit_tiers(scores, fit, calibrate, costs, tier_names, budget, kind)
        cost = spent(prices, tiers)
        if cost <= target:
            below = tiers if cost >= spent(prices, below) else below
            low = budget
        else:
            above = tiers if cost <= spent(prices, above) else above
            high = budget
        if abs(cost - target) <= 2e-3 * target:
            break
        # The error as a correction; halving where that would leave the bracket.
        budget += target - cost
        if not low < budget < high:
            budget = (low + high) / 2
    gap = spent(prices, above) - spent(prices, below)
    share = (target - spent(prices, below)) / gap if gap > 0 else 0.0
    lifted = np.random.default_rng(seed).permutation(len(below))[: round(share * len(below))]
    mixed = below.copy()
    mixed[lifted] = above[lifted]
    return mixed


def fit_tiers(
    scores: Scores,
    fit: OutcomeTable,
    calibrate: OutcomeTable,
    costs: Sequence[float],
    tier_names: Sequence[str],
    budget: float,
    kind: str,
) -> IntArray:
    """Tiers [N] on the test split of a map fitted on `scores` under a mean cost of `budget`."""
    with _advice_given():
        tier_map = fit_tier_map(
            Split(scores.fit, fit.quality),
            Split(scores.calibrate, calibrate.quality),
            costs=tuple(float(cost) for cost in costs),
            budget=Budget(mean_activated=budget),
            tier_names=tuple(tier_names),
            kind=kind,
        )
    return np.asarray(tier_map.tiers(scores.test), dtype=np.int64)


@contextmanager
def _advice_given() -> Iterator[None]:
    """Fitting warns about small splits. The product's own tier map has drawn that warning already;
    dozens of refits on the same splits would bury it.
    """
    logger = logging.getLogger(fit_tier_map.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
