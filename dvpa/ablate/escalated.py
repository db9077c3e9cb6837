"""What escalation while decoding adds to a tier map: the engine answers a study's test requests.

The base tier reads the prompts, as in the tables of outcomes. What a request costs is what the
engine counts: scoring, rows computed twice and abandoned tokens included.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dvpa.ablate.models import TEST_TASKS, MeasuredModel
from dvpa.engine import Engine, EscalationParams, SamplingParams
from dvpa.tasks import TaskSet, verify
from dvpa.tiers.tier_map import TierMap

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

EXTRA_TOKENS = 2  # that a wrong answer may take beyond the longest right one
BATCH = 128


@dataclass(frozen=True, eq=False)
class Escalated:
    """By test request [N]: quality, activated parameters, the last tier, how often it went up.

    `cost` is so scaled that its mean over requests is the mean over tokens, the reference's.
    """

    quality: FloatArray
    cost: FloatArray
    tiers: IntArray
    times: IntArray


def answer_escalating(
    folder: Path, model: MeasuredModel, tier_map: TierMap, params: EscalationParams
) -> Escalated:
    """Answer the test requests of a finished point, greedily, from the map's tiers on.

    Raises:
        ValueError: the point was trained before its questions were kept.
    """
    path = folder / TEST_TASKS
    if not path.is_file():
        raise ValueError(f"escalation: {path}: missing; remove the folder to train it again")
    # Compared as text, as in the tables of outcomes.
    by_id = {task.id: task for task in TaskSet.from_jsonl(path, numeric=False)}
    test = model.parts["test"]
    tasks = [by_id[key] for key in test.ids]
    engine = Engine(
        folder / "checkpoint",
        dtype="float32",
        read_prompt="base",
        escalation=params,
        max_num_seqs=BATCH,
        max_num_batched_tokens=16 * BATCH,
        allow_degradation=False,
    )
    engine.set_tier_map(tier_map)
    longest = int(test.completion_tokens.max()) + EXTRA_TOKENS
    outputs = engine.generate(
        [task.question for task in tasks], SamplingParams(temperature=0.0, max_tokens=longest)
    )
    records = [output.telemetry for output in outputs]
    tokens = (test.prompt_tokens - 1 + test.completion_tokens[:, 0]).mean()
    pairs = zip(tasks, outputs, strict=True)
    return Escalated(
        quality=np.array([verify(task, output.text) for task, output in pairs]),
        cost=np.array([record.flops for record in records]) / 2 / tokens,
        tiers=np.array([record.tier for record in records], dtype=np.int64),
        times=np.array([record.escalations for record in records], dtype=np.int64),
    )
