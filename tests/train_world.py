"""Training runs of several processes, for tests: start them, read what they wrote."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
WORKER = HERE / "train_worker.py"
RECIPE = "train/pico.yaml"
STAGES = ("foundation", "grow", "joint")
PATIENCE_S = 600
PICO = HERE.parent / "configs" / "model" / "pico.yaml"


@dataclass(frozen=True)
class Trained:
    """What a run left behind."""

    out: Path

    @property
    def steps(self) -> list[tuple[str, int, str, float]]:
        """(stage, step, loss as hex, gradient norm), in the order they were taken."""
        lines = Path(f"{self.out}.steps.jsonl").read_text().splitlines()
        return [tuple(json.loads(line)) for line in lines]

    @property
    def last_steps(self) -> dict[tuple[str, int], str]:
        """Loss of every step, as it was taken last: those before a kill are taken again."""
        return {(stage, step): loss for stage, step, loss, _ in self.steps}

    @property
    def losses(self) -> list[float]:
        """In order."""
        return [float.fromhex(loss) for _, _, loss, _ in self.steps]

    def gradients(self, stage: str, step: int) -> dict[str, Tensor]:
        """All of them, by parameter."""
        found: dict[str, Tensor] = torch.load(f"{self.out}.{stage}.{step}.pt")
        return found

    def model(self, stage: int) -> Path:
        """The stage's checkpoint."""
        return self.out / "training_state" / f"{stage}-{STAGES[stage]}" / "model"


def command(
    out: Path, ranks: int, *overrides: str, restarts: int = 0, recipe: str = RECIPE
) -> list[str]:
    """torchrun for a worker per rank; a single process without it."""
    worker = [str(WORKER), str(out), recipe, *overrides]
    return [sys.executable, *worker] if ranks == 1 else [*torchrun(ranks, restarts), *worker]


def torchrun(ranks: int, restarts: int = 0) -> list[str]:
    """The launcher, to be followed by a script and its arguments."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
        "--max-restarts", str(restarts),
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """For a worker."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
        "GLOO_SOCKET_IFNAME": "lo",
        **more,
    }


def train(
    out: Path,
    ranks: int,
    *overrides: str,
    restarts: int = 0,
    recipe: str = RECIPE,
    **variables: Any,
) -> Trained:
    """Run to the end.

    Raises:
        AssertionError: it failed; the message is the end of what it said.
    """
    done = subprocess.run(
        command(out, ranks, *overrides, restarts=restarts, recipe=recipe),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return Trained(out)


def two_experts(folder: Path) -> str:
    """pico with two experts a token at the base tier, as an override of the recipe.

    A normalised gate over one expert has no gradient but rounding, which Adam makes as large as any
    other: such a router walks at random, and another way with every order of summation.
    """
    one = "top_k: 1, topk_group: 1, routed_scaling_factor: 1.0"
    text = PICO.read_text()
    assert one in text
    path = folder / "pico.yaml"
    path.write_text(text.replace(one, "top_k: 2, topk_group: 1, routed_scaling_factor: 1.4142"))
    return f"model={path}"
