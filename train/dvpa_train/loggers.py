"""The loggers a recipe can name: CSV, TensorBoard, W&B; each can forget steps and go on.

`metrics.csv` is the record. TensorBoard's files are append-only, but their readers forget steps
when they are told to. W&B forgets nothing, so it is never told a step twice; offline, where every
start writes a folder of its own and a killed one loses its last seconds, each is given the record
from the beginning.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from dvpa.checkpoint.shards import write_json
from dvpa_train.config import Recipe

Row = Mapping[str, float | str]
FIGURE = re.compile(r"step-(\d{8,})\.png")


class Logger(Protocol):
    """One place that rows, marks and figures go to."""

    def open(self) -> None:
        """Training begins or goes on."""

    def rewind(self, step: int) -> None:
        """Forget what came after `step`: it is coming again."""

    def row(self, step: int, values: Row) -> None:
        """Numbers of a step, and words."""

    def mark(self, step: int, text: str) -> None:
        """Something begins at a step."""

    def figure(self, step: int, name: str, path: Path) -> None:
        """A PNG file."""

    def close(self, failed: bool) -> None:
        """Nothing more is coming."""


class CsvLog:
    """`metrics.csv`: a row per logged step, on the disk at once; new names become new columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []
        if path.is_file():
            self._columns = next(csv.reader(io.StringIO(path.read_text())), [])

    def rows(self) -> list[dict[str, str]]:
        """What is in the file; a line that a kill cut short is not."""
        if not self.path.is_file():
            return []
        whole, _, _ = self.path.read_text().rpartition("\n")
        return list(csv.DictReader(io.StringIO(whole)))

    def open(self) -> None:
        """Nothing to do."""

    def rewind(self, step: int) -> None:
        """Keep the rows up to `step`."""
        if self._columns:
            self._write([row for row in self.rows() if int(row["step"]) <= step])

    def row(self, step: int, values: Row) -> None:
        """Append a row."""
        row = {"step": step, **values}
        new = [name for name in row if name not in self._columns]
        if new:
            rows = self.rows()
            self._columns += new
            self._write(rows)
        with self.path.open("a", newline="") as file:
            self._writer(file).writerow(row)

    def mark(self, step: int, text: str) -> None:
        """Nothing to do: every row names its stage."""

    def figure(self, step: int, name: str, path: Path) -> None:
        """Nothing to do: the file lies beside the rows."""

    def close(self, failed: bool) -> None:
        """Nothing to do."""

    def _write(self, rows: Sequence[Mapping[str, str]]) -> None:
        scratch = self.path.with_suffix(".tmp")
        with scratch.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(scratch, self.path)

    def _writer(self, file: Any) -> "csv.DictWriter[str]":
        return csv.DictWriter(file, self._columns, lineterminator="\n")


class TensorBoardLog:
    """Event files, one for each start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: Any = None
        self._kept = 0  # readers forget the steps after it

    @property
    def _writer(self) -> Any:
        if self._opened is None:
            from torch.utils.tensorboard import SummaryWriter

            self._opened = SummaryWriter(str(self.folder), purge_step=self._kept + 1)
        return self._opened

    def open(self) -> None:
        """Nothing to do."""

    def rewind(self, step: int) -> None:
        """Tell the readers."""
        self._kept = step
        if self._opened is not None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            start = SessionLog(status=SessionLog.START)
            self._opened.file_writer.add_event(Event(session_log=start), step + 1)

    def row(self, step: int, values: Row) -> None:
        """A scalar per number."""
        for name, value in values.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def mark(self, step: int, text: str) -> None:
        """A text."""
        self._writer.add_text("stage", text, step)

    def figure(self, step: int, name: str, path: Path) -> None:
        """An image."""
        from matplotlib.image import imread

        self._writer.add_image(name, imread(path), step, dataformats="HWC")
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Write what is left."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


class WandbLog:
    """One W&B run, whose id is kept in `wandb.json`.

    Args:
        folder: the run's `logs`; W&B makes its own folder beside it.
        mode: as W&B spells it: offline, online.
        record: written before this one, since whatever W&B lacks is taken from it.
    """

    def __init__(self, recipe: Recipe, folder: Path, mode: str, record: CsvLog) -> None:
        self._recipe, self._folder, self._mode, self._record = recipe, folder, mode, record
        self._note = folder / "wandb.json"
        known = json.loads(self._note.read_text()) if self._note.is_file() else {}
        self._id = str(known.get("id") or os.environ.get("WANDB_RUN_ID") or uuid4().hex[:8])
        self._safe = int(known.get("step", -1))  # a start that was closed has logged up to here
        self._latest = -1
        self._run: Any = None

    def open(self) -> None:
        """Start or continue the run, and hand in what it lacks.

        Raises:
            ValueError: W&B cannot be reached, or refuses.
        """
        if self._run is not None:
            return
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")  # its banner would tear the progress line
        # W&B's background process of a parent still holds the run of a start that was killed.
        if f"-{os.getpid()}-" not in os.environ.get("WANDB_SERVICE", ""):
            os.environ.pop("WANDB_SERVICE", None)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dvpa"),
                name=self._recipe.name,
                id=self._id,
                dir=str(self._folder.parent),
                mode=self._mode,  # type: ignore[arg-type]
                resume="allow",
                config=asdict(self._recipe),
            )
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            raise ValueError(f"wandb_mode: {self._mode}: {error}") from None
        self._save()
        lacking: dict[int, dict[str, Any]] = {}
        for row in self._record.rows():
            step = int(row.pop("step"))
            lacking[step] = {
                name: value if name == "stage_name" else float(value)
                for name, value in row.items()
                if value
            }
        for step, name, path in figures_in(self._folder):
            lacking.setdefault(step, {})[name] = wandb.Image(str(path))
        for step, values in sorted(lacking.items()):
            self._log(step, values)

    def rewind(self, step: int) -> None:
        """Nothing to do: see `_log`."""

    def row(self, step: int, values: Row) -> None:
        """A step of its history."""
        if self._is_open_for(step):
            self._log(step, values)

    def mark(self, step: int, text: str) -> None:
        """Nothing to do: its charts have no marks, but every row names its stage."""

    def figure(self, step: int, name: str, path: Path) -> None:
        """An image in the step's history."""
        if self._is_open_for(step):
            import wandb

            self._log(step, {name: wandb.Image(str(path))})

    def close(self, failed: bool) -> None:
        """Wait until W&B has it all."""
        if self._run is None:
            return
        self._run.finish(exit_code=int(failed))
        self._run, self._safe = None, self._latest
        self._save()

    def _is_open_for(self, step: int) -> bool:
        """Whether to log it; opening takes it from the record, and a finished run is not opened."""
        if self._run is not None:
            return True
        if step > self._safe:
            self.open()
        return False

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        """Unless W&B knows the step: a step that is taken again had the same batch."""
        if step >= self._run.step:
            self._run.log(dict(values), step=step)
            self._latest = step

    def _save(self) -> None:
        scratch = self._note.with_suffix(".tmp")
        write_json(scratch, {"id": self._id, "step": self._safe})
        os.replace(scratch, self._note)


def figures_in(folder: Path) -> Iterator[tuple[int, str, Path]]:
    """Step, name and path of the figures of a log folder."""
    for path in sorted(folder.glob("*/step-*.png")):
        match = FIGURE.fullmatch(path.name)
        if match:
            yield int(match[1]), path.parent.name, path
