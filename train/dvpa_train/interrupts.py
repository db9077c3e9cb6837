"""Signals: save, then stop. SLURM sends SIGUSR1 before the time is up; SIGTERM ends jobs.

All processes stop after the same step, whichever of them was told.
"""

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer

from dvpa_train.checkpoints import Checkpoints
from dvpa_train.processes import is_launched

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(RuntimeError):
    """The run has been asked to stop by `signum`, and can be resumed."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; run it again to resume")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """As shells count signals; 0 under torchrun, which would start the run again otherwise."""
        return 0 if is_launched() else 128 + self.signum


class Interrupts(Callback):
    """Takes the signals while a stage trains."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._before: dict[int, Any] = {}
        self._signum: int | None = None

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """After Lightning, which takes SIGTERM, too, and would stop one process alone."""

        def note(signum: int, frame: FrameType | None) -> None:
            self._signum = signum
            module.stop_wanted = True

        self._before = {signum: signal.signal(signum, note) for signum in SIGNALS}

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any, **kwargs: Any) -> None:
        """Save and leave, if any process has been told to.

        Raises:
            Stopped: the same on every process.
        """
        if not module.is_stopping or trainer.fit_loop._should_accumulate():
            return
        if trainer.global_step < trainer.max_steps:
            self._checkpoints.save(trainer)
        self._checkpoints.finish()
        raise Stopped(self._signum or signal.SIGTERM)

    def on_train_end(self, *args: Any) -> None:
        """Give the signals back."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def on_exception(self, *args: Any) -> None:
        """Give the signals back."""
        self.on_train_end()
