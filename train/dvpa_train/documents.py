"""Documents from text, JSON Lines and Parquet files, one at a time.

What cannot be used is handed on with the reason instead of being dropped here, so that it is
counted: `empty`, `bad_utf8`, `bad_json`, `no_text` (no object, or the field is missing or no text).
"""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

TEXT, JSONL, PARQUET = (".txt", ".text", ".md"), (".jsonl", ".ndjson"), (".parquet",)
REASONS = ("empty", "bad_utf8", "bad_json", "no_text")
Unit = Literal["file", "paragraph", "line"]


@dataclass(frozen=True)
class Document:
    """`text`, or the `problem` why there is none. `where`: file and line or row, for messages.

    `position`: how far into the file the reader is, in bytes of it (for progress only).
    """

    text: str
    problem: str | None
    where: str
    position: int


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that names and glob patterns stand for, in their order; matches are sorted.

    Raises:
        FileNotFoundError: a name or pattern matches nothing.
        ValueError: a file is meant twice, or its ending says no format.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        matches = (
            [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        )
        files = [match for match in matches if match.is_file()]
        if not files:
            raise FileNotFoundError(f"{pattern}: no such file")
        found += files
    seen: set[Path] = set()
    for path in found:
        _format(path)
        if path.resolve() in seen:
            raise ValueError(f"{path}: given twice")
        seen.add(path.resolve())
    return found


def read_documents(path: Path, field: str, unit: Unit) -> Iterator[Document]:
    """Every document of a file.

    Args:
        field: the text's name in JSON objects and Parquet columns.
        unit: what a document is in a text file: all of it, a paragraph (blank lines between), or a
            line.

    Raises:
        ValueError: an unknown ending, a damaged .gz or .parquet file, or a column is missing.
        ImportError: a Parquet file, but no pyarrow.
    """
    kind = _format(path)
    if kind in PARQUET:
        yield from _parquet(path, field)
        return
    with path.open("rb") as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            if kind in JSONL:
                yield from _json_lines(path, file, raw, field)
            else:
                yield from _texts(path, file, raw, unit)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from None


def _format(path: Path) -> str:
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in (*TEXT, *JSONL, *PARQUET) or (kind in PARQUET and path.suffix == ".gz"):
        allowed = ", ".join((*TEXT, *JSONL, *PARQUET))
        raise ValueError(f"{path}: its ending must be one of {allowed}, or text or JSONL and .gz")
    return kind


def _texts(path: Path, file: Any, raw: BinaryIO, unit: Unit) -> Iterator[Document]:
    if unit == "file":
        content = file.read()
        yield _decoded(content, str(path), raw.tell())
        return
    collected: list[bytes] = []
    first = 1
    for number, line in enumerate(file, start=1):
        if line.strip():
            if not collected:
                first = number
            collected.append(line)
        if collected and (unit == "line" or not line.strip()):
            yield _decoded(b"".join(collected).rstrip(b"\r\n"), f"{path}:{first}", raw.tell())
            collected = []
    if collected:
        yield _decoded(b"".join(collected).rstrip(b"\r\n"), f"{path}:{first}", raw.tell())


def _json_lines(path: Path, file: Any, raw: BinaryIO, field: str) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        if not line.strip():  # the last line end, usually
            continue
        where, position = f"{path}:{number}", raw.tell()
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            yield Document("", "bad_utf8", where, position)
        except (ValueError, RecursionError):
            yield Document("", "bad_json", where, position)
        else:
            yield _checked(record.get(field) if isinstance(record, dict) else None, where, position)


def _parquet(path: Path, field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            f"{path}: reading Parquet needs pyarrow: pip install 'dvpa[parquet]'"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        if field not in table.schema_arrow.names:
            raise ValueError(f"no column {field!r} among {', '.join(table.schema_arrow.names)}")
        rows, size, row = max(table.metadata.num_rows, 1), path.stat().st_size, 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0):
                row += 1
                where, position = f"{path}: row {row}", size * row // rows
                try:
                    yield _checked(value.as_py(), where, position)
                except UnicodeDecodeError:  # Parquet does not enforce its own text encoding
                    yield Document("", "bad_utf8", where, position)
    except (pyarrow.ArrowException, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _decoded(content: bytes, where: str, position: int) -> Document:
    try:
        return _checked(content.decode("utf-8-sig"), where, position)
    except UnicodeDecodeError:
        return Document("", "bad_utf8", where, position)


def _checked(text: Any, where: str, position: int) -> Document:
    if not isinstance(text, str):
        return Document("", "no_text", where, position)
    if not text.strip():
        return Document("", "empty", where, position)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may spell half a surrogate pair
        return Document("", "bad_utf8", where, position)
    return Document(text, None, where, position)
