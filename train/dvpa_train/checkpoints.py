"""Resumable checkpoints of a stage: distributed, in the background, sealed, a few of them kept.

`checkpoints/step-00000100/` holds what every process wrote of its own
(torch.distributed.checkpoint, so that any number of processes reads it back), `loops.pt` (counters,
schedules) and, last of all, `manifest.json` with the size and SHA-256 of each file. A folder
without a manifest, or one that it does not describe, is never resumed from: a kill at any moment
leaves the checkpoint before it.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from dvpa.checkpoint.shards import write_json
from dvpa_train.processes import Processes

MANIFEST = "manifest.json"
PREFIX = "step-"
SEAL = ".seal-{}.json"  # of one process: what it wrote


@dataclass(frozen=True)
class Sealed:
    """A checkpoint with a manifest."""

    folder: Path
    step: int
    manifest: dict[str, Any]


class Checkpoints(Callback):
    """Save every `every` optimizer steps, keep the latest `keep`.

    Args:
        folder: of the stage.
        facts: goes into the manifest; a run that resumes must give the same, see `find_latest`.
        timeout_s: of the wait for what the other processes have written.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        keep: int,
        facts: dict[str, Any],
        among: Processes,
        timeout_s: float,
    ) -> None:
        self.folder, self.every, self.keep = folder / "checkpoints", every, keep
        self.facts, self.among, self.timeout_s = facts, among, timeout_s
        self._sealing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Start a checkpoint where one is due; only the copy in memory holds the training up."""
        is_step = not trainer.fit_loop._should_accumulate()
        if not is_step or trainer.global_step % self.every:
            return
        if trainer.global_step < trainer.max_steps:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now; the one before is finished first. Every process must call it."""
        self.finish()
        step = trainer.global_step
        folder = self.folder / f"{PREFIX}{step:08}"
        if self.among.is_first:
            shutil.rmtree(folder, ignore_errors=True)  # half of one, left by a kill
            folder.mkdir(parents=True)
        self.among.barrier()
        trainer.save_checkpoint(folder)
        saving = getattr(trainer.strategy, "saving", None)
        wait = saving.result if saving is not None else lambda: None
        self._sealing = threading.Thread(
            target=self._seal, args=(folder, step, wait), name="checkpoint"
        )
        self._sealing.start()

    def finish(self) -> None:
        """Wait until the last checkpoint is sealed.

        Raises:
            OSError, RuntimeError: it could not be written.
        """
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def on_train_end(self, *args: Any) -> None:
        """Leave nothing half-written behind a stage that ended well."""
        self.finish()

    def on_exception(self, *args: Any) -> None:
        """The thread must not outlive the process group."""
        if self._sealing is not None:
            self._sealing.join()

    def _seal(self, folder: Path, step: int, wait: Callable[[], Any]) -> None:
        try:
            wait()
            rank, size = self.among.rank, self.among.size
            own = [path for path in _files(folder) if _owner(path, size) == rank]
            _write_whole(folder / SEAL.format(rank), describe(folder, own))
            if not self.among.is_first:
                return
            facts = {"step": step, "processes": size, **self.facts}
            seal(folder, facts, size, self.timeout_s)
            for old in _folders(self.folder)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:
            self._failure = error


def seal(folder: Path, facts: dict[str, Any], num_seals: int, timeout_s: float) -> None:
    """Write the manifest once every process has said what it wrote.

    Raises:
        TimeoutError: a process has not.
    """
    seals = [folder / SEAL.format(rank) for rank in range(num_seals)]
    deadline = time.monotonic() + timeout_s
    while not all(path.is_file() for path in seals):
        if time.monotonic() > deadline:
            missing = [path.name for path in seals if not path.is_file()]
            raise TimeoutError(f"{folder}: no word from {', '.join(missing)}")
        time.sleep(0.01)
    files: dict[str, Any] = {}
    for path in seals:
        files |= json.loads(path.read_text())
    _write_whole(folder / MANIFEST, {**facts, "files": dict(sorted(files.items()))})
    for path in seals:
        path.unlink()


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    """Others wait for the file: they must never see half of it."""
    temporary = path.with_name(f".seal-of-{path.name}")
    write_json(temporary, content)
    os.replace(temporary, path)


def describe(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Size and SHA-256 of each file, by its name below `folder`."""
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in files
    }


def find_latest(
    folder: Path, facts: dict[str, Any], among: Processes
) -> tuple[Sealed | None, list[str]]:
    """The newest checkpoint of a stage that is whole, and why newer ones were passed over.

    Every process must call it; they share the reading.

    Raises:
        ValueError: that checkpoint was made under other `facts` (recipe, tokenizer, ...).
    """
    passed_over = []
    for path in reversed(_folders(folder / "checkpoints")):
        problems = _problems(path, among)
        if problems:
            passed_over.append(f"{path.name}: {problems[0]}")
            continue
        manifest = json.loads((path / MANIFEST).read_text())
        for name, value in facts.items():
            if manifest.get(name) != value:
                raise ValueError(
                    f"{path}: {name}: {manifest.get(name)!r} when it was saved, {value!r} now; "
                    "resume with what it was started with, or choose another folder"
                )
        return Sealed(path, int(manifest["step"]), manifest), passed_over
    return None, passed_over


def _problems(folder: Path, among: Processes) -> list[str]:
    """What is wrong with a checkpoint, the same on every process."""
    found: list[str] = []
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        files = {}
        found.append("no manifest: not complete")
    for name, said in list(files.items())[among.rank :: among.size]:
        path = folder / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif path.stat().st_size != said["bytes"]:
            found.append(f"{name}: {path.stat().st_size} bytes, {said['bytes']} were written")
        elif _sha256(path) != said["sha256"]:
            found.append(f"{name}: SHA-256 is not what was written")
    if among.size == 1:
        return found
    everyone: list[Any] = [None] * among.size
    dist.all_gather_object(everyone, found)
    return [problem for of_one in everyone for problem in of_one]


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def _files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".seal")
    )


def _owner(path: Path, size: int) -> int:
    """Who vouches for a file: its writer if the name says so (`__3_0.distcp`), else the first."""
    number = path.name.removeprefix("__").partition("_")[0]
    is_shard = path.name.startswith("__") and number.isdecimal()
    return int(number) % size if is_shard else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
