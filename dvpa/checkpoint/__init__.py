"""Checkpoints as files: shards, other families taken in, and one tier as a plain checkpoint."""

from dvpa.checkpoint.convert import ConversionReport, convert_checkpoint
from dvpa.checkpoint.export import ExportReport, export_tier
from dvpa.checkpoint.shards import ShardReader, ShardWriter, TensorInfo, staged_folder

__all__ = [
    "ConversionReport",
    "ExportReport",
    "ShardReader",
    "ShardWriter",
    "TensorInfo",
    "convert_checkpoint",
    "export_tier",
    "staged_folder",
]
