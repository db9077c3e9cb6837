"""Routing tables -> ragged rows sorted by expert.

Letters: T tokens, K slots, E experts, R rows (the sum over tokens of their own k).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowRouting:
    """Rows of a grouped GEMM: row r multiplies token `token_index[r]` with one expert.

    `token_index` int64 [R] and `weight` [R] are sorted by expert (stable in token order);
    `expert_offsets` int32 [E + 1] bounds the rows of each expert; `num_tokens` is T.
    """

    token_index: Tensor
    weight: Tensor
    expert_offsets: Tensor
    num_tokens: int

    @property
    def num_experts(self) -> int:
        """E."""
        return self.expert_offsets.shape[0] - 1


def make_routing(topk_index: Tensor, topk_weight: Tensor, num_experts: int) -> RowRouting:
    """Sort the routing table [T, K] by expert and drop its empty slots (index == num_experts).

    Raises:
        ValueError: shapes differ, or (on CPU, where looking costs nothing) an index is out of
        range.
    """
    if topk_index.dim() != 2 or topk_index.shape != topk_weight.shape:
        raise ValueError(
            f"topk_index, topk_weight: shapes {tuple(topk_index.shape)} and "
            f"{tuple(topk_weight.shape)} must both be [tokens, slots]"
        )
    flat = topk_index.flatten()
    if flat.device.type == "cpu" and flat.numel():
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high > num_experts:
            raise ValueError(f"topk_index: {low} .. {high} must be in 0 .. {num_experts}")
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=flat.device)
    offsets[1:] = counts.cumsum(0)
    # The row count is data dependent: this is the one place that waits for the device.
    order = flat.argsort(stable=True)[: int(offsets[-1])]
    return RowRouting(
        token_index=order // topk_index.shape[1],
        weight=topk_weight.flatten()[order],
        expert_offsets=offsets,
        num_tokens=topk_index.shape[0],
    )
