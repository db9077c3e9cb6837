"""Checkpoints as files: shards, merging, other families taken in, a tier as a plain checkpoint.

Loads lazily.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "ConversionReport": "convert",
    "TierSize": "export",
    "convert_checkpoint": "convert",
    "list_tiers": "export",
    "ExportReport": "export",
    "ShardReader": "shards",
    "ShardWriter": "shards",
    "TensorInfo": "headers",
    "export_tier": "export",
    "staged_folder": "folders",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dvpa.checkpoint' has no attribute {name!r}")
    return getattr(import_module(f"dvpa.checkpoint.{_EXPORTS[name]}"), name)
