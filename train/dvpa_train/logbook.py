"""The run's log: rows of numbers, marks and figures, for every logger of the recipe.

Steps are counted through all stages. A run that goes on from a checkpoint takes the steps after it
again, so `rewind` drops what was logged of them: no step is in the log twice, and none is missing.
"""

import csv
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dvpa_train.config import Recipe
from dvpa_train.loggers import CsvLog, Logger, Row, TensorBoardLog, WandbLog, figures_in
from dvpa_train.peak import Peak
from dvpa_train.processes import Processes


class Logbook:
    """What a run logs, from its first stage to its calibration; only the first process writes.

    Use it as a context manager: W&B must be told how a run ended.

    Attributes:
        peak: what `mfu` is a share of; None until a stage trains.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.folder = out / "logs"
        self.peak: Peak | None = None
        self._recipe = recipe
        self._mode = os.environ.get("WANDB_MODE", recipe.wandb_mode)
        self._loggers: list[Logger] = []
        if "tensorboard" in recipe.loggers and importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "loggers: tensorboard is not installed: pip install 'dvpa[tensorboard]'"
            )

    @property
    def is_wanted(self) -> bool:
        """Whether the recipe names any logger."""
        return bool(self._recipe.loggers)

    @property
    def is_writing(self) -> bool:
        """Whether this process writes."""
        return bool(self._loggers)

    def join(self, among: Processes) -> None:
        """Take the pen, or leave it to the first process."""
        if not among.is_first or not self.is_wanted:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        record = CsvLog(self.folder / "metrics.csv")
        if "csv" in self._recipe.loggers:
            self._loggers.append(record)
        if "tensorboard" in self._recipe.loggers:
            self._loggers.append(TensorBoardLog(self.folder / "tensorboard"))
        if "wandb" in self._recipe.loggers and self._mode != "disabled":
            self._loggers.append(WandbLog(self._recipe, self.folder, self._mode, record))

    def describe(self) -> str:
        """Where the log goes, and what its MFU means."""
        names = [
            name if name != "wandb" else f"wandb ({self._mode})" for name in self._recipe.loggers
        ]
        text = f"{', '.join(names)}"
        if self.peak is not None:
            text += f"; MFU is of {self.peak.flops / 1e9:,.0f} GFLOP/s ({self.peak.source})"
        return text

    def begin(self, step: int) -> None:
        """Training goes on after `step`: forget what was logged beyond it.

        Raises:
            ValueError: W&B cannot be reached or will not have the run.
        """
        self.rewind(step)
        for logger in self._loggers:
            logger.open()

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`."""
        for number, _, path in figures_in(self.folder):
            if number > step:
                path.unlink()
                path.with_suffix(".csv").unlink(missing_ok=True)
        for logger in self._loggers:
            logger.rewind(step)

    def row(self, step: int, values: Row) -> None:
        """Log the numbers of a step; each step at most once, in rising order."""
        for logger in self._loggers:
            logger.row(step, values)

    def mark(self, step: int, text: str) -> None:
        """Log that something begins at a step."""
        for logger in self._loggers:
            logger.mark(step, text)

    def figure(self, step: int, name: str, png: bytes, table: Mapping[str, Sequence[Any]]) -> None:
        """Log a picture and the numbers in it; both are kept in `logs/NAME/step-N`."""
        if not self.is_writing:
            return
        path = self.folder / name / f"step-{step:08}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(table)
            writer.writerows(zip(*table.values(), strict=True))
        path.write_bytes(png)
        for logger in self._loggers:
            logger.figure(step, name, path)

    def close(self, failed: bool = False) -> None:
        """Nothing more is coming."""
        for logger in self._loggers:
            logger.close(failed)
        self._loggers = []

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)
