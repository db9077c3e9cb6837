"""How evenly the experts of a trained point were used, from its training log.

The log holds the rows that every expert got in the last stage, by layer and tier
(`logs/load/step-*.csv`; the last step's file is the last stage's), and every few steps the MaxVio
of that step's rows (`logs/metrics.csv`).
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np


def read_load(folder: Path) -> dict[str, dict[str, Any]]:
    """By tier name, the rows counted in the last stage; {} for a point without a log of them.

    `max_violation`: max / mean - 1 over the experts of a layer's pool, a mean over layers (MaxVio,
    arXiv 2408.15664); `worst_layer`: the largest of them; `dead_experts`: those without a row, of
    all layers; `experts`: of all layers; `sorted`: load / mean of the pool from the busiest expert
    to the idlest, a mean over layers [experts of a layer]; `group_share`: of the rows, by group.
    `steps`, `violation`: MaxVio along the training, from the step where the tier joined.
    """
    files = sorted((folder / "logs" / "load").glob("step-*.csv"))
    if not files:
        return {}
    rows: dict[str, dict[str, list[int]]] = {}
    groups: dict[str, dict[int, int]] = {}
    with files[-1].open(newline="") as file:
        for line in csv.DictReader(file):
            count, tier = int(line["rows"]), line["tier"]
            rows.setdefault(tier, {}).setdefault(line["layer"], []).append(count)
            of_tier = groups.setdefault(tier, {})
            group = int(line["group"])
            of_tier[group] = of_tier.get(group, 0) + count
    course = _course(folder / "logs" / "metrics.csv", list(rows))
    found = {}
    for tier, layers in rows.items():
        load = np.array(list(layers.values()), dtype=float)  # [layers, experts]
        load = load[load.sum(axis=1) > 0]
        if not len(load):
            continue  # a stage that this tier took no part in
        relative = np.sort(load / load.mean(axis=1, keepdims=True), axis=1)[:, ::-1]
        total = sum(groups[tier].values())
        found[tier] = {
            "max_violation": float((relative[:, 0] - 1.0).mean()),
            "worst_layer": float((relative[:, 0] - 1.0).max()),
            "dead_experts": int((load == 0).sum()),
            "experts": int(load.size),
            "sorted": [round(float(value), 4) for value in relative.mean(axis=0)],
            "group_share": [round(count / total, 5) for _, count in sorted(groups[tier].items())],
            "steps": [step for step, _ in course[tier]],
            "violation": [value for _, value in course[tier]],
        }
    return found


def _course(path: Path, tiers: list[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, MaxVio) of the log's lines that have one."""
    found: dict[str, list[tuple[int, float]]] = {tier: [] for tier in tiers}
    if not path.is_file():
        return found
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            for tier in tiers:
                value = line.get(f"balance/max_violation/{tier}")
                if value:
                    found[tier].append((int(line["step"]), round(float(value), 4)))
    return found
