"""Outcomes of every tier on a task set, routers compared on them, and the report. Loads lazily."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "OutcomeTable": "table",
    "collect_outcomes": "outcomes",
    "collect_text_nll": "outcomes",
    "compare_routers": "routing",
    "aggregate_reports": "aggregate",
    "build_report": "report",
    "write_report": "report",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dvpa.evaluate' has no attribute {name!r}")
    return getattr(import_module(f"dvpa.evaluate.{_EXPORTS[name]}"), name)
