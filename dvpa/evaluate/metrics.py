"""Routing metrics: pure functions on arrays (NumPy and SciPy only).

Letters: `N` requests, `T` tiers. "Cost" is activated parameters; it is normalised as (C - C_base) /
(C_top - C_base). PGR, APGR and CPT follow RouteLLM (arXiv 2406.18665), with the share of strong
calls replaced by normalised cost so that they hold for any number of tiers. A quantity that is
undefined (no quality gap, one class only) is NaN.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Bootstrap replicates drawn at a time: bounds memory at 64 x N numbers whatever the total.
_CHUNK = 64


def pgr(quality: float, base_quality: float, top_quality: float) -> float:
    """Performance gap recovered: 0 at the base tier's quality, 1 at the top tier's. NaN without a
    gap.
    """
    gap = top_quality - base_quality
    return float((quality - base_quality) / gap) if gap > 0 else float("nan")


def pgr_curve(
    cost: npt.ArrayLike,
    quality: npt.ArrayLike,
    base: tuple[float, float],
    top: tuple[float, float],
    at: npt.ArrayLike,
) -> FloatArray:
    """PGR at normalised costs `at` of a router swept over (cost, quality) points.

    `base` and `top` are (cost, quality) of the two extreme tiers. The curve joins the base and the
    top tier, is linear between points (a router can mix two operating points at random) and never
    decreases (it can spend less).
    """
    points = np.array(
        [base, top, *zip(np.asarray(cost), np.asarray(quality), strict=True)], dtype=float
    )
    points = points[np.lexsort((points[:, 1], points[:, 0]))]
    if not top[0] > base[0]:
        raise ValueError(
            f"the top tier must cost more than the base tier, got {base[0]} and {top[0]}"
        )
    if not top[1] > base[1]:
        return np.full(np.shape(at), np.nan)
    normalised = (points[:, 0] - base[0]) / (top[0] - base[0])
    best = np.maximum.accumulate(points[:, 1])
    # One value per cost (the best), else interpolation at a repeated cost is arbitrary.
    unique, first = np.unique(normalised[::-1], return_index=True)
    recovered = (best[::-1][first] - base[1]) / (top[1] - base[1])
    return np.asarray(np.interp(np.asarray(at, dtype=float), unique, recovered))


def apgr(
    cost: npt.ArrayLike,
    quality: npt.ArrayLike,
    base: tuple[float, float],
    top: tuple[float, float],
    num_points: int = 101,
) -> float:
    """Mean PGR over equally spaced normalised costs in [0, 1]; a random base/top mix scores exactly
    0.5.
    """
    return float(np.mean(pgr_curve(cost, quality, base, top, np.linspace(0, 1, num_points))))


def cpt(
    cost: npt.ArrayLike,
    quality: npt.ArrayLike,
    base: tuple[float, float],
    top: tuple[float, float],
    percent: float,
) -> float:
    """Smallest normalised cost at which PGR reaches `percent` (0 to 100); NaN if the curve never
    does.
    """
    grid = np.linspace(0, 1, 1001)
    recovered = pgr_curve(cost, quality, base, top, grid)
    reached = np.flatnonzero(recovered >= percent / 100 - 1e-12)
    return float(grid[reached[0]]) if reached.size else float("nan")


def auroc(score: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """Probability that a random positive outranks a random negative, ties counted half. NaN with
    one class.
    """
    values, labels = np.asarray(score, dtype=float), np.asarray(positive).astype(bool)
    num_positive, num_negative = int(labels.sum()), int((~labels).sum())
    if num_positive == 0 or num_negative == 0 or np.isnan(values).any():
        return float("nan")
    rank_sum = float(rankdata(values)[labels].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Spearman rank correlation; NaN if either side is constant or holds NaN."""
    return _pearson(_ranks(x), _ranks(y))


def partial_spearman(x: npt.ArrayLike, y: npt.ArrayLike, control: npt.ArrayLike) -> float:
    """Spearman correlation of x and y with `control` held fixed (first-order partial correlation of
    ranks).

    Ranks make it the same for length and log length. NaN where a correlation with the control is
    exactly +-1.
    """
    ranks_x, ranks_y, ranks_c = _ranks(x), _ranks(y), _ranks(control)
    r_xy = _pearson(ranks_x, ranks_y)
    if np.ptp(ranks_c) == 0:  # a constant control explains nothing
        return r_xy
    r_xc, r_yc = _pearson(ranks_x, ranks_c), _pearson(ranks_y, ranks_c)
    rest = (1 - r_xc**2) * (1 - r_yc**2)
    return float((r_xy - r_xc * r_yc) / np.sqrt(rest)) if rest > 1e-12 else float("nan")


def bootstrap_means(values: npt.ArrayLike, num_resamples: int = 2000, seed: int = 0) -> FloatArray:
    """Means [num_resamples, M] of the columns of `values` [N, M] over requests drawn with
    replacement.

    All columns see the same draws, so differences between columns are paired.
    """
    matrix = np.asarray(values, dtype=float)
    if matrix.ndim != 2 or len(matrix) == 0:
        raise ValueError(f"values must have shape [N > 0, M], got {matrix.shape}")
    means = [
        counts @ matrix / len(matrix) for counts in _resamples(len(matrix), num_resamples, seed)
    ]
    return np.concatenate(means)


def bootstrap_draw_means(
    draws: npt.ArrayLike, num_resamples: int = 2000, seed: int = 0
) -> FloatArray:
    """Means [num_resamples] of a *random* policy: `draws` [N, R] are R draws of its per-request
    quality.

    Replicate b reads draw b mod R, so the spread includes the policy's own chance; the resampled
    requests are those of `bootstrap_means` with the same arguments.
    """
    matrix = np.asarray(draws, dtype=float)
    means, start = [], 0
    for counts in _resamples(len(matrix), num_resamples, seed):
        column = np.arange(start, start + len(counts)) % matrix.shape[1]
        means.append(np.einsum("bn,nb->b", counts, matrix[:, column]) / len(matrix))
        start += len(counts)
    return np.concatenate(means)


def bootstrap_ci(
    values: npt.ArrayLike, num_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N] over requests."""
    column = np.asarray(values, dtype=float)[:, None]
    return percentile_interval(bootstrap_means(column, num_resamples, seed)[:, 0], level)


def paired_bootstrap(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """(mean of a - b, lower, upper) over requests that both routers answered."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return float(difference.mean()), *bootstrap_ci(difference, num_resamples, seed, level)


def percentile_interval(replicates: FloatArray, level: float = 0.95) -> tuple[float, float]:
    """Central interval of bootstrap replicates."""
    tail = (1 - level) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def _resamples(num_requests: int, num_resamples: int, seed: int) -> Iterator[FloatArray]:
    """Multiplicities [<= _CHUNK, N] of the requests in bootstrap resamples, chunk by chunk."""
    rng = np.random.default_rng(seed)
    for start in range(0, num_resamples, _CHUNK):
        size = min(_CHUNK, num_resamples - start)
        draws = rng.integers(num_requests, size=(size, num_requests))
        offset = np.arange(size)[:, None] * num_requests
        counts = np.bincount((draws + offset).ravel(), minlength=size * num_requests)
        yield counts.reshape(size, num_requests).astype(float)


def _ranks(values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=float)
    # rankdata puts NaN last in some SciPy versions; an undefined input must give an undefined
    # answer.
    return np.full(array.shape, np.nan) if np.isnan(array).any() else np.asarray(rankdata(array))


def _pearson(x: FloatArray, y: FloatArray) -> float:
    centred_x, centred_y = x - x.mean(), y - y.mean()
    scale = np.sqrt((centred_x**2).sum() * (centred_y**2).sum())
    return float((centred_x * centred_y).sum() / scale) if scale > 0 else float("nan")
