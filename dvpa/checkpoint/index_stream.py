"""The index of a sharded checkpoint, entry by entry, in memory that does not grow with it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

INDEX_FILE = "model.safetensors.index.json"
_BLOCK = 1 << 16  # characters read at a time
_BLANK = re.compile(r"[ \t\n\r]*")
# Another entry, as nearly all are: much faster than value by value.
_PLAIN = re.compile(r"""_,_"([^"\\\0-\x1f]*)"_:_"([^"\\\0-\x1f]*)\"""".replace("_", r"[ \t\n\r]*"))
_NUMBER = re.compile(r"[-+.0-9eE]*")
_DECODER = json.JSONDecoder()


def index_entries(folder: Path) -> Iterator[tuple[str, str]]:
    """(tensor, file name) of every entry of a folder's index, in its order; none without an index.

    Raises:
        ValueError: not an index, or a file name that leads out of the folder; perhaps after entries
            that were right.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as text:
        try:
            right = ""  # the last file name that was looked at
            for name, file in _weight_map(_Window(text)):
                # An index must not point outside of its folder.
                if not isinstance(file, str) or (file != right and Path(file).name != file):
                    raise ValueError(f"{name}: {file!r} is not a plain file name")
                right = file
                yield name, file
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a safetensors index: {error}") from error


def _weight_map(window: "_Window") -> Iterator[tuple[str, Any]]:
    """The entries of the member `weight_map` of the one object that a file holds."""
    found = False
    for key in window.members():
        if key != "weight_map":
            window.value()
        elif found:
            raise ValueError("a second weight_map")
        else:
            found = True
            yield from window.entries()
    if not found:
        raise ValueError("no weight_map")
    if window.peek():
        raise ValueError("something after its end")


class _Window:
    """A JSON text of which only a part is in memory; values are taken off its front."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at = file, "", 0

    def members(self) -> Iterator[str]:
        """The keys of an object; the caller takes each one's value before the next key."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise ValueError(f"{key!r} is not a name")
            self._take(":")
            yield key
            if self._take(",}") == "}":
                return

    def entries(self) -> Iterator[tuple[str, Any]]:
        """The keys of an object and their values."""
        for key in self.members():
            yield key, self.value()
            while plain := _PLAIN.match(self._text, self._at):
                self._at = plain.end()
                yield plain[1], plain[2]

    def value(self) -> Any:
        """The value that follows."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if self._more():
                    continue
                raise
            rest = _NUMBER.match(self._text, end)
            assert rest is not None  # it matches nothing, too
            if rest.end() == len(self._text) and self._more():
                continue  # a number may go on
            self._at = end
            return value

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            assert blank is not None  # it matches nothing, too
            self._at = blank.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _take(self, allowed: str) -> str:
        found = self.peek()
        if not found or found not in allowed:
            raise ValueError(f"{found!r} where one of {allowed!r} was expected")
        self._at += 1
        return found

    def _more(self) -> bool:
        """Read on; twice as much where a value is long, so that its cost stays linear."""
        rest = self._text[self._at :]
        block = self._file.read(max(_BLOCK, len(rest)))
        self._text, self._at = rest + block, 0
        return bool(block)
