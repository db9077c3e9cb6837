"""Does difficulty say, beyond length, where a lower tier loses? On real problems, over seeds.

    python scripts/bench_difficulty.py RUN [--seeds 5] [--first 10] [--out FILE]

Each seed trains a small model (the recipe words, shortened, on GSM8K's train file alone) with its
own held-out problems; SVAMP is never trained on. Reported is the rank correlation of the head's
difficulty with the nll gap between each lower tier and the top tier on held-out problems, with log
prompt length held fixed, and its t interval over seeds. RUN keeps the runs: call again to go on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import t as student_t

from dvpa.evaluate.metrics import partial_spearman, spearman
from dvpa.evaluate.report import describe_environment
from dvpa.evaluate.table import OutcomeTable
from dvpa_train.config import load_recipe
from dvpa_train.main import run_recipe

RECIPE = "train/words.yaml"
FILES = (
    "[{path: ../shared/data/gsm8k_train.jsonl, format: gsm8k},"
    " {path: ../shared/data/svamp.json, format: svamp, evaluation_only: true}]"
)
STEPS = {"foundation": 70, "grow-small": 12, "grow-medium": 12, "grow-top": 12, "joint": 110}
SETTINGS = (
    f"data.files={FILES}",
    *(f"stages.{name}.steps={steps}" for name, steps in STEPS.items()),
    "calibration.items=2000",  # all held-out problems
    "wandb_mode=disabled",
)
KINDS = {"gsm8k_train": "GSM8K, held out", "svamp": "SVAMP"}
CURVE_GROUPS = 5


def main() -> None:
    """Train what is missing, measure, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/difficulty.json"))
    arguments = parser.parse_args()
    seeds = [arguments.first + i for i in range(arguments.seeds)]
    tables = []
    for seed in seeds:
        recipe = load_recipe(RECIPE, [f"seed={seed}", *SETTINGS, *arguments.set])
        folder = arguments.run / f"seed-{seed}"
        path = folder / "outcomes" / "test.jsonl"
        if not path.is_file():
            run_recipe(recipe, folder, Console(stderr=True))
        tables.append(OutcomeTable.load(path))
        print(seed, json.dumps(of_seed(tables[-1])), flush=True)
    names = [tier.name for tier in recipe.model_config().tiers]
    result = {
        "command": f"python scripts/bench_difficulty.py RUN --seeds {len(seeds)}",
        "seeds": seeds,
        "tiers": names,
        "steps": STEPS,
        "kinds": {
            kind: over_seeds([of_seed(table)[kind] for table in tables])
            for kind in KINDS
            if all(kind in of_seed(table) for table in tables)
        },
        "environment": describe_environment(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def of_seed(table: OutcomeTable) -> dict[str, dict[str, Any]]:
    """Per kind of problem: correlations with the gap of each lower tier, and the gap by fifths."""
    found = {}
    for kind in KINDS:
        rows = table.select(np.array(table.kind) == kind)
        if len(rows) < 10 * CURVE_GROUPS:
            continue
        length = np.log(rows.prompt_tokens)
        gaps = rows.nll[:, :-1] - rows.nll[:, -1:]
        order = np.argsort(residual(rows.difficulty, length), kind="stable")
        found[kind] = {
            "requests": len(rows),
            "gap": gaps.mean(axis=0).tolist(),
            "partial": [partial_spearman(rows.difficulty, gap, length) for gap in gaps.T],
            "spearman": [spearman(rows.difficulty, gap) for gap in gaps.T],
            "length": [spearman(length, gap) for gap in gaps.T],
            "difficulty_and_length": spearman(rows.difficulty, length),
            "base_gap_by_fifth": [
                float(gaps[part, 0].mean()) for part in np.array_split(order, CURVE_GROUPS)
            ],
        }
    return found


def residual(difficulty: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Ranks of difficulty without what ranks of length explain."""
    x, y = (np.argsort(np.argsort(values)).astype(float) for values in (length, difficulty))
    slope = np.cov(x, y)[0, 1] / np.var(x, ddof=1)
    return np.asarray(y - slope * x)


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, each seed's values, and 95 % t intervals over the seeds."""
    found: dict[str, Any] = {"requests": [row["requests"] for row in rows]}
    for key in ("gap", "partial", "spearman", "length", "base_gap_by_fifth"):
        values = np.array([row[key] for row in rows])
        half = student_t.ppf(0.975, len(rows) - 1) * values.std(axis=0, ddof=1) / len(rows) ** 0.5
        mean = values.mean(axis=0)
        found[key] = {
            "mean": mean.tolist(),
            "ci95": np.stack([mean - half, mean + half], axis=1).tolist(),
            "per_seed": values.tolist(),
        }
    found["difficulty_and_length"] = [row["difficulty_and_length"] for row in rows]
    return found


if __name__ == "__main__":
    main()
