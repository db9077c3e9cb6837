"""How far merged checkpoints are from the formula, and from each other."""

from pathlib import Path

import torch
from torch import Tensor

from dvpa.checkpoint.shards import ShardReader


def exactness(parents: Path, out: Path, shares: tuple[float, float]) -> dict[str, int]:
    """How many elements of the result differ from fp32's shares of A and B rounded to bf16, and by
    how many units in the last place at most.
    """
    readers = [ShardReader(folder) for folder in (parents / "parent_a", parents / "parent_b", out)]
    elements = differing = largest = 0
    for name in readers[0].tensors:
        left, right, result = (reader.read(name) for reader in readers)
        wanted = (left.float() * shares[0] + right.float() * shares[1]).to(left.dtype)
        steps = (ordered(wanted) - ordered(result)).abs()
        elements += steps.numel()
        differing += int((steps > 0).sum())
        largest = max(largest, int(steps.max()))
    return {"elements": elements, "differing": differing, "largest_ulp": largest}


def ordered(tensor: Tensor) -> Tensor:
    """bf16 as whole numbers that count its values in order."""
    raw = tensor.contiguous().view(torch.int16).int()
    return torch.where(raw < 0, -(raw & 0x7FFF), raw)


def beside_mergekit(out: Path, merged: Path) -> dict[str, int]:
    """dvpa's result against mergekit's, whose experts are packed."""
    ours, theirs = ShardReader(out), ShardReader(merged)
    elements = differing = 0
    for name in theirs.tensors:
        mine = unpacked(ours, name)
        elements += mine.numel()
        differing += int((ordered(mine) != ordered(theirs.read(name))).sum())
    return {"elements": elements, "differing": differing}


def unpacked(reader: ShardReader, name: str) -> Tensor:
    """A tensor by mergekit's name."""
    if name in reader.tensors:
        return reader.read(name)
    prefix, _, kind = name.rpartition(".")
    stack = []
    while f"{prefix}.{len(stack)}.up_proj.weight" in reader.tensors:
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        expert = [reader.read(f"{prefix}.{len(stack)}.{part}.weight") for part in parts]
        stack.append(torch.cat(expert))
    return torch.stack(stack)
