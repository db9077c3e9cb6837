"""Requests whose chances are known: easy and graded ones, and hopeless ones no tier can answer."""

from dataclasses import dataclass

import numpy as np

from dvpa.evaluate.table import OutcomeTable
from dvpa.tiers.budget import Split

NAMES, COSTS = ("base", "middle", "top"), (1e5, 2.2e5, 5e5)
ABILITY = np.array([0.35, 0.55, 0.75])  # of the tiers, on the scale of difficulty
HOPELESS_SHARE, HOPELESS_SUCCESS = 0.25, 0.02


@dataclass(frozen=True)
class Requests:
    """Their outcomes, each one's chance at each tier [N, T], and who is hopeless [N]."""

    split: Split
    chance: np.ndarray
    is_hopeless: np.ndarray


def draw(seed: int, size: int, hopeless: float = HOPELESS_SHARE, hard: float = 1.0) -> Requests:
    """Requests of one seed; `hard` above 1 shifts the graded ones up."""
    rng = np.random.default_rng(seed)
    is_hopeless = rng.random(size) < hopeless
    d = np.where(is_hopeless, rng.beta(12, 1.5, size), rng.beta(hard, 1.6, size))
    graded = 1.0 / (1.0 + np.exp(-14.0 * (ABILITY - d[:, None])))
    chance = np.where(is_hopeless[:, None], HOPELESS_SUCCESS, graded)
    # One draw for all tiers: what a tier can do, those above it can.
    quality = (rng.random((size, 1)) < chance).astype(float)
    return Requests(Split(d, quality), chance, is_hopeless)


def table(seed: int, size: int, hard: float = 1.0) -> OutcomeTable:
    """The same as an outcome table; harder requests are longer, higher tiers take more time."""
    requests = draw(seed, size, hard=hard)
    split, rng = requests.split, np.random.default_rng(seed + 1)
    prompt = 5 + np.round(20 * split.difficulty + rng.integers(0, 9, size)).astype(np.int64)
    completion = np.tile(rng.integers(2, 7, (size, 1)), (1, 3))
    tokens = prompt[:, None] + completion - 1
    scoring = 0.1 * COSTS[0] * prompt[:, None]
    return OutcomeTable(
        ids=[f"{seed}-{row}" for row in range(size)],
        level=requests.is_hopeless.astype(np.int64),
        kind=["hopeless" if hopeless else "graded" for hopeless in requests.is_hopeless],
        prompt_tokens=prompt,
        quality=split.quality,
        nll=-np.log(np.clip(requests.chance, 1e-3, 1.0)),
        difficulty=split.difficulty,
        completion_tokens=completion,
        activated_params=np.tile(COSTS, (size, 1)),
        flops=2.0 * (np.asarray(COSTS) * tokens + scoring),
        ms=tokens * np.array([1.0, 1.3, 1.9]) * rng.lognormal(0.0, 0.2, (size, 1)),
    )
