"""A database for what need not be in memory: on the disk, without a name, gone with its owner."""

import errno
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Sequence
from threading import RLock
from typing import Any

Row = tuple[Any, ...]
_CACHE_KIB = 512  # of pages; the rest is in a temporary file
_PAGE = 256  # rows taken at a time


class ScratchDatabase:
    """SQLite's temporary database, for any thread.

    Raises (every method):
        OSError: the disk with the temporary files is full or fails.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        # No file name: a temporary file that SQLite removes itself.
        self._connection = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        weakref.finalize(self, self._connection.close)
        for pragma in (f"cache_size = -{_CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF"):
            self._connection.execute(f"PRAGMA {pragma}").close()

    def run(self, statement: str, *values: Any) -> int:
        """Carry out a statement; how many rows it changed.

        Raises:
            sqlite3.IntegrityError: it breaks a constraint.
        """
        with self._lock, _FULL:
            return self._connection.execute(statement, values).rowcount

    def run_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> int:
        """Carry out a statement for each row; an IntegrityError leaves those before it."""
        with self._lock, _FULL:
            return self._connection.executemany(statement, rows).rowcount

    def first(self, query: str, *values: Any) -> Row | None:
        """The first row that a query finds."""
        with self._lock, _FULL:
            row: Row | None = self._connection.execute(query, values).fetchone()
            return row

    def rows(self, query: str, *values: Any) -> Iterator[Row]:
        """All rows that a query finds, some at a time; one thread may go through them."""
        with self._lock, _FULL:
            cursor = self._connection.execute(query, values)
        while True:
            with self._lock, _FULL:
                rows = cursor.fetchmany(_PAGE)
            if not rows:
                return
            yield from rows


class _DiskErrors:
    """SQLite's words for a disk that is full or fails, as the `OSError` that others raise."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, sqlite3.OperationalError):
            where = "temporary database (SQLITE_TMPDIR, /var/tmp or /tmp)"
            raise OSError(errno.ENOSPC, str(error), where) from error


_FULL = _DiskErrors()
