"""What shows a stage on the terminal: the progress line."""

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
