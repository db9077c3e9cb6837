"""Lines to prepare, a small tokenizer of them, and damage to what was prepared."""

import json
from pathlib import Path

from dvpa.tasks import train_tokenizer

LINES = [f"line {i} of a rather long play, spoken by nobody at all." for i in range(60)]


def write_tokenizer(folder: Path) -> Path:
    """A small tokenizer on disk."""
    train_tokenizer(LINES, 300, folder)
    return folder


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    """A row for each text."""
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def spoil(folder: Path, name: str, how: str) -> None:
    """Leave a file out, cut it short, or flip a bit of it."""
    path = folder / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(content[:-2])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
