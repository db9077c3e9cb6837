"""Checkpoints as files: shards, other families taken in, and one tier as a plain checkpoint."""

from dvpa.checkpoint.convert import ConversionReport, convert_checkpoint
from dvpa.checkpoint.export import ExportReport, TierSize, export_tier, list_tiers
from dvpa.checkpoint.shards import ShardReader, ShardWriter, TensorInfo, staged_folder

__all__ = [
    "ConversionReport",
    "ExportReport",
    "ShardReader",
    "ShardWriter",
    "TensorInfo",
    "TierSize",
    "convert_checkpoint",
    "export_tier",
    "list_tiers",
    "staged_folder",
]
