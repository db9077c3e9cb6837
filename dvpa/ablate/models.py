"""What a finished training point left, read back: outcomes, prices, rival routers' scores.

A point's folder is a training run's, with `spec.json` (what to train) and `point.json` (that it is
done, and what the tables do not hold).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dvpa.evaluate.baselines import Scores
from dvpa.evaluate.calibration import request_costs
from dvpa.evaluate.table import OutcomeTable

FloatArray = npt.NDArray[np.float64]

SPEC, DONE = "spec.json", "point.json"
HELD_OUT = "held_out"  # of a point without tier maps: its only table of outcomes
TEST_TASKS = "test_tasks.jsonl"  # for what the engine answers anew
PARTS = ("fit", "calibrate", "test")


@dataclass(frozen=True, eq=False)
class MeasuredModel:
    """A trained model's outcomes; N requests of a part, T tiers.

    In `parts` the base tier reads the prompt up to its last token, as for routed requests; in
    `whole`, of the test requests, the answering tier does. `overhead` [T]: activated parameters per
    token that scoring adds.
    """

    seed: int
    tier_names: list[str]
    whole_costs: list[float]
    overhead: FloatArray
    parts: dict[str, OutcomeTable]
    whole: OutcomeTable
    scores: dict[str, Scores]

    def costs(self, table: OutcomeTable) -> FloatArray:
        """Activated parameters of each request at each tier [N, T], without scoring.

        So scaled that the mean over requests is the mean over tokens.
        """
        return request_costs(table, self.whole_costs, "activated_params")

    def first(self, items: int) -> "MeasuredModel":
        """With only so many requests in the fit and the calibrate split."""
        parts = dict(self.parts)
        for name in ("fit", "calibrate"):
            if items > len(parts[name]):
                raise ValueError(f"items: {items} is more than the {len(parts[name])} of {name}")
            parts[name] = parts[name].select(np.arange(items))
        scores = {
            name: Scores(own.fit[:items], own.calibrate[:items], own.test)
            for name, own in self.scores.items()
        }
        return replace(self, parts=parts, scores=scores)


def load_model(folder: Path) -> MeasuredModel:
    """Read a finished point. OSError or ValueError where it is not one."""
    content = json.loads((folder / DONE).read_text())
    whole = [float(cost) for cost in content["whole_costs"]]
    tables = {part: OutcomeTable.load(folder / "outcomes" / f"{part}.jsonl") for part in PARTS}
    scores = {
        name: Scores(*(np.array(own[part], dtype=float) for part in PARTS))
        for name, own in content["scores"].items()
    }
    return MeasuredModel(
        seed=int(content["seed"]),
        tier_names=[str(name) for name in content["tier_names"]],
        whole_costs=whole,
        overhead=np.array(content["overhead"], dtype=float),
        parts={part: _read_by_base(table, whole) for part, table in tables.items()},
        whole=OutcomeTable.load(folder / "outcomes" / "test_whole.jsonl"),
        scores=scores,
    )


def _read_by_base(table: OutcomeTable, whole: Sequence[float]) -> OutcomeTable:
    """With the activated parameters of its requests filled in, a mean over their tokens [N, T].

    The base tier reads the prompt up to its last token; that token and the answer run at the tier.
    """
    read = (table.prompt_tokens - 1).astype(float)[:, None]
    answered = table.completion_tokens.astype(float)
    activated = (whole[0] * read + np.asarray(whole) * answered) / (read + answered)
    return replace(table, activated_params=activated)
