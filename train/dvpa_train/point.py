"""One training point of an ablation: a recipe with overrides, in a folder of its own.

`resolve` says what a point depends on, as a key, before anything runs. `python -m dvpa_train.point
FOLDER` trains what `FOLDER/spec.json` says, or goes on where a killed one stopped; `point.json`,
written last, says that the folder is complete.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dvpa.ablate.models import DONE, SPEC, write_atomically
from dvpa.ablate.study import digest
from dvpa.config import find_config, load_model_config, load_yaml
from dvpa.evaluate.baselines import Scores, quantile_scores, question_scores
from dvpa.evaluate.outcomes import collect_entropy
from dvpa.pricing import price
from dvpa_train.config import Recipe, apply_override, load_recipe
from dvpa_train.demo import head_overhead
from dvpa_train.main import TrainedRun, run_recipe
from dvpa_train.processes import end_with

POINT_VERSION = 1  # of what a finished folder holds
MODEL = "model.yaml"
# One thread each, beside others; the study has a log of its own.
_ALWAYS = ("threads=1", "loggers=[csv]", "wandb_mode=disabled")
# Keys that change neither the weights nor the outcomes.
_FREE = ("name", "model", "threads", "loggers", "log_every", "load_every", "wandb_mode")
_FREE_TOO = ("checkpoint_every", "keep_checkpoints")


@dataclass(frozen=True)
class Resolved:
    """A checked training point: its key, its number of steps, its files."""

    key: str
    steps: int
    spec: dict[str, Any]
    model: dict[str, Any] | None  # the model file with its changes; None: as the recipe names it
    tier_names: list[str]

    def write(self, folder: Path) -> None:
        """Make the folder ready for `train_point`."""
        folder.mkdir(parents=True, exist_ok=True)
        spec = dict(self.spec)
        if self.model is not None:
            write_atomically(folder / MODEL, yaml.safe_dump(self.model, sort_keys=False))
            spec["overrides"] = [*spec["overrides"], f"model={json.dumps(str(folder / MODEL))}"]
        write_atomically(folder / SPEC, json.dumps(spec, indent=1))


def resolve(recipe: str, overrides: list[str], model: Mapping[str, Any], seed: int) -> Resolved:
    """A point from a recipe's name, `key=value` overrides, and keys of the model it names.

    Raises:
        FileNotFoundError: the recipe or its model file does not exist.
        ValueError: the key that is unknown or out of range, or a recipe without graded tasks or
            without a calibration.
    """
    changes = [*overrides, f"seed={seed}", *_ALWAYS]
    found = load_recipe(recipe, changes)
    if found.data.graded is None or found.calibration is None:
        raise ValueError(f"{recipe}: an ablation needs data.graded and a calibration")
    changed, config = None, found.model_config().to_dict()
    if model:
        changed = _changed_model(recipe, found, model)
        config = _check_model(recipe, changes, changed, f"{found.model} with {', '.join(model)}")
    content = asdict(found)
    for name in (*_FREE, *_FREE_TOO):
        del content[name]
    content["calibration"] = {"items": found.calibration.items}
    config.pop("transformers_version", None)
    key = digest({"version": POINT_VERSION, "recipe": content, "model": config})
    steps = sum(stage.steps for stage in found.stages)
    spec = {"recipe": recipe, "overrides": changes, "seed": seed}
    return Resolved(key, steps, spec, changed, [tier["name"] for tier in config["tiers"]])


def _changed_model(recipe: str, found: Recipe, model: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the recipe's model file with some keys set."""
    if found.model is None:
        raise ValueError(f"{recipe}: names no model file whose keys could change")
    content = load_yaml(find_config(found.model))
    for key, value in model.items():
        apply_override(content, f"{key}={json.dumps(value)}")
    return content


def _check_model(
    recipe: str, changes: list[str], content: Mapping[str, Any], shown: str
) -> dict[str, Any]:
    """The configuration that a model file's content gives with the recipe; ValueError if none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        try:
            load_recipe(recipe, [*changes, f"model={json.dumps(str(path))}"])
            return dict(load_model_config(path).to_dict())
        except ValueError as error:
            raise ValueError(f"{shown}: {str(error).replace(str(path), MODEL)}") from None


def train_point(folder: Path) -> None:
    """Train, collect the outcomes, and write `point.json`; nothing to do where it is there."""
    if (folder / DONE).is_file():
        return
    spec = json.loads((folder / SPEC).read_text())
    began = time.perf_counter()
    recipe = load_recipe(spec["recipe"], spec["overrides"])
    trained = run_recipe(recipe, folder, Console(stderr=True))
    assert trained is not None, "a point is one process and has a calibration"
    cost = price(trained.model.config)
    content = {
        "seed": spec["seed"],
        "tier_names": list(trained.model.config.tier_names),
        "whole_costs": [float(tier.activated_params) for tier in cost.tiers],
        "total_params": cost.total_params,
        "overhead": head_overhead(trained),
        "scores": {name: _plain(scores) for name, scores in _scores(trained, spec["seed"]).items()},
        "stages": [stage.__dict__ for stage in trained.stages],
        "training_flops": float(sum(stage.training_flops for stage in trained.stages)),
        "seconds": time.perf_counter() - began,  # of the last start
    }
    write_atomically(folder / DONE, json.dumps(content))


def _scores(trained: TrainedRun, seed: int) -> dict[str, Scores]:
    """What rival routers see: they need the questions or the model, which tables do not hold."""
    parts = ("fit", "calibrate", "test")
    tables = [trained.outcomes[part] for part in parts]
    signals = []
    for part, table in zip(parts, tables, strict=True):
        tasks = {task.id: task for task in trained.tasks[part]}
        rows = [tasks[key] for key in table.ids]
        signals.append(collect_entropy(trained.model, trained.tokenizer, rows))
    found = {"entropy": quantile_scores(signals[0], signals[1], signals[2])}
    questions = {task.id: task.question for part in parts for task in trained.tasks[part]}
    tfidf = question_scores(tables[0], tables[1], tables[2], questions, seed)
    return found if tfidf is None else {"tfidf": tfidf, **found}


def _plain(scores: Scores) -> dict[str, list[float]]:
    return {name: getattr(scores, name).tolist() for name in ("fit", "calibrate", "test")}


def main(folder: str) -> int:
    """The program: exit code 0, or 2 with one line for a recipe that cannot be run."""
    end_with(os.getppid())
    try:
        train_point(Path(folder))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"dvpa-train: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
