"""Values of a study's YAML, checked: every failure is a ValueError that names the key."""

from collections.abc import Mapping
from typing import Any

_NAME = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.=%+ ")


def as_name(value: Any, where: str) -> str:
    """A name that can be shown and be part of a file's name."""
    if not isinstance(value, str) or not value.strip() or not set(value) <= _NAME:
        raise ValueError(f"{where}: {value!r} is not a name of letters, digits and -_.=%+")
    return value


def as_note(item: Mapping[str, Any], where: str) -> str:
    """A variant's note, empty without one."""
    note = item.get("note", "")
    if not isinstance(note, str):
        raise ValueError(f"{where}.note: {note!r} is not a text")
    return note


def as_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A mapping, as it is."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {value!r} is not a mapping of keys to values")
    return value


def reject_unknown(data: Mapping[str, Any], known: set[str], prefix: str) -> None:
    """Every key is one of `known`."""
    unknown = [str(key) for key in data if key not in known]
    if unknown:
        raise ValueError(f"{prefix}{unknown[0]}: unknown key; known: {', '.join(sorted(known))}")


def as_whole(value: Any, where: str, least: int) -> int:
    """A whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{where}: {value!r} is not a whole number of at least {least}")
    return value


def check_number(value: Any, where: str, low: float, high: float, is_open: bool = False) -> None:
    """A number within bounds, which are out of bounds themselves where `is_open`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (low < value < high if is_open else low <= value <= high):
        within = "between" if is_open else "from"
        raise ValueError(f"{where}: {value!r} is not a number {within} {low:g} and {high:g}")
