"""Logged runs, for tests: watch what is computed, read back what each logger wrote."""

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

from dvpa_train import main, stages
from dvpa_train.balance import LoadBalancer
from dvpa_train.config import load_recipe
from dvpa_train.module import TierModule

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
NEEDS_TENSORBOARD = pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")
LOGGERS = ["csv", "wandb", *(["tensorboard"] if HAS_TENSORBOARD else [])]
SHORT = [
    *(f"stages.{name}.steps={steps}" for name, steps in (("foundation", 5), ("grow", 4))),
    "stages.joint.steps=7", f"loggers=[{', '.join(LOGGERS)}]", "log_every=2", "checkpoint_every=3",
    "difficulty.steps=2",
]  # fmt: skip
FIRST_STEPS = {"foundation": 0, "grow": 5, "joint": 9}
LOGGED = [2, 4, 5, 7, 9, 11, 13, 15, 16]
# What depends on the clock and the machine.
MEASURED = {"tokens_per_second", "mfu", "peak_flops"}


class Seen:
    """Of every step of a run: its numbers, its counters, its learning rate and its routing."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Any]] = {}
        self.routed: list[tuple[list[list[int]], list[int]]] = []  # of the step that is running


class Interrupted(RuntimeError):
    """The run fails here, as asked."""


class EndOfTraining(Exception):
    """The stages are done."""


@contextmanager
def watched(fail_at: int = -1, stop_at: int = -1, only_stages: bool = True) -> Iterator[Seen]:
    """Take note of every step; fail in, or ask for a stop during, the step after that many."""
    seen = Seen()

    class Watched(TierModule):
        def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
            place = FIRST_STEPS[self.stage.name] + self.global_step
            if place == fail_at:
                raise Interrupted
            self.stop_wanted = place == stop_at
            return super().training_step(batch, batch_index)

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            place = FIRST_STEPS[self.stage.name] + self.global_step + 1
            super().optimizer_step(*args, **kwargs)
            seen.steps[place] = {
                "stage": self.stage.name, "latest": dict(self.latest), "lr": rate,
                "tokens": self.tokens_seen, "seconds": self.seconds,
                "flops": self.training_flops, "routed": seen.routed,
                "experts": self.model.config.n_routed_experts,
            }  # fmt: skip
            seen.routed = []

    def observe(balancer: LoadBalancer, routing: Sequence[Any]) -> None:
        seen.routed += [(r.topk_index.tolist(), r.tiers.tolist()) for r in routing]
        original(balancer, routing)

    def stop(*args: Any) -> Any:
        raise EndOfTraining

    original = LoadBalancer.observe
    with mock.patch.object(stages, "TierModule", Watched), \
            mock.patch.object(LoadBalancer, "observe", observe), \
            mock.patch.object(main, "_score_and_calibrate",
                              stop if only_stages else main._score_and_calibrate):  # fmt: skip
        yield seen


def train(out: Path, *overrides: str) -> Any:
    """Run or resume pico, cut short."""
    recipe = load_recipe("train/pico.yaml", [*SHORT, *overrides])
    return main.run_recipe(recipe, out, Console(quiet=True))


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def metrics(out: Path) -> list[dict[str, str]]:
    """The rows of a run's record."""
    return csv_rows(out / "logs" / "metrics.csv")


def numbers(row: dict[str, str]) -> dict[str, float]:
    """What a row says in numbers."""
    return {name: float(value) for name, value in row.items() if value and name != "stage_name"}


def lasting(row: dict[str, str]) -> dict[str, str]:
    """What must be the same in every run of the recipe."""
    return {n: v for n, v in row.items() if n not in MEASURED and not n.startswith("memory/")}


def events(out: Path) -> Any:
    """A run's event files, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = dict.fromkeys(("scalars", "images", "tensors"), 0)  # all of them
    found = EventAccumulator(str(out / "logs" / "tensorboard"), size_guidance=sizes)
    found.Reload()
    return found


def wandb_runs(out: Path) -> list[Path]:
    """W&B's folders, oldest first."""
    return sorted((out / "wandb").glob("offline-run-*"))


@cache
def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """The records of one start that has ended, read by W&B itself."""
    (file,) = folder.glob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No such command" in done.stderr:
        pytest.skip("this wandb cannot read its own files")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def wandb_history(folder: Path) -> dict[int, dict[str, Any]]:
    """What was logged at each step."""
    history = [r["history"] for r in wandb_records(folder) if r["type"] == "history"]
    steps = [int(item["step"]["num"]) for item in history]
    assert len(set(steps)) == len(steps), "a step was logged twice"
    return dict(zip(steps, (item["item"] for item in history), strict=True))
