"""What watches a stage: the progress line, and the log."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressLine(Callback):
    """Stage, step, loss per tier and tokens/s on one line; plain lines without a terminal."""

    def __init__(self, console: Console, tier_names: list[str]) -> None:
        self.console, self.tier_names = console, tier_names
        self.progress: Progress | None = None
        self.task: Any = None

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Open the bar at the step a resumed run starts from."""
        self.progress = Progress(
            TextColumn("{task.description:<13}"),
            BarColumn(24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[losses]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task(
            module.stage.name, total=trainer.max_steps, completed=trainer.global_step, losses=""
        )
        if self.console.is_terminal:
            self.progress.start()

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        assert self.progress is not None
        if trainer.fit_loop._should_accumulate():
            return
        self.progress.update(self.task, completed=trainer.global_step, losses=self.describe(module))
        tenth = max(trainer.max_steps // 5, 1)
        if not self.console.is_terminal and trainer.global_step % tenth == 0:
            step = f"{trainer.global_step:>5}/{trainer.max_steps}"
            self.console.print(f"{module.stage.name:<13} {step} {self.describe(module)}")

    def describe(self, module: Any) -> str:
        """Mean nll per tier in nats, and tokens per second."""
        losses = " ".join(
            f"{name} {module.latest[f'nll/tier_{t}']:.3f}"
            for t, name in enumerate(self.tier_names)
            if f"nll/tier_{t}" in module.latest
        )
        return f"{losses}  {module.tokens_seen / max(module.seconds, 1e-9):,.0f} tok/s"

    def on_train_end(self, *args: Any) -> None:
        """Close the bar."""
        if self.progress is not None and self.console.is_terminal:
            self.progress.stop()


class MetricLog(Callback):
    """Hand the step's numbers to the loggers (CSV always, W&B unless disabled)."""

    def __init__(self, every: int, first_step: int) -> None:
        self.every, self.first_step = every, first_step

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any, **kwargs: Any) -> None:
        """Log under the run's own step count, which goes on from stage to stage."""
        if trainer.global_step % self.every and trainer.global_step != trainer.max_steps:
            return
        if trainer.fit_loop._should_accumulate():
            return
        metrics = {
            **module.latest,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": module.tokens_seen / max(module.seconds, 1e-9),
            "training_flops": module.training_flops,
        }
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"{module.stage.name}/{name}": value for name, value in metrics.items()},
                step=self.first_step + trainer.global_step,
            )
