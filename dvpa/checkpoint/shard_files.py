"""Shards filled at any place by several threads, that survive a kill; no PyTorch.

A shard is written under a temporary name, with the header and so the byte offsets of the shard it
is modelled on. Once whole it is hashed, synced and renamed; then a journal file beside it says so,
with what the caller wants to remember of its tensors. The next run takes over the shards whose
journal and hash are right.
"""

import hashlib
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from dvpa.checkpoint.folders import PARTIAL, sync_folder, write_json
from dvpa.checkpoint.headers import raw_header
from dvpa.checkpoint.stored_headers import StoredHeaders

JOURNAL = ".journal.json"
_SEALERS = 2  # shards hashed and synced at the same time


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is on the disk under its name."""

    sha256: str
    num_bytes: int


class ShardFiles:
    """The shards of a new checkpoint, laid out like those of `model`.

    Every tensor is written with `write`, in pieces of any order, then declared with `finish`, once.
    `finished` are the shards that are done, at first those of an earlier run. All methods may be
    called from several threads, except `close`.
    """

    def __init__(self, folder: Path, model: StoredHeaders) -> None:
        self._folder, self._model = folder, model
        self._lock = Lock()
        self._open: dict[str, int] = {}
        self._records: dict[str, dict[str, Any]] = {path.name: {} for path in model.files}
        self._missing = model.counts()
        self._sealers = ThreadPoolExecutor(_SEALERS, thread_name_prefix="seal")
        self._seals: list[Future[None]] = []
        self.finished = self._take_over()

    def shard_of(self, name: str) -> str:
        """File name of the shard that a tensor lies in."""
        return self._model.locate(name)[0].name

    def is_finished(self, name: str) -> bool:
        """Whether the tensor's shard was finished by an earlier run."""
        return self.shard_of(name) in self._before

    def records(self, shard: str) -> dict[str, Any]:
        """What an earlier run remembered of a shard's tensors when it finished it.

        Raises:
            ValueError: its journal has changed since.
        """
        path = self._folder / f"{shard}{JOURNAL}"
        try:
            found = json.loads(path.read_bytes())["records"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error!r}") from error
        assert isinstance(found, dict)  # `_earlier` has looked
        return found

    def write(self, name: str, position: int, data: memoryview) -> None:
        """Write bytes of a tensor from `position` on; nothing happens in a finished shard.

        Raises:
            OSError: the disk is full or fails; the file name carries the tensor's.
        """
        shard = self.shard_of(name)
        if shard in self._before:
            return
        offset = self._model.locate(name)[1] + position
        try:
            descriptor = self._descriptor(shard)
            while data:
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            where = f"{self._folder / shard}: {name}"
            raise OSError(error.errno, error.strerror, where) from error

    def finish(self, name: str, record: Any = None) -> None:
        """All of a tensor is written; the last one of a shard seals it in the background."""
        shard = self.shard_of(name)
        if shard in self._before:
            return
        self._descriptor(shard)  # a shard may hold empty tensors alone
        with self._lock:
            if record is not None:
                self._records[shard][name] = record
            self._missing[shard] -= 1
            if self._missing[shard] == 0:
                self._seals.append(self._sealers.submit(self._seal, shard))

    def close(self) -> None:
        """Wait for every seal.

        Raises:
            OSError: a shard could not be written out.
            ValueError: a tensor was never finished.
        """
        self._sealers.shutdown(wait=True)
        for seal in self._seals:
            seal.result()
        for shard, count in self._missing.items():
            if count and shard not in self.finished:
                raise ValueError(f"{self._folder / shard}: {count} tensors were never written")

    def abandon(self) -> None:
        """After a failure: wait for running seals, remove what is not whole."""
        self._sealers.shutdown(wait=True, cancel_futures=True)
        for shard, descriptor in self._open.items():
            os.close(descriptor)
            (self._folder / f"{shard}{PARTIAL}").unlink(missing_ok=True)
        self._open.clear()

    def _descriptor(self, shard: str) -> int:
        """The open file of a shard; opening it writes its header."""
        with self._lock:
            if shard not in self._open:
                path = self._folder / f"{shard}{PARTIAL}"
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                self._open[shard] = descriptor
                os.ftruncate(descriptor, (self._model.folder / shard).stat().st_size)
                os.pwrite(descriptor, raw_header(self._model.folder / shard), 0)
            return self._open[shard]

    def _seal(self, shard: str) -> None:
        """Hash, sync, rename, journal: in this order, so that each step vouches for the last."""
        descriptor = self._open[shard]
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            digest = _digest(descriptor)
            num_bytes = os.fstat(descriptor).st_size
            os.fsync(descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder / shard)) from error
        with self._lock:
            os.close(self._open.pop(shard))
        path = self._folder / shard
        path.with_name(f"{shard}{PARTIAL}").replace(path)
        sync_folder(self._folder)
        done = FinishedShard(digest, num_bytes)
        journal = path.with_name(f"{shard}{JOURNAL}")
        content = {**vars(done), "records": self._records.pop(shard)}
        write_json(journal.with_name(f"{journal.name}{PARTIAL}"), content, indent=None)
        journal.with_name(f"{journal.name}{PARTIAL}").replace(journal)
        sync_folder(self._folder)
        with self._lock:
            self.finished[shard] = done

    def _take_over(self) -> dict[str, FinishedShard]:
        """The shards of an earlier run that are whole; the others start anew."""
        names = [name for name in self._records if (self._folder / f"{name}{JOURNAL}").is_file()]
        found = zip(names, self._sealers.map(self._earlier, names), strict=True)
        finished = {name: shard for name, shard in found if shard is not None}
        self._before = frozenset(finished)
        for name in self._records:
            if name not in finished:
                (self._folder / name).unlink(missing_ok=True)
        return finished

    def _earlier(self, name: str) -> FinishedShard | None:
        try:
            content = json.loads((self._folder / f"{name}{JOURNAL}").read_bytes())
            dict(content.pop("records"))
            done = FinishedShard(**content)
            with (self._folder / name).open("rb") as file:
                return done if _digest(file.fileno()) == done.sha256 else None
        except (OSError, ValueError, TypeError, LookupError):  # half-written: as if not there
            return None


def remove_journals(folder: Path) -> None:
    """Remove what is of no use once all shards are finished."""
    for path in folder.glob(f"*{JOURNAL}"):
        path.unlink()


def _digest(descriptor: int) -> str:
    """SHA-256 of a file from where it stands."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    while count := os.readv(descriptor, [buffer]):
        digest.update(buffer[:count])
    return digest.hexdigest()
