"""Safetensors shards with bounded memory: headers first, then one tensor (or slice) at a time.

Reading checks the headers first (`dvpa.checkpoint.headers`). Writing knows all shapes in advance,
so a shard's header goes out first and the data follows tensor by tensor; nothing is collected in
memory.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dvpa.checkpoint.folders import (
    PARTIAL,
    copy_file,
    staged_folder,
    sync_and_close,
    sync_folder,
    write_json,
)
from dvpa.checkpoint.headers import (
    SINGLE_FILE,
    ShardHeaders,
    TensorInfo,
    read_header,
)
from dvpa.checkpoint.index_stream import INDEX_FILE
from dvpa.checkpoint.pace import Pace

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "DTYPES",
    "INDEX_FILE",
    "SINGLE_FILE",
    "ShardReader",
    "ShardWriter",
    "TensorInfo",
    "copy_file",
    "read_header",
    "staged_folder",
    "write_json",
]
DEFAULT_SHARD_BYTES = 5_000_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class ShardReader(ShardHeaders):
    """A checkpoint folder whose tensors can be read; see `ShardHeaders`."""

    def __init__(self, folder: Path, keep_going: bool = False) -> None:
        super().__init__(folder, keep_going)
        self._opened: tuple[Path, Any] | None = None  # the shard read last; neighbours follow

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """The tensor, or the part `index` of it; only that part is read from the disk.

        Raises:
            ValueError: no such tensor, or the shard cannot be read.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.folder}: {name}: no such tensor")
        path = self._file_of[name]
        try:
            if self._opened is None or self._opened[0] != path:
                self._opened = (path, safe_open(path, framework="pt"))
            file = self._opened[1]
            part: Tensor = file.get_slice(name)[index] if index else file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        return part


class ShardWriter:
    """Writes planned tensors, in the plan's order, into one file or into shards with an index.

    Use as a context manager: leaving it without every planned tensor written is a ValueError, and
    the index comes last. A shard has its name once it is whole and on the disk. The folder must
    exist; see `staged_folder` for all-or-nothing folders. `say` is told how far it is, in words.

    With `resume`, shards that an earlier writer of the same plan finished in the folder are left
    as they are, `resumed` of them; their tensors are not due any more. It is the caller's to know
    that they are of the same values (`resumable_folder`).
    """

    def __init__(
        self,
        folder: Path,
        plan: Mapping[str, TensorInfo],
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        say: Callable[[str], object] = lambda text: None,
        resume: bool = False,
    ) -> None:
        self._folder, self._plan = folder, plan
        self._shards = _split(plan, shard_bytes)
        finished = [i for i in range(len(self._shards)) if resume and self._is_finished(i)]
        self.resumed = len(finished)
        self._written = {name for i in finished for name in self._shards[i]}
        todo = [
            (i, name)
            for i, names in enumerate(self._shards)
            for name in names
            if name not in self._written
        ]
        self._pace = Pace(sum(plan[name].num_bytes for _, name in todo), say)
        self._waiting = iter(todo)
        self._next = next(self._waiting, None)
        self._open: tuple[int, BinaryIO] | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def is_due(self, name: str) -> bool:
        """Whether a planned tensor is still to be written."""
        return name not in self._written

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next planned tensor.

        Raises:
            ValueError: not the tensor that is due, or not of the planned dtype and shape.
            OSError: the disk is full or fails; the file name carries the tensor's.
        """
        if self._next is None or self._next[1] != name:
            raise ValueError(f"{name}: not due; the plan goes on with {self._next}")
        info = self._plan[name]
        if tuple(tensor.shape) != info.shape or tensor.dtype != DTYPES[info.dtype]:
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} was planned as {info.dtype} "
                f"{info.shape}"
            )
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        try:
            self._shard(self._next[0]).write(data)
        except OSError as error:
            where = f"{self._folder / self._name(self._next[0])}: {name}"
            raise OSError(error.errno, error.strerror, where) from error
        self._pace.add(info.num_bytes)
        self._written.add(name)
        self._next = next(self._waiting, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            if self._open is not None:
                with suppress(OSError):  # a full disk, once more
                    self._open[1].close()
                self._partial(self._open[0]).unlink(missing_ok=True)
            return
        self._seal()
        if self._next is not None:
            raise ValueError(f"{self._next[1]}: planned but never written")
        if len(self._shards) > 1:
            weight_map = {n: self._name(i) for i, names in enumerate(self._shards) for n in names}
            total = sum(info.num_bytes for info in self._plan.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self._folder / INDEX_FILE, index)

    def _name(self, shard: int) -> str:
        count = len(self._shards)
        return SINGLE_FILE if count == 1 else f"model-{shard + 1:05}-of-{count:05}.safetensors"

    def _partial(self, shard: int) -> Path:
        return self._folder / f"{self._name(shard)}{PARTIAL}"

    def _is_finished(self, shard: int) -> bool:
        """Whether a whole file with this shard's header has its name."""
        path, header = self._folder / self._name(shard), self._header(shard)
        data = sum(self._plan[name].num_bytes for name in self._shards[shard])
        if not path.is_file() or path.stat().st_size != len(header) + data:
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header

    def _header(self, shard: int) -> bytes:
        """What a shard begins with."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in self._shards[shard]:
            info = self._plan[name]
            end = position + info.num_bytes
            header[name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [position, end],
            }
            position = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # readers map the data: keep it aligned
        return len(raw).to_bytes(8, "little") + raw

    def _shard(self, shard: int) -> BinaryIO:
        """The open file of a shard; opening it writes its header."""
        if self._open is not None and self._open[0] == shard:
            return self._open[1]
        self._seal()
        file = self._partial(shard).open("wb")
        self._open = (shard, file)
        file.write(self._header(shard))
        return file

    def _seal(self) -> None:
        """Put the open shard on the disk; then, and only then, it gets its name."""
        if self._open is None:
            return
        shard, file = self._open
        sync_and_close(file)
        self._open = None
        self._partial(shard).replace(self._folder / self._name(shard))
        sync_folder(self._folder)


def _split(plan: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    """Names per shard, in order; a tensor larger than a shard gets one of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, info in plan.items():
        if shards[-1] and used + info.num_bytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += info.num_bytes
    return shards
