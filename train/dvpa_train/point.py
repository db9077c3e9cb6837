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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import AutoTokenizer

from dvpa.ablate.models import DONE, HELD_OUT, SPEC, TEST_TASKS
from dvpa.ablate.study import digest
from dvpa.config import find_config, load_model_config, load_yaml
from dvpa.evaluate.baselines import Scores, quantile_scores, question_scores
from dvpa.evaluate.outcomes import collect_entropy
from dvpa.evaluate.replacing import write_atomically
from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price
from dvpa.tasks import TaskSet
from dvpa_train.config import Recipe, apply_override, load_recipe
from dvpa_train.demo import head_overhead
from dvpa_train.examples import PARTS, make_source
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


def resolve(
    recipe: str, overrides: list[str], model: Mapping[str, Any], seed: int, is_text: bool = False
) -> Resolved:
    """A point from a recipe's name, `key=value` overrides, and keys of the model it names.

    Args:
        is_text: only the nll of held-out text is wanted, so the recipe ends with its stages.

    Raises:
        FileNotFoundError: the recipe or its model file does not exist.
        ValueError: the key that is unknown or out of range, or a recipe that does not fit: graded
            tasks and a calibration are needed, or with `is_text` files and no calibration.
    """
    changes = [*overrides, f"seed={seed}", *_ALWAYS]
    changed = _changed_model(recipe, changes, model) if model else None
    if changed is None:
        found = load_recipe(recipe, changes)
        config = found.model_config().to_dict()
    else:
        found, config = _load_changed(recipe, changes, changed, ", ".join(model))
    if is_text and (found.data.graded is not None or found.calibration is not None):
        raise ValueError(f"{recipe}: kind architecture needs data.files and calibration: null")
    if not is_text and (found.data.graded is None or found.calibration is None):
        raise ValueError(f"{recipe}: an ablation needs data.graded and a calibration")
    content = asdict(found)
    for name in (*_FREE, *_FREE_TOO):
        del content[name]
    if found.calibration is not None:
        content["calibration"] = {"items": found.calibration.items}
    config.pop("transformers_version", None)
    key = digest({"version": POINT_VERSION, "recipe": content, "model": config})
    steps = sum(stage.steps for stage in found.stages)
    spec = {"recipe": recipe, "overrides": changes, "seed": seed}
    return Resolved(key, steps, spec, changed, [tier["name"] for tier in config["tiers"]])


def _changed_model(recipe: str, changes: Sequence[str], model: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the model file that the recipe names, with some keys set."""
    raw = load_yaml(find_config(recipe))
    for change in changes:
        apply_override(raw, change)
    name = raw.get("model")
    if not isinstance(name, str):
        raise ValueError(f"{recipe}: names no model file whose keys could change")
    content = load_yaml(find_config(name))
    for key, value in model.items():
        apply_override(content, f"{key}={json.dumps(value)}")
    return content


def _load_changed(
    recipe: str, changes: Sequence[str], content: Mapping[str, Any], shown: str
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with a model file's content in place of its own, and that model's configuration.

    ValueError where there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        try:
            found = load_recipe(recipe, [*changes, f"model={json.dumps(str(path))}"])
            return found, dict(load_model_config(path).to_dict())
        except ValueError as error:
            text = str(error).replace(str(path), MODEL)
            raise ValueError(f"with {shown} of the model changed: {text}") from None


def train_point(folder: Path) -> None:
    """Train, collect the outcomes, and write `point.json`; nothing to do where it is there."""
    if (folder / DONE).is_file():
        return
    spec = json.loads((folder / SPEC).read_text())
    began = time.perf_counter()
    recipe = load_recipe(spec["recipe"], spec["overrides"])
    trained = run_recipe(recipe, folder, Console(stderr=True))
    if trained is None:
        content = _text(recipe, folder)
    else:
        trained.tasks["test"].to_jsonl(folder / TEST_TASKS)
        content = _routed(trained, spec["seed"])
    content["seed"] = spec["seed"]
    content["seconds"] = time.perf_counter() - began  # of the last start
    write_atomically(folder / DONE, json.dumps(content))


def _routed(trained: TrainedRun, seed: int) -> dict[str, Any]:
    """What maps are measured with."""
    cost = price(trained.model.config)
    return {
        "tier_names": list(trained.model.config.tier_names),
        "whole_costs": [float(tier.activated_params) for tier in cost.tiers],
        "total_params": cost.total_params,
        "overhead": head_overhead(trained),
        "scores": {name: _plain(scores) for name, scores in _scores(trained, seed).items()},
        "stages": [stage.__dict__ for stage in trained.stages],
        "training_flops": float(sum(stage.training_flops for stage in trained.stages)),
    }


def _text(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The nll of every held-out passage at every tier, into `outcomes/held_out.jsonl`."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    model = DvpaForCausalLM.from_pretrained(folder / "checkpoint").eval()
    source = make_source(recipe)
    parts = source.held_out(dict.fromkeys(PARTS, sys.maxsize))
    tasks = TaskSet("held_out", tuple(task for part in PARTS for task in parts[part]))
    table = source.collect(model, tokenizer, tasks)
    table.save_jsonl(folder / "outcomes" / f"{HELD_OUT}.jsonl")
    stages = [
        json.loads((folder / "training_state" / f"{i}-{stage.name}" / "done.json").read_text())
        for i, stage in enumerate(recipe.stages)
    ]
    cost = price(model.config, context=recipe.data.max_length // 2)
    return {
        "tier_names": list(model.config.tier_names),
        "whole_costs": [float(tier.activated_params) for tier in cost.tiers],
        "flops_per_token": [float(tier.flops_per_token) for tier in cost.tiers],
        "total_params": cost.total_params - cost.head_params,
        "stages": stages,
        "training_flops": float(sum(stage["training_flops"] for stage in stages)),
    }


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
