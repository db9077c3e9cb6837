"""What a logged step says, under names that do not change from stage to stage."""

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from dvpa_train.balance import load_metrics
from dvpa_train.load_figure import load_png, load_table
from dvpa_train.logbook import Logbook

NAMES = {"distillation": "kl", "mtp_loss": "mtp/loss", "mtp_accuracy": "mtp/accuracy"}


@dataclass(frozen=True)
class LogPlace:
    """A stage's place in its run: which it is, and steps, tokens and FLOPs of those before it."""

    stage: int
    first_step: int
    tokens: int
    training_flops: float


class Counters(NamedTuple):
    """A stage's counters at one of its steps."""

    tokens: int
    seconds: float
    training_flops: float


class MetricLog(Callback):
    """A row every `every` steps of a stage and at its end; the experts' load every `load_every`.

    `load_every` 0: at the end only. What is counted since the last row or figure travels with the
    stage's checkpoints.
    """

    def __init__(self, logbook: Logbook, place: LogPlace, every: int, load_every: int) -> None:
        self.logbook, self.place, self.every, self.load_every = logbook, place, every, load_every
        self._since: Counters | None = None  # the last row
        self._load: Tensor | None = None  # rows since the last figure, [MoE layers, tiers, experts]
        self._load_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed stage goes on counting from."""
        return {"since": tuple(self._since or ()), "load": self._load, "steps": self._load_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `state_dict` gave it."""
        self._since = Counters(*state_dict["since"]) if state_dict["since"] else None
        self._load, self._load_steps = state_dict["load"], state_dict["steps"]

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Mark the stage, or forget what was logged of the steps that come again."""
        step = self.place.first_step + trainer.global_step
        self._since = self._since or _counters(module)
        self.logbook.begin(step)
        if not trainer.global_step:
            stage = module.stage
            text = f"{stage.name} ({stage.kind}): {stage.num_tiers} tiers, {stage.steps} steps"
            self.logbook.mark(step + 1, text)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any, **kwargs: Any) -> None:
        """Count the step; log it where it is its turn."""
        if trainer.fit_loop._should_accumulate() or not self.logbook.is_writing:
            return
        load = module.balancer.last_load
        if self._load is None:
            self._load = torch.zeros_like(load, dtype=torch.int64)
        self._load = self._load.to(load.device).add_(load.long())
        self._load_steps += 1
        step, is_last = trainer.global_step, trainer.global_step == trainer.max_steps
        if is_last or step % self.every == 0:
            self._log_row(step, module)
        if is_last or (self.load_every and step % self.load_every == 0):
            self._log_load(step, module)

    def _log_row(self, step: int, module: Any) -> None:
        assert self._since is not None
        now, config = _counters(module), module.model.config
        seconds = max(now.seconds - self._since.seconds, 1e-9)
        flops = now.training_flops - self._since.training_flops
        peak = self.logbook.peak
        assert peak is not None, "found before the first stage trains"
        rate = module.optimizer_config.learning_rate * module.learning_rate_scale(step - 1)
        row = {
            "stage": self.place.stage,
            "stage_name": module.stage.name,
            **named(module.latest, config.tier_names),
            "learning_rate": rate,
            "tokens": self.place.tokens + now.tokens,
            "training_flops": self.place.training_flops + now.training_flops,
            "tokens_per_second": (now.tokens - self._since.tokens) / seconds,
            "mfu": flops / (seconds * peak.flops),
            "peak_flops": peak.flops,
            **memory(),
            **load_metrics(module.balancer.last_load, config),
        }
        self._since = now
        self.logbook.row(self.place.first_step + step, row)

    def _log_load(self, step: int, module: Any) -> None:
        assert self._load is not None
        if not len(self._load):  # a dense model
            return
        load, config = self._load.cpu().numpy(), module.model.config
        total = self.place.first_step + step
        title = f"{module.stage.name}, steps {total - self._load_steps + 1} to {total}"
        png = load_png(load, config, title)
        self.logbook.figure(total, "load", png, load_table(load, config))
        self._load, self._load_steps = None, 0


def named(latest: Mapping[str, float], tier_names: Sequence[str]) -> dict[str, float]:
    """A step's numbers as they are logged: tiers by their names."""
    tiers = {f"nll/tier_{tier}": f"loss/{name}" for tier, name in enumerate(tier_names)}
    return {tiers.get(name, NAMES.get(name, name)): value for name, value in latest.items()}


def memory() -> dict[str, float]:
    """Bytes of this process: the most that was resident, and on a GPU the most it allocated."""
    found = {"memory/max_rss_bytes": float(_max_rss())}
    if torch.cuda.is_available():
        found["memory/max_allocated_bytes"] = float(torch.cuda.max_memory_allocated())
        found["memory/max_reserved_bytes"] = float(torch.cuda.max_memory_reserved())
    return found


def _max_rss() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux ru_maxrss is inherited from the program that started this one; the mark is not.
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _counters(module: Any) -> Counters:
    return Counters(module.tokens_seen, module.seconds, module.training_flops)
