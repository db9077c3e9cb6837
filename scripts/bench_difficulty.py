"""Does difficulty say, beyond length, where a lower tier loses? On real problems, over seeds.

    python scripts/bench_difficulty.py RUN [--seeds 4] [--first 10] [--out FILE]

Each seed trains the recipe problems (GSM8K's train file; SVAMP never trains the model) and keeps
problems for itself: a tenth of GSM8K and a fourth of SVAMP for the test, which the seed decides.
A head for each file learns from the checkpoint's outcomes on its other held-out problems, and one
head from those of both. Reported is the rank correlation of a head's difficulty with the nll gap
between each lower tier and the top tier on the test problems, with log prompt length held fixed,
and its t interval over seeds; beside it that of a ridge regression on TF-IDF, fitted to the base
tier's gap on the same outcomes. Twenty minutes a seed on one core; RUN keeps the runs: call again
to go on. `render_benchmarks.py` draws the figure.
"""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy.stats import t as student_t
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from transformers import AutoTokenizer

from dvpa.evaluate.metrics import partial_spearman, spearman
from dvpa.evaluate.replacing import write_atomically
from dvpa.evaluate.report import describe_environment
from dvpa.evaluate.table import OutcomeTable
from dvpa.model import DvpaForCausalLM
from dvpa.tasks import Task, TaskSet
from dvpa.tasks.encoding import encode_tasks, left_pad
from dvpa_train.config import Recipe, load_recipe
from dvpa_train.difficulty import train_head
from dvpa_train.examples import PARTS, make_source
from dvpa_train.growth import attach_head
from dvpa_train.main import run_recipe

RECIPE = "train/problems.yaml"
KINDS = {"gsm8k_train": "GSM8K", "svamp": "SVAMP"}
CURVE_GROUPS = 5
SVAMP_TEST = 0.25
MEASURED = "difficulty.json"  # of a seed, in its folder


def main() -> None:
    """Train what is missing, measure, write the JSON and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/difficulty.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [arguments.first + i for i in range(arguments.seeds)]
    rows = []
    for seed in seeds:
        recipe = load_recipe(RECIPE, [f"seed={seed}"])
        folder = arguments.run / f"seed-{seed}"
        if not (folder / "report.json").is_file():
            run_recipe(recipe, folder, Console(stderr=True))
        measured = folder / MEASURED
        if not measured.is_file():
            write_atomically(measured, json.dumps(of_seed(recipe, folder)))
        rows.append(json.loads(measured.read_text()))
        print(seed, json.dumps(rows[-1]), flush=True)
    result = {
        "command": f"python scripts/bench_difficulty.py RUN --seeds {len(seeds)}",
        "seeds": seeds,
        "tiers": [tier.name for tier in recipe.model_config().tiers],
        "head_problems": [row["head_problems"] for row in rows],
        "kinds": {
            kind: {"name": name, **over_seeds([row["kinds"][kind] for row in rows])}
            for kind, name in KINDS.items()
        },
        "environment": describe_environment(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def of_seed(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train a head on the outcomes of one run, and measure it on the problems kept for the test."""
    source = make_source(recipe)
    found = source.held_out(dict.fromkeys(PARTS, 10**6))
    tasks = {task.id: task for part in PARTS for task in found[part]}
    tables = [OutcomeTable.load(folder / "outcomes" / f"{part}.jsonl") for part in PARTS]
    table = joined(tables)
    is_test = np.array([i in set(tables[PARTS.index("test")].ids) for i in table.ids])
    kinds = np.array(table.kind)
    rng = np.random.default_rng(recipe.seed)
    is_test &= (kinds != "svamp") | (rng.random(len(kinds)) < SVAMP_TEST)
    seen, test = table.select(~is_test), table.select(is_test)
    model = DvpaForCausalLM.from_pretrained(folder / "checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")

    def scored(seen: OutcomeTable, test: OutcomeTable) -> tuple[OutcomeTable, np.ndarray]:
        """The test by a head that has learned from `seen`, and by its words."""
        known = TaskSet("head", tuple(tasks[i] for i in seen.ids))
        attach_head(model, model.config, recipe.seed)
        train_head(model, tokenizer, known, seen, recipe.difficulty, recipe.seed)
        asked = [tasks[i] for i in test.ids]
        test = replace(test, difficulty=difficulties(model, tokenizer, asked))
        return test, of_words(list(known), seen, asked)

    both, _ = scored(seen, test)
    kinds_found = {}
    for kind in KINDS:
        own, words = scored(of_kind(seen, kind), of_kind(test, kind))
        kinds_found[kind] = {
            **correlations(own, words),
            "partial_one_head": correlations(of_kind(both, kind), words)["partial"],
        }
    return {
        "head_problems": {kind: len(of_kind(seen, kind)) for kind in KINDS},
        "kinds": kinds_found,
    }


def of_kind(table: OutcomeTable, kind: str) -> OutcomeTable:
    """The rows of one file."""
    return table.select(np.array(table.kind) == kind)


def joined(tables: list[OutcomeTable]) -> OutcomeTable:
    """The rows of several tables."""
    columns = {
        field.name: [getattr(table, field.name) for table in tables]
        for field in fields(OutcomeTable)
        if isinstance(getattr(tables[0], field.name), np.ndarray)
    }
    lists = {
        name: [x for table in tables for x in getattr(table, name)] for name in ("ids", "kind")
    }
    return replace(
        tables[0], **lists, **{name: np.concatenate(parts) for name, parts in columns.items()}
    )


@torch.inference_mode()
def difficulties(model: DvpaForCausalLM, tokenizer: Any, tasks: list[Task]) -> np.ndarray:
    """The head's z [N], which difficulty is a monotone map of."""
    prompts = [prompt for prompt, _ in encode_tasks(tokenizer, tasks)]
    found = []
    for start in range(0, len(prompts), 64):
        ids, mask = left_pad(prompts[start : start + 64], pad_id=0)
        head = model.score(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        found.append(head.z.double().numpy())
    return np.concatenate(found)


def of_words(known: list[Task], seen: OutcomeTable, asked: list[Task]) -> np.ndarray:
    """The base tier's gap [N] as predicted from the words."""
    model = make_pipeline(
        TfidfVectorizer(min_df=3, sublinear_tf=True, ngram_range=(1, 2)),
        RidgeCV(np.logspace(-1, 3, 9)),
    )
    model.fit([task.question for task in known], seen.nll[:, 0] - seen.nll[:, -1])
    return np.asarray(model.predict([task.question for task in asked]))


def correlations(rows: OutcomeTable, by_words: np.ndarray) -> dict[str, Any]:
    """Correlations with the gap of each lower tier, and the base tier's gap by fifths."""
    length = np.log(rows.prompt_tokens)
    gaps = rows.nll[:, :-1] - rows.nll[:, -1:]
    order = np.argsort(residual(rows.difficulty, length), kind="stable")
    return {
        "requests": len(rows),
        "gap": gaps.mean(axis=0).tolist(),
        "partial": [partial_spearman(rows.difficulty, gap, length) for gap in gaps.T],
        "spearman": [spearman(rows.difficulty, gap) for gap in gaps.T],
        "length": [spearman(length, gap) for gap in gaps.T],
        "words": [partial_spearman(by_words, gap, length) for gap in gaps.T],
        "difficulty_and_length": spearman(rows.difficulty, length),
        "base_gap_by_fifth": [
            float(gaps[part, 0].mean()) for part in np.array_split(order, CURVE_GROUPS)
        ],
    }


def residual(difficulty: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Ranks of difficulty without what ranks of length explain."""
    x, y = (np.argsort(np.argsort(values)).astype(float) for values in (length, difficulty))
    slope = np.cov(x, y)[0, 1] / np.var(x, ddof=1)
    return np.asarray(y - slope * x)


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, each seed's values, and 95 % t intervals over the seeds."""
    found: dict[str, Any] = {"requests": [row["requests"] for row in rows]}
    for key in (
        "gap",
        "partial",
        "partial_one_head",
        "spearman",
        "length",
        "words",
        "base_gap_by_fifth",
    ):
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
