"""What a process holds of a model's tensors: where its slices lie in the whole ones.

Letters: G groups, P experts of a group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from dvpa.model import DvpaForCausalLM
from dvpa.model.decoder import DvpaRotaryEmbedding
from dvpa_train.stacked import is_stacked

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Slice:
    """`local` is `whole[index]`, of a tensor of `shape`; stacked experts are seen as [G, P, ..]."""

    local: Tensor
    shape: tuple[int, ...]
    index: Index
    is_stacked: bool

    def put(self, first: int, rows: Tensor) -> None:
        """Copy what is held of the whole tensor's rows (of stacked experts: experts) from `first`.

        Args:
            rows: [n, ...].
        """
        if self.is_stacked:
            for expert, index, local in self.experts(first, first + len(rows)):
                local.copy_(rows[expert - first][index])
            return
        start, stop = self.index[0].start, self.index[0].stop
        low, high = max(first, start), min(first + len(rows), stop)
        if low < high:
            held = rows[low - first : high - first][(slice(None), *self.index[1:])]
            self.local[low - start : high - start].copy_(held)

    def experts(
        self, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, Index, Tensor]]:
        """Those of `first` .. `last` - 1 that are held: number, index inside, values."""
        size, places = self.shape[1], self.index[1]
        for group, held in enumerate(self.local):
            for place, local in zip(range(places.start, places.stop), held, strict=True):
                expert = group * size + place
                if first <= expert and (last is None or expert < last):
                    yield expert, self.index[2:], local


def slices_of(model: DvpaForCausalLM) -> dict[str, Slice]:
    """Every tensor of the state dict by name, in its order; shared ones once."""
    slices: dict[str, Slice] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            slices[name] = slice_of(name, tensor)
    return slices


def slice_of(name: str, tensor: Tensor) -> Slice:
    """What this process holds of one tensor."""
    local: Any = tensor.detach()
    index = [slice(0, size) for size in tensor.shape]
    if isinstance(local, DTensor):
        index, local = _index(local), local.to_local()
    shape = tuple(tensor.shape)
    if is_stacked(name) and tensor.dim() == 3:  # whole: all experts as one group
        local, shape, index = local[None], (1, *shape), [slice(0, 1), *index]
    return Slice(local, shape, tuple(index), is_stacked(name))


def _index(tensor: DTensor) -> list[slice]:
    """Where the local part lies; PyTorch cuts an axis as `torch.chunk` does."""
    index = [slice(0, size) for size in tensor.shape]
    for axis_of_mesh, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        assert isinstance(placement, Shard), placement
        axis, mesh = placement.dim, tensor.device_mesh
        size = tensor.shape[axis]
        assert index[axis] == slice(0, size), "cut once"
        step = -(-size // mesh.size(axis_of_mesh))
        start = min(mesh.get_local_rank(axis_of_mesh) * step, size)
        index[axis] = slice(start, min(start + step, size))
    assert tuple(i.stop - i.start for i in index) == tensor.to_local().shape
    return index


def materialise(model: DvpaForCausalLM, device: torch.device | str) -> None:
    """Give a model on the meta device memory for what this process holds; values are arbitrary."""
    model.to_empty(device=device)
    model.tie_weights()
    # Transformers' rotary tables are computed, not stored.
    model.model.rotary_emb = DvpaRotaryEmbedding(config=model.config).to(device)
