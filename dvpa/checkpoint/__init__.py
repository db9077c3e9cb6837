"""Checkpoints as files: shards, merging, other families taken in, one tier exported. Lazy."""

from importlib import import_module
from typing import Any

_MODULES = {
    "convert": "ConversionReport convert_checkpoint",
    "export": "ExportReport TierSize export_tier list_tiers",
    "folders": "staged_folder",
    "headers": "TensorInfo",
    "shards": "ShardReader ShardWriter",
}
_EXPORTS = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dvpa.checkpoint' has no attribute {name!r}")
    return getattr(import_module(f"dvpa.checkpoint.{_EXPORTS[name]}"), name)
