"""Safetensors headers: what a checkpoint holds and where, without its data and without PyTorch.

Everything that can be checked without reading the data is: every shard is whole, every tensor of
the index is where the index says, no tensor lies in two shards.
"""

import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path
from typing import Any

from dvpa.checkpoint.index_stream import INDEX_FILE, index_entries

SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as a header describes it: `dtype` is a key of `ITEM_BYTES`, `shape` in elements."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class ShardHeaders:
    """All tensors of a checkpoint folder, by name.

    `tensors` maps names to `TensorInfo`, in the order of the files; `unindexed` are those that an
    index, where there is one (`has_index`), leaves out. With `keep_going`, a shard of the index
    that is missing or corrupt is no error: `broken` maps its tensors to the reason.

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
        index = read_index(folder)
        self.has_index = bool(index)
        self.files = sorted({folder / name for name in index.values()} or {folder / SINGLE_FILE})
        for path in self.files:
            try:
                self._add(path)
            except (OSError, ValueError) as error:
                if not (keep_going and index):  # without an index: nobody knows what it held
                    raise
                held = (name for name, file in index.items() if folder / file == path)
                self.broken.update(dict.fromkeys(held, str(error)))
        self.unindexed = [name for name in self.tensors if index and name not in index]
        for name, file in index.items():
            if name not in self.broken and self._file_of.get(name) != folder / file:
                raise ValueError(f"{folder / INDEX_FILE}: {name}: not in {file}")

    def _add(self, path: Path) -> None:
        """Take in the header of one shard, or nothing of it."""
        found = shard_tensors(path)
        for name, _, _ in found:
            if name in self.tensors:
                raise ValueError(f"{path}: {name}: also in {self._file_of[name].name}")
        for name, info, offset in found:
            self.tensors[name], self._file_of[name] = info, path
            self._offset_of[name] = offset

    def locate(self, name: str) -> tuple[Path, int]:
        """Where the data of a tensor lies: its file, and the offset in bytes from its start."""
        return self._file_of[name], self._offset_of[name]


def shard_tensors(path: Path) -> list[tuple[str, TensorInfo, int]]:
    """Names, dtypes and shapes of a shard's tensors, and where in the file each one's data begins.

    Raises:
        FileNotFoundError: no such shard.
        ValueError: as `read_header`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such shard")
    infos = read_header(path)
    # The data is the file's end, without gaps: `read_header` has checked that.
    offset = path.stat().st_size - sum(info.num_bytes for info in infos.values())
    found = []
    for name, info in infos.items():
        found.append((name, info, offset))
        offset += info.num_bytes
    return found


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of one safetensors file, in the order of their data.

    Raises:
        ValueError: not a safetensors file, of an unknown dtype, truncated or too long.
    """
    raw, size = raw_header(path), path.stat().st_size
    try:
        header = json.loads(raw[8:].decode())
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__: must map words to words")
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        position, tensors = 0, {}
        for name, entry in entries:
            if entry["dtype"] not in ITEM_BYTES:
                raise ValueError(f"{name}: unknown dtype {entry['dtype']}")
            shape = tuple(entry["shape"])
            if not _is_shape(shape):
                raise ValueError(f"{name}: shape {entry['shape']} is not a list of sizes")
            info = _info(entry["dtype"], shape)
            offsets = entry["data_offsets"]
            end = position + info.num_bytes
            if offsets != [position, end] or not all(type(offset) is int for offset in offsets):
                raise ValueError(f"{name}: data offsets {offsets} do not fit its shape")
            position = end
            tensors[sys.intern(name)] = info
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: corrupt header: {error}") from error
    if position != size - len(raw):
        raise ValueError(
            f"{path}: {size - len(raw)} bytes of data where the header promises {position}"
        )
    return tensors


@lru_cache(maxsize=1024)  # a few shapes, thousands of tensors
def _info(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(sys.intern(dtype), shape)


def _is_shape(shape: tuple[Any, ...]) -> bool:
    """Sizes whose product, taken from the left, stays within the format's 64 bits."""
    if not all(type(size) is int and size >= 0 for size in shape):
        return False
    return all(product < 2**63 for product in accumulate(shape, mul))


def raw_header(path: Path) -> bytes:
    """What comes before the data: the header's length in 8 bytes, and the header.

    Raises:
        ValueError: not a safetensors file.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length, size = int.from_bytes(start, "little"), path.stat().st_size
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path}: not a safetensors file: a header of {length} bytes")
        return start + file.read(length)


def read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file name; empty for a checkpoint in a single file.

    Raises:
        ValueError: not an index, or a file name that leads out of the folder.
    """
    named: dict[str, str] = {}
    for name, file in index_entries(folder):
        if name in named:
            raise ValueError(f"{folder / INDEX_FILE}: {name}: named twice")
        named[sys.intern(name)] = sys.intern(file)
    return named
