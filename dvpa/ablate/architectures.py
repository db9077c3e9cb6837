"""Comparing architectures by the nll of held-out text, at equal tokens.

Every variant is trained from the same data in the same order, and scores the second half of the
same held-out passages, given the first. N passages, T tiers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dvpa.ablate.models import DONE, HELD_OUT
from dvpa.ablate.run import MODELS, Points
from dvpa.ablate.study import Study
from dvpa.ablate.summary import paired, spread
from dvpa.evaluate.report import describe_environment, finite
from dvpa.evaluate.table import OutcomeTable

FloatArray = npt.NDArray[np.float64]


def compare(study: Study, out: Path, points: Points) -> dict[str, Any]:
    """The results of a finished study: a row per architecture and tier, in plain JSON values.

    `nll`: nats per token, spread over seeds. `flops_per_token`: forward, half of the longest
    example in the cache. `training_flops` are the whole model's, all of its tiers together.
    `minus_reference`: nll minus that of the reference's top tier, passage by passage and seed by
    seed, weighed by tokens.

    Raises:
        ValueError: two architectures were not scored on the same passages.
    """
    tables = {
        place: OutcomeTable.load(out / MODELS / point.key / "outcomes" / f"{HELD_OUT}.jsonl")
        for place, point in points.items()
    }
    nlls = {place: _per_token(table) for place, table in tables.items()}
    rows = []
    for variant in study.architectures:
        done = [
            json.loads((out / MODELS / points[variant.name, seed].key / DONE).read_text())
            for seed in study.seeds
        ]
        first = done[0]
        for tier, name in enumerate(first["tier_names"]):
            own = [nlls[variant.name, seed][:, tier] for seed in study.seeds]
            is_nested = len(first["tier_names"]) > 1
            row = {
                "name": variant.name,
                "tier": name,
                "label": f"{variant.name}, {name}" if is_nested else variant.name,
                "note": variant.note,
                "total_params": first["total_params"],
                "activated_params": first["whole_costs"][tier],
                "flops_per_token": first["flops_per_token"][tier],
                "training_flops": float(np.mean([d["training_flops"] for d in done])),
                "training_tokens": float(
                    np.mean([sum(stage["tokens"] for stage in d["stages"]) for d in done])
                ),
                "training_seconds": float(
                    np.mean([sum(stage["seconds"] for stage in d["stages"]) for d in done])
                ),
                "nll": spread([float(nll.mean()) for nll in own]),
            }  # fmt: skip
            if variant.name != study.reference:
                differences = []
                for seed, nll in zip(study.seeds, own, strict=True):
                    pair = tables[variant.name, seed].ids, tables[study.reference, seed].ids
                    if pair[0] != pair[1]:
                        raise ValueError(
                            f"recipes: {variant.name}: scored on other passages than "
                            f"{study.reference}, so it must not change the data"
                        )
                    differences.append(nll - nlls[study.reference, seed][:, -1])
                row["minus_reference"] = paired(differences, study.resamples)
            rows.append(row)
    table = tables[study.architectures[0].name, study.seeds[0]]
    return finite(
        {
            "title": f"Ablation {study.name}",
            "kind": "architecture",
            "study": {
                "name": study.name,
                "recipe": study.recipe,
                "resamples": study.resamples,
                "workers": study.workers,
            },
            "seeds": list(study.seeds),
            "reference": study.reference,
            "passages": len(table),
            "scored_tokens": int(table.completion_tokens[:, 0].sum()),
            "architectures": rows,
            "environment": describe_environment(),
        }
    )


def _per_token(table: OutcomeTable) -> FloatArray:
    """nll [N, T], weighed so that the mean over passages is the mean over tokens."""
    tokens = table.completion_tokens.astype(float)
    return np.asarray(table.nll * tokens / tokens.mean(axis=0))
