"""Records of a local data file, each with the line it starts on, so that every complaint can name
file and line.

Two forms are read: JSON Lines (one object per line, blank lines ignored) and one JSON array of
objects. The whole file is held in memory: task files are megabytes. Text is UTF-8, with or without
a byte order mark.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_text(path: str | Path) -> str:
    """The file as text; ValueError naming file and line where it is not UTF-8, FileNotFoundError
    where it is missing.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not valid UTF-8 ({error.reason})") from error


def read_records(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Pairs (line number from 1, object) in file order; ValueError naming file:line on anything
    else than objects.
    """
    text = read_text(path)
    pairs = _array(path, text) if text.lstrip()[:1] == "[" else _lines(path, text)
    for line, value in pairs:
        if not isinstance(value, dict):
            raise ValueError(f"{path}:{line}: expected a JSON object, got {type(value).__name__}")
        yield line, value


def _lines(path: str | Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): U+2028 and its kin may stand unescaped inside a JSON string.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{line}: not valid JSON ({error.msg})") from error
        yield line, value


def _array(path: str | Path, text: str) -> Iterator[tuple[int, Any]]:
    # Element by element, because json.loads forgets where an element began.
    decoder = json.JSONDecoder()
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    separator = text[position : position + 1]
    while separator != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
        yield line, value
        position = _skip(text, position)
        separator = text[position : position + 1]
        if separator not in {",", "]"}:
            raise ValueError(f"{path}:{_line_at(text, position)}: expected ',' or ']'")
        if separator == ",":
            position = _skip(text, position + 1)
    position = _skip(text, position + 1)
    if position < len(text):
        raise ValueError(f"{path}:{_line_at(text, position)}: text after the array")


def _line_at(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
