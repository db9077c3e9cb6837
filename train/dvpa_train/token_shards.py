"""A prepared folder: tokens of whole documents in shards, and the manifest that makes them count.

```
shard-00000.bin   tokens of its documents, one after the other; uint16 or uint32, little-endian
shard-00000.idx   where each document starts, in tokens, and last their end: int64, documents + 1
manifest.json     sizes and SHA-256 of every shard, tokenizer hash, source files, skipped documents
```

A document never lies in two shards. The layout is what Megatron's `IndexedDataset`, OLMo, nanotron
and litdata converged on (flat tokens, offsets beside them, read by mmap); none of them is used
because each comes with its whole framework and none records which tokenizer and which source files
made the tokens, which is what a resumed run has to check.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

MANIFEST = "manifest.json"
FORMAT = "dvpa-packed-1"
OFFSET_BYTES = 8
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class Shard:
    """One pair of files, `name`.bin and `name`.idx."""

    name: str
    num_tokens: int
    num_documents: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class SourceFile:
    """A file the documents came from."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds. `bos_id`, `eos_id`: added to every document; None: not."""

    dtype: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    tokenizer_sha256: str
    num_tokens: int
    num_documents: int
    skipped: dict[str, int]  # reason -> documents
    shards: tuple[Shard, ...]
    sources: tuple[SourceFile, ...]
    options: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def dtype_for(vocab_size: int) -> str:
    """The narrower of uint16 and uint32 that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder; the size of every shard is checked against it.

    Raises:
        FileNotFoundError: no manifest, or a shard is missing.
        ValueError: the manifest is damaged, or a shard has another size.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: not a prepared folder (no {MANIFEST}; did `dvpa-train prepare` finish?)"
        )
    try:
        data = json.loads(path.read_bytes())
        shards = tuple(Shard(**shard) for shard in data.pop("shards"))
        sources = tuple(SourceFile(**source) for source in data.pop("sources"))
        manifest = Manifest(shards=shards, sources=sources, **data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a valid manifest: {error}") from None
    if manifest.format != FORMAT or manifest.dtype not in DTYPES or not shards:
        raise ValueError(
            f"{path}: format {manifest.format!r}, dtype {manifest.dtype!r}, {len(shards)} shards: "
            f"must be {FORMAT!r}, one of {', '.join(DTYPES)}, at least one"
        )
    for name in ("num_tokens", "num_documents"):
        total = sum(getattr(shard, name) for shard in shards)
        if total != getattr(manifest, name):
            raise ValueError(f"{path}: {name}: {getattr(manifest, name)}, but its shards: {total}")
    for shard in shards:
        _check_size(folder / f"{shard.name}.bin", shard.num_tokens * _width(manifest))
        _check_size(folder / f"{shard.name}.idx", (shard.num_documents + 1) * OFFSET_BYTES)
    return manifest


def verify_shard(folder: Path, manifest: Manifest, shard: Shard) -> None:
    """Read a shard whole: hashes, document offsets, ids.

    Raises:
        ValueError: something differs from the manifest; the message names the file.
    """
    check_hashes(folder, shard)
    tokens, offsets = map_shard(folder, manifest, shard)
    if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) <= 0).any():
        raise ValueError(f"{folder / shard.name}.idx: offsets must rise from 0 to {len(tokens)}")
    if int(tokens.max()) >= manifest.vocab_size:
        raise ValueError(
            f"{folder / shard.name}.bin: id {tokens.max()} must be below {manifest.vocab_size}"
        )


def check_hashes(folder: Path, shard: Shard) -> None:
    """Read both files of a shard.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one is not what was written; the message names it.
    """
    for kind, expected in (("bin", shard.bin_sha256), ("idx", shard.idx_sha256)):
        path = folder / f"{shard.name}.{kind}"
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise ValueError(f"{path}: sha256 {found[:16]}.. must be {expected[:16]}..: corrupt")


def map_shard(
    folder: Path, manifest: Manifest, shard: Shard
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """(tokens [num_tokens], offsets int64 [num_documents + 1]) of a shard, memory-mapped."""
    tokens = np.memmap(folder / f"{shard.name}.bin", DTYPES[manifest.dtype], mode="r")
    offsets = np.memmap(folder / f"{shard.name}.idx", "<i8", mode="r")
    return tokens, offsets


def _width(manifest: Manifest) -> int:
    return DTYPES[manifest.dtype].itemsize


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this shard of the manifest is missing")
    found = path.stat().st_size
    if found != expected:
        raise ValueError(f"{path}: {found} bytes; the manifest says {expected}: truncated or mixed")


class TokenShardWriter:
    """Writes documents into shards of at least `shard_tokens` tokens (the last may be smaller).

    One document is in memory at a time. Call `close` at the end; `shards` is complete then. It goes
    on after the shards of an earlier run, `finished`.
    """

    def __init__(
        self, folder: Path, dtype: str, shard_tokens: int, finished: Sequence[Shard] = ()
    ) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, DTYPES[dtype], shard_tokens
        self.shards: list[Shard] = list(finished)
        self._open: list[_HashedFile] | None = None  # bin, idx
        self._tokens = self._documents = 0

    def add(self, ids: Sequence[int] | npt.NDArray[Any]) -> bool:
        """Append one document of at least one token; whether that has completed a shard.

        Raises:
            ValueError: it is empty.
        """
        document = np.asarray(ids, dtype=self.dtype)
        if not len(document):
            raise ValueError("ids: a document must hold at least one token")
        if self._open is None:
            stem = self.folder / f"shard-{len(self.shards):05d}"
            self._open = [_HashedFile(stem.with_suffix(end)) for end in (".bin", ".idx")]
            self._add_offset(0)
        self._open[0].write(document.tobytes())
        self._tokens += len(document)
        self._documents += 1
        self._add_offset(self._tokens)
        is_full = self._tokens >= self.shard_tokens
        if is_full:
            self.close()
        return is_full

    def close(self) -> None:
        """Finish the open shard and wait until it is on the disk."""
        if self._open is None:
            return
        tokens, offsets = (file.close() for file in self._open)
        name = f"shard-{len(self.shards):05d}"
        self.shards.append(Shard(name, self._tokens, self._documents, tokens, offsets))
        self._open, self._tokens, self._documents = None, 0, 0

    def _add_offset(self, value: int) -> None:
        assert self._open is not None
        self._open[1].write(value.to_bytes(OFFSET_BYTES, "little"))


class _HashedFile:
    """A file being written, and its SHA-256 so far."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def close(self) -> str:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._hash.hexdigest()
