"""One process of a training run, for tests: trains a recipe's stages and writes down every step.

    torchrun ... tests/train_worker.py OUT RECIPE [key=value ...]

`OUT.steps.jsonl`: a line per step (stage, step, loss, gradient norm) and start; `OUT.STAGE.pt`: the
gradients of the stage's first steps. DVPA_TEST_KILL=RANK:STAGE/STEP kills that process with SIGKILL
before that step of the run, the first time it comes there. DVPA_TEST_STOP=STAGE/STEP asks for an
orderly stop.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from dvpa_train import main, stages
from dvpa_train.config import load_recipe
from dvpa_train.expert_parallel import STACKED, ShardedExperts
from dvpa_train.interrupts import Stopped
from dvpa_train.module import TierModule
from dvpa_train.origins import Resumed
from dvpa_train.sharding import whole
from dvpa_train.stages import Run
from dvpa_train.starts import Start

_start = Run._start
WATCHED_STEPS = (0, 3)


class Watched(TierModule):
    """Writes down what it does; takes no part in it."""

    out: Path
    expected: dict[str, torch.Tensor]  # what a single process starts the stage with

    def configure_model(self) -> None:
        """Together the slices are that model, and every rank holds its own of the experts."""
        super().configure_model()
        if self.origin is None or isinstance(self.origin, Resumed):
            return
        for name, tensor in self.model.state_dict().items():
            expected = self.expected[name]
            assert torch.equal(whole(tensor).reshape(expected.shape), expected), name
        for name, layer in self.model.named_modules():
            if isinstance(layer, ShardedExperts):
                for stacked in STACKED:
                    check_own_slice(layer, stacked, self.expected[f"{name}.{stacked}"])

    def training_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        """Die here, if told to."""
        kill, _, at = os.environ.get("DVPA_TEST_KILL", "").partition(":")
        done = self.out.with_suffix(".killed")
        here = f"{self.among.rank}:{self.stage.name}/{self.global_step}"
        if here == f"{kill}:{at}" and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("DVPA_TEST_STOP") == f"{self.stage.name}/{self.global_step}":
            self.stop_wanted = self.among.is_first  # one is told, all stop
        return super().training_step(batch, batch_index)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """The step's gradients are complete, and not yet clipped."""
        watched = self.global_step in WATCHED_STEPS and self.strategy.kind != "deepspeed"
        if watched:
            grads = {
                n: whole(p.grad).clone() for n, p in self.model.named_parameters() if _has_grad(p)
            }
        super().configure_gradient_clipping(*args, **kwargs)
        if not self.among.is_first or not self._is_last_micro:  # DeepSpeed comes here for each
            return
        if watched:
            torch.save(grads, f"{self.out}.{self.stage.name}.{self.global_step}.pt")
        row = [self.stage.name, self.global_step, self.latest["loss"].hex()]
        with Path(f"{self.out}.steps.jsonl").open("a") as file:
            file.write(json.dumps([*row, self.latest.get("gradient_norm", 0.0)]) + "\n")


def check_own_slice(layer: ShardedExperts, name: str, full: torch.Tensor) -> None:
    """Of [E, ...], this rank must hold exactly its experts of every group (inside: its part)."""
    tensor = getattr(layer, name)
    assert isinstance(tensor, DTensor)
    grouped = full.unflatten(0, (layer.num_groups, -1))
    part = layer.group_size // layer.num_ranks
    rank = torch.distributed.get_rank() % layer.num_ranks
    own = grouped[:, rank * part : (rank + 1) * part]
    local = tensor.to_local()
    replicas = torch.distributed.get_world_size() // layer.num_ranks
    replica = torch.distributed.get_rank() // layer.num_ranks
    assert any(
        torch.equal(local, own.chunk(replicas, axis)[replica])
        for axis in (2, 3)
        if own.shape[axis] % replicas == 0
    ), name


def _has_grad(parameter: torch.Tensor) -> bool:
    return parameter.grad is not None


def start_and_note(run: Run, index: int, previous: Any) -> Start:
    """A sharded start; the same stage's start of a single process is kept to compare."""
    start = _start(run, index, previous)
    if start.origin is not None:
        with torch.random.fork_rng():
            Watched.expected = run._whole_start(index, None).state_dict()
    return start


def run(out: Path, recipe: str, overrides: list[str]) -> None:
    """Train all stages; the model's head and tier map are left out."""
    Watched.out = out
    stages.TierModule = Watched  # type: ignore[misc]
    Run._start = start_and_note  # type: ignore[method-assign]
    main._score_and_calibrate = _stop_here  # type: ignore[assignment]
    with contextlib.suppress(EndOfTraining, Stopped):
        main.run_recipe(load_recipe(recipe, overrides), out, Console(quiet=True))


class EndOfTraining(Exception):
    """The stages are done."""


def _stop_here(*args: Any) -> Any:
    raise EndOfTraining


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
