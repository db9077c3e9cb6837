"""Safetensors shards with bounded memory: headers first, then one tensor (or slice) at a time.

Reading checks what can be checked without reading the data: every shard is whole, every tensor of
the index is where the index says, no tensor lies in two shards. Writing knows all shapes in
advance, so a shard's header goes out first and the data follows tensor by tensor; nothing is
collected in memory.

Left out for now: other formats, several readers at once, resuming inside a shard.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
INCOMPLETE_MARK = ".dvpa-incomplete"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DEFAULT_SHARD_BYTES = 5_000_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it: `dtype` is a key of `DTYPES`, `shape` in elements."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class ShardReader:
    """All tensors of a checkpoint folder, by name.

    `tensors` maps names to `TensorInfo`, in the order of the files. With `keep_going`, a shard of
    the index that is missing or corrupt is no error: `broken` maps its tensors to the reason.

    Raises:
        FileNotFoundError: no weights in the folder, or a shard of the index is missing.
        ValueError: a shard is corrupt or truncated, or the index and the shards disagree.
    """

    def __init__(self, folder: Path, keep_going: bool = False) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.broken: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        self._offset_of: dict[str, int] = {}
        self._opened: tuple[Path, Any] | None = None  # the shard read last; neighbours follow
        index = _read_index(folder)
        for path in sorted({folder / name for name in index.values()} or {folder / SINGLE_FILE}):
            try:
                self._add(path)
            except (OSError, ValueError) as error:
                if not (keep_going and index):  # without an index: nobody knows what it held
                    raise
                held = (name for name, file in index.items() if folder / file == path)
                self.broken.update(dict.fromkeys(held, str(error)))
        for name, file in index.items():
            if name not in self.broken and self._file_of.get(name) != folder / file:
                raise ValueError(f"{folder / INDEX_FILE}: {name}: not in {file}")

    def _add(self, path: Path) -> None:
        """Take in the header of one shard."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such shard")
        infos = read_header(path)
        for name in infos:
            if name in self.tensors:
                raise ValueError(f"{path}: {name}: also in {self._file_of[name].name}")
        # The data is the file's end, without gaps: `read_header` has checked that.
        offset = path.stat().st_size - sum(info.num_bytes for info in infos.values())
        for name, info in infos.items():
            self.tensors[name], self._file_of[name] = info, path
            self._offset_of[name] = offset
            offset += info.num_bytes

    def locate(self, name: str) -> tuple[Path, int]:
        """Where the data of a tensor lies: its file, and the offset in bytes from its start."""
        return self._file_of[name], self._offset_of[name]

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


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of one safetensors file, without its data.

    Raises:
        ValueError: not a safetensors file, of an unknown dtype, truncated or too long.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path}: not a safetensors file: a header of {length} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        position, tensors = 0, {}
        for name, entry in entries:
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name}: unknown dtype {entry['dtype']}")
            info = TensorInfo(entry["dtype"], tuple(entry["shape"]))
            if not all(isinstance(size, int) and size >= 0 for size in info.shape):
                raise ValueError(f"{name}: shape {entry['shape']} is not a list of sizes")
            if entry["data_offsets"] != [position, position + info.num_bytes]:
                raise ValueError(
                    f"{name}: data offsets {entry['data_offsets']} do not fit its shape"
                )
            position += info.num_bytes
            tensors[name] = info
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: corrupt header: {error}") from error
    if position != size - 8 - length:
        raise ValueError(
            f"{path}: {size - 8 - length} bytes of data where the header promises {position}"
        )
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file name; empty for a checkpoint in a single file."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a safetensors index: {error!r}") from error
    for name, file in named.items():
        if Path(file).name != file:  # an index must not point outside of its folder
            raise ValueError(f"{path}: {name}: {file!r} is not a plain file name")
    return named


class ShardWriter:
    """Writes planned tensors, in the plan's order, into one file or into shards with an index.

    Use as a context manager: leaving it without every planned tensor written is a ValueError, and
    the index comes last. The folder must exist; see `staged_folder` for all-or-nothing folders.
    """

    def __init__(
        self, folder: Path, plan: Mapping[str, TensorInfo], shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        self._folder, self._plan = folder, plan
        self._shards = _split(plan, shard_bytes)
        self._waiting = iter([(i, name) for i, names in enumerate(self._shards) for name in names])
        self._next = next(self._waiting, None)
        self._open: tuple[int, BinaryIO] | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next planned tensor.

        Raises:
            ValueError: not the tensor that is due, or not of the planned dtype and shape.
        """
        if self._next is None or self._next[1] != name:
            raise ValueError(f"{name}: not due; the plan goes on with {self._next}")
        info = self._plan[name]
        if tuple(tensor.shape) != info.shape or tensor.dtype != DTYPES[info.dtype]:
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} was planned as {info.dtype} "
                f"{info.shape}"
            )
        file = self._shard(self._next[0])
        file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._next = next(self._waiting, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open is not None:
            _sync_and_close(self._open[1])
        if error is not None:
            return
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

    def _shard(self, shard: int) -> BinaryIO:
        """The open file of a shard; opening it writes its header."""
        if self._open is not None and self._open[0] == shard:
            return self._open[1]
        if self._open is not None:
            _sync_and_close(self._open[1])
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
        file = (self._folder / self._name(shard)).open("wb")
        self._open = (shard, file)
        file.write(len(raw).to_bytes(8, "little") + raw)
        return file


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


@contextmanager
def staged_folder(out: Path, keep: bool = False) -> Iterator[Path]:
    """A folder to fill beside `out`, renamed to `out` at the end: `out` is absent or complete.

    A killed run leaves `<out>.incomplete` behind, which the next one removes; with `keep`, so does
    one that failed, and the next one finds it as it was left.

    Raises:
        ValueError: `out` holds files already, or `<out>.incomplete` is not one of ours.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; name a new folder")
    staging = out.with_name(f"{out.name}.incomplete")
    if staging.exists() or staging.is_symlink():
        if staging.is_symlink() or not (staging / INCOMPLETE_MARK).is_file():
            raise ValueError(f"{staging}: in the way, and not left by an earlier run of ours")
        if not keep:
            shutil.rmtree(staging)
    staging.mkdir(parents=True, exist_ok=keep)
    (staging / INCOMPLETE_MARK).touch()
    try:
        yield staging
        (staging / INCOMPLETE_MARK).unlink()
        _sync_folder(staging)
        staging.replace(out)  # atomic, also over an empty folder
        _sync_folder(out.parent)
    except BaseException:
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON and wait until it is on the disk."""
    file = path.open("wb")
    file.write((json.dumps(content, indent=2) + "\n").encode())
    _sync_and_close(file)


def copy_file(source: Path, folder: Path) -> None:
    """Copy a file into `folder` and wait until it is on the disk."""
    with source.open("rb") as origin:
        file = (folder / source.name).open("wb")
        shutil.copyfileobj(origin, file)
        _sync_and_close(file)


def _sync_and_close(file: BinaryIO) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
