"""Stacked experts in the model, one by one in its checkpoints, under DeepSeek-V3's names."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from dvpa.checkpoint.shards import ShardReader

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def is_stacked(name: str) -> bool:
    """Whether a tensor of the model stacks the routed experts, [E, ...] or [G, P, ...]."""
    return name.endswith((GATE_UP, DOWN))


def stored_shapes(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the checkpoint of a tensor of the model."""
    if not is_stacked(name):
        yield name, shape
        return
    *experts, rows, columns = shape
    for i in range(prod(experts)):
        if name.endswith(GATE_UP):
            for part in ("gate_proj", "up_proj"):
                yield expert_name(name, i, part), (rows // 2, columns)
        else:
            yield expert_name(name, i, "down_proj"), (rows, columns)


def stored_parts(name: str, tensor: Tensor, first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The same of its data; of stacked experts, those from number `first` on."""
    if not is_stacked(name):
        yield name, tensor
        return
    for i, expert in enumerate(tensor.flatten(0, -3), first):
        if name.endswith(GATE_UP):
            gate, up = expert.chunk(2)
            yield expert_name(name, i, "gate_proj"), gate
            yield expert_name(name, i, "up_proj"), up
        else:
            yield expert_name(name, i, "down_proj"), expert


def read_expert(reader: ShardReader, name: str, number: int, index: tuple[slice, slice]) -> Tensor:
    """The rows and columns `index` of one expert of the stacked tensor `name`; no more is read."""
    if name.endswith(DOWN):
        return reader.read(expert_name(name, number, "down_proj"), index)
    rows, columns = index
    gate, up = (expert_name(name, number, part) for part in ("gate_proj", "up_proj"))
    width = reader.tensors[gate].shape[0]
    parts = []
    for part, first in ((gate, 0), (up, width)):  # stacked one above the other
        start, stop = max(rows.start - first, 0), min(rows.stop - first, width)
        if start < stop:
            parts.append(reader.read(part, (slice(start, stop), columns)))
    return torch.cat(parts)


def expert_name(name: str, number: int, part: str) -> str:
    """In the checkpoint, of one matrix of an expert of the stacked tensor `name`."""
    return f"{name.rpartition('.')[0]}.{number}.{part}.weight"
