"""Checkpoints as files: shards, and one tier as a plain DeepSeek-V3 checkpoint."""

from dvpa.checkpoint.export import ExportReport, export_tier
from dvpa.checkpoint.shards import ShardReader, ShardWriter, TensorInfo, staged_folder

__all__ = [
    "ExportReport",
    "ShardReader",
    "ShardWriter",
    "TensorInfo",
    "export_tier",
    "staged_folder",
]
