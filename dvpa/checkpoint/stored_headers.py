"""Headers of several checkpoints, in a database on the disk: memory does not grow with tensors.

For work on whole checkpoints, one tensor after the other. `headers.ShardHeaders` has the same in
memory, about a kilobyte a tensor.
"""

import sqlite3
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from dvpa.checkpoint.headers import SINGLE_FILE, TensorInfo, shard_tensors
from dvpa.checkpoint.index_stream import INDEX_FILE, index_entries
from dvpa.checkpoint.scratch_database import ScratchDatabase

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tensors (
    number INTEGER PRIMARY KEY, checkpoint INTEGER, name TEXT, file INTEGER, position INTEGER,
    dtype TEXT, shape TEXT, indexed INTEGER DEFAULT 0, UNIQUE (checkpoint, name)
)
"""
_INSERT = """
INSERT INTO tensors (checkpoint, name, file, position, dtype, shape) VALUES (?, ?, ?, ?, ?, ?)
"""
_INDEXED = "UPDATE tensors SET indexed = 1 WHERE checkpoint = ? AND name = ? AND file = ?"
_DIFFERENT = """
SELECT base.name, base.dtype, base.shape, other.dtype, other.shape
FROM tensors AS base LEFT JOIN tensors AS other ON other.checkpoint = ? AND other.name = base.name
WHERE base.checkpoint = ? AND (
    other.name IS NULL OR other.dtype <> base.dtype OR other.shape <> base.shape
) ORDER BY base.number LIMIT 1
"""
_UNKNOWN = """
SELECT other.name FROM tensors AS other WHERE other.checkpoint = ? AND NOT EXISTS (
    SELECT 1 FROM tensors AS base WHERE base.checkpoint = ? AND base.name = other.name
) ORDER BY other.number LIMIT 1
"""
_ITEMS = """
SELECT item.name, item.dtype, item.shape, partner.dtype, partner.shape
FROM tensors AS item LEFT JOIN tensors AS partner
ON partner.checkpoint = item.checkpoint AND partner.name = item.name || ?
WHERE item.checkpoint = ? AND substr(item.name, ?) <> ? ORDER BY item.number
"""
_LONE = """
SELECT partner.name FROM tensors AS partner
WHERE partner.checkpoint = ? AND substr(partner.name, ?) = ? AND NOT EXISTS (
    SELECT 1 FROM tensors AS item WHERE item.checkpoint = partner.checkpoint
    AND item.name = substr(partner.name, 1, length(partner.name) + ?)
    AND substr(item.name, ?) <> ?
) ORDER BY partner.number LIMIT 1
"""
_BATCH = 256  # entries of an index at a time
_RECENT = 64  # places kept in memory: a tensor's is asked for several times in a row


class StoredHeaders:
    """The headers of a checkpoint folder; those of several may share a `database`.

    `files` are its shards and `has_index` says whether an index names them. Everything that can be
    checked without the data has been, as by `ShardHeaders`.

    Raises:
        FileNotFoundError: no weights in the folder, or a shard of the index is missing.
        ValueError: a shard is corrupt or truncated, or the index and the shards disagree, or
            nothing is in them.
        OSError: no room for the database.
    """

    def __init__(self, folder: Path, database: ScratchDatabase) -> None:
        self.folder, self._database = folder, database
        database.run(_SCHEMA)
        row = database.first("SELECT COALESCE(MAX(checkpoint) + 1, 0) FROM tensors")
        assert row is not None
        self._number: int = row[0]
        self._place_of = lru_cache(_RECENT)(self._find_place)
        named = {file for _, file in index_entries(folder)}
        self.has_index = bool(named)
        self.files = [folder / name for name in sorted(named or {SINGLE_FILE})]
        for place, path in enumerate(self.files):
            self._add(place, path)
        if self.has_index:
            self._compare_with_index()
        if not len(self):
            raise ValueError(f"{folder}: holds no tensors")

    def __len__(self) -> int:
        """How many tensors."""
        return self._count("SELECT COUNT(*) FROM tensors WHERE checkpoint = ?")

    def items_with(self, suffix: str) -> Iterator[tuple[str, TensorInfo, TensorInfo | None]]:
        """Tensors in the order of the files, each with the one whose name goes on with `suffix`.

        Those with `suffix` are no items themselves.
        """
        rows = self._database.rows(_ITEMS, suffix, self._number, -len(suffix), suffix)
        for name, dtype, shape, *other in rows:
            partner = None if other[0] is None else info_of(*other)
            yield name, info_of(dtype, shape), partner

    def lone(self, suffix: str) -> str | None:
        """A tensor whose name ends with `suffix` and that goes with none of `items_with`."""
        end = -len(suffix)
        row = self._database.first(_LONE, self._number, end, suffix, end, end, suffix)
        return None if row is None else str(row[0])

    def counts(self) -> dict[str, int]:
        """Tensors per file, by its name."""
        query = "SELECT file, COUNT(*) FROM tensors WHERE checkpoint = ? GROUP BY file"
        found: dict[int, int] = {}
        for file, count in self._database.rows(query, self._number):
            found[file] = count
        return {path.name: found.get(place, 0) for place, path in enumerate(self.files)}

    def check_same(self, other: "StoredHeaders") -> None:
        """Check that a checkpoint in the same database holds the same names, dtypes and shapes.

        Raises:
            ValueError: it does not; the message names the tensor.
        """
        row = self._database.first(_DIFFERENT, other._number, self._number)
        if row is not None and row[3] is None:
            raise ValueError(f"{other.folder}: {row[0]}: missing, {self.folder} has it")
        if row is not None:
            ours, theirs = info_of(row[1], row[2]), info_of(row[3], row[4])
            raise ValueError(
                f"{other.folder}: {row[0]}: {theirs.dtype} {list(theirs.shape)}, "
                f"{self.folder} has {ours.dtype} {list(ours.shape)}"
            )
        row = self._database.first(_UNKNOWN, other._number, self._number)
        if row is not None:
            raise ValueError(f"{other.folder}: {row[0]}: unaccounted for, not in {self.folder}")

    def locate(self, name: str) -> tuple[Path, int]:
        """Where the data of a tensor lies: its file, and the offset in bytes from its start."""
        return self._place_of(name)

    def _find_place(self, name: str) -> tuple[Path, int]:
        query = "SELECT file, position FROM tensors WHERE checkpoint = ? AND name = ?"
        row = self._database.first(query, self._number, name)
        if row is None:
            raise KeyError(name)
        return self.files[row[0]], row[1]

    def _add(self, place: int, path: Path) -> None:
        """Take in the header of one shard."""
        rows = [
            (self._number, name, place, position, info.dtype, stored(info.shape))
            for name, info, position in shard_tensors(path)
        ]
        try:
            self._database.run_many(_INSERT, rows)
        except UnicodeEncodeError as error:  # half a character, which JSON can say
            raise ValueError(f"{path}: a tensor's name: {error}") from error
        except sqlite3.IntegrityError as error:
            query = "SELECT file FROM tensors WHERE checkpoint = ? AND name = ?"
            for _, name, *_ in rows:
                row = self._database.first(query, self._number, name)
                if row is not None and row[0] != place:
                    raise ValueError(f"{path}: {name}: also in {self.files[row[0]].name}") from None
            raise ValueError(f"{path}: {error}") from error

    def _compare_with_index(self) -> None:
        index, place_of = self.folder / INDEX_FILE, {p.name: i for i, p in enumerate(self.files)}
        entries = index_entries(self.folder)
        while some := list(islice(entries, _BATCH)):
            rows = [(self._number, name, place_of[file]) for name, file in some]
            if self._database.run_many(_INDEXED, rows) == len(rows):
                continue
            for entry, (name, file) in zip(rows, some, strict=True):
                if not self._database.run(_INDEXED, *entry):
                    raise ValueError(f"{index}: {name}: not in {file}")
        query = "SELECT name, file FROM tensors WHERE checkpoint = ? AND NOT indexed LIMIT 1"
        row = self._database.first(query, self._number)
        if row is not None:
            raise ValueError(
                f"{index}: {row[0]}: in {self.files[row[1]].name}, but not in the index"
            )

    def _count(self, query: str) -> int:
        row = self._database.first(query, self._number)
        assert row is not None
        return int(row[0])


def stored(shape: tuple[int, ...]) -> str:
    """A shape as it is in the database."""
    return ",".join(map(str, shape))


@lru_cache(1024)  # a few shapes, thousands of tensors
def info_of(dtype: str, shape: str) -> TensorInfo:
    """A `TensorInfo` from how it is in the database."""
    return TensorInfo(dtype, tuple(map(int, shape.split(","))) if shape else ())
