"""A small study, and a model whose outcomes are drawn instead of trained."""

from functools import cache
from typing import Any

import numpy as np

from dvpa.ablate.models import MeasuredModel
from dvpa.evaluate.baselines import Scores
from dvpa.evaluate.table import OutcomeTable

NAMES = ["base", "middle", "top"]
WHOLE = [100.0, 200.0, 400.0]


def study_of(**changes: Any) -> dict[str, Any]:
    """The content of a small study."""
    content = {
        "recipe": "train/pico.yaml",
        "recipes": [{"name": "default"}, {"name": "other", "set": {"stages.joint.steps": 8}}],
        "maps": [{"name": "gain", "budget": "60%"}, {"name": "dear", "budget": "80%"}],
    }
    return content | changes


def table_of(size: int, seed: int, part: str) -> OutcomeTable:
    """Kind `graded`: harder requests need higher tiers; `flat`: no tier makes a difference."""
    rng = np.random.default_rng(seed)
    hard = rng.uniform(0, 1, size)
    is_graded = rng.uniform(0, 1, size) < 0.7
    needed = np.searchsorted([0.5, 0.7, 0.85], hard + rng.normal(0, 0.05, size))  # 3: none does
    quality = (np.arange(3) >= needed[:, None]).astype(float)
    quality[~is_graded] = (rng.uniform(0, 1, (int((~is_graded).sum()), 1)) < 0.5).astype(float)
    hard[~is_graded] = rng.uniform(0, 1, int((~is_graded).sum()))
    prompts = rng.integers(5, 20, size)
    answers = np.repeat(rng.integers(2, 5, size)[:, None], 3, axis=1)
    return OutcomeTable(
        ids=[f"{part}-{i}" for i in range(size)],
        level=np.minimum(needed, 2),
        kind=["graded" if graded else "flat" for graded in is_graded],
        prompt_tokens=prompts,
        quality=quality,
        nll=1 - quality,
        difficulty=hard,
        completion_tokens=answers,
        uncertainty=rng.uniform(0, 1, size),
        activated_params=np.tile([100.0, 150.0, 250.0], (size, 1)),
    )


@cache
def model(seed: int = 0) -> MeasuredModel:
    """A model whose difficulties mean something; its entropies mean nothing."""
    parts = {
        part: table_of(600, 10 * seed + i, part) for i, part in enumerate(("fit", "calibrate"))
    }
    parts["test"] = table_of(1000, 10 * seed + 5, "test")
    rng = np.random.default_rng(seed)
    noise = Scores(*(rng.uniform(0, 1, len(parts[p])) for p in ("fit", "calibrate", "test")))
    return MeasuredModel(
        seed, NAMES, WHOLE, np.array([1.0, 3.0, 3.0]), parts, parts["test"], {"entropy": noise}
    )
