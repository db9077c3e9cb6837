"""Routing tables -> ragged rows sorted by expert, and the way back from rows to tokens.

Letters: T tokens, K slots, E experts, R rows (the sum over tokens of their own k), S = T * K slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# How operators take the tensors of a `RowRouting`, in the order of its `columns`.
COLUMNS = (
    "Tensor weight, Tensor token_index, Tensor expert_offsets, Tensor token_rows, "
    "Tensor token_offsets"
)

# `dvpa.model.bundler` drops what depends on it: a flattened copy of these files has no kernels.
IS_PACKAGE = True


@dataclass(frozen=True)
class RowRouting:
    """Rows of a grouped GEMM: row r multiplies token `token_index[r]` with one expert.

    Rows are sorted by expert (stable in token order). `token_index` int64 [R] and `weight` [R]
    belong to rows; `expert_offsets` int32 [E + 1] bounds the rows of each expert; `token_rows`
    int32 [R] lists the rows of token after token, each token's in slot order, and `token_offsets`
    int32 [T + 1] bounds them. `num_tokens` is T.

    Where R is only known on the device, the three row columns have S entries instead of R; those
    from `expert_offsets[-1]` on are padding: token 0, weight 0, row 0.
    """

    token_index: Tensor
    weight: Tensor
    expert_offsets: Tensor
    token_rows: Tensor
    token_offsets: Tensor
    num_tokens: int
    is_checked: bool = False  # by make_routing; `moe_mlp` looks at the values of any other

    @property
    def num_experts(self) -> int:
        """E."""
        return self.expert_offsets.shape[0] - 1

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Its tensors as operators take them (`COLUMNS`)."""
        return (
            self.weight,
            self.token_index,
            self.expert_offsets,
            self.token_rows,
            self.token_offsets,
        )

    @classmethod
    def of_columns(cls, columns: Sequence[Tensor], num_tokens: int) -> "RowRouting":
        """What an operator was given: the inverse of `columns`, checked by its caller."""
        weight, token_index, expert_offsets, token_rows, token_offsets = columns
        return cls(token_index, weight, expert_offsets, token_rows, token_offsets, num_tokens, True)

    def without_padding(self) -> "RowRouting":
        """Cut to R rows; reads R back from the device."""
        rows = int(self.expert_offsets[-1])
        return replace(
            self,
            token_index=self.token_index[:rows],
            weight=self.weight[:rows],
            token_rows=self.token_rows[:rows],
        )


def make_routing(topk_index: Tensor, topk_weight: Tensor, num_experts: int) -> RowRouting:
    """Sort the routing table [T, K] by expert and drop its empty slots (index == num_experts).

    On CPU in eager mode the rows are cut to R. Elsewhere (a GPU, `torch.compile`) nothing waits for
    the device, so that the call can be captured in a CUDA graph: the rows keep their padding.
    Gradients flow to `topk_weight`.

    Raises:
        ValueError: shapes differ, the index is not an integer, or (on CPU, where looking costs
        nothing) it is out of range.
    """
    if topk_index.dim() != 2 or topk_index.shape != topk_weight.shape:
        raise ValueError(
            f"topk_index, topk_weight: shapes {tuple(topk_index.shape)} and "
            f"{tuple(topk_weight.shape)} must both be [tokens, slots]"
        )
    if topk_index.is_floating_point() or topk_index.dtype == torch.bool:
        raise ValueError(f"topk_index: dtype {topk_index.dtype} must be an integer")
    tokens, slots = topk_index.shape
    if topk_index.device.type == "cpu" and not torch.compiler.is_compiling():
        return _cut_to_rows(topk_index, topk_weight, num_experts)
    columns = route_rows(topk_index, num_experts)
    order, expert_offsets, token_rows, token_offsets = columns
    real = torch.arange(tokens * slots, device=order.device) < expert_offsets[-1]
    # Not a product: a padding weight may be NaN.
    weight = torch.where(real, topk_weight.flatten()[order], 0.0)
    token_index = torch.where(real, order // max(slots, 1), 0)
    return RowRouting(
        token_index, weight, expert_offsets, token_rows, token_offsets, tokens, is_checked=True
    )


def _cut_to_rows(topk_index: Tensor, topk_weight: Tensor, num_experts: int) -> RowRouting:
    """On a CPU: exactly R rows, by the compiled counting sort where there is one."""
    tokens, slots = topk_index.shape
    found = None
    if IS_PACKAGE:
        from dvpa_kernels.cpu.library import sort_rows_cpu

        found = sort_rows_cpu(topk_index, num_experts)
    if found is None:
        if topk_index.numel():
            low, high = (int(bound) for bound in topk_index.aminmax())
            if low < 0 or high > num_experts:
                raise ValueError(f"topk_index: {low} .. {high} must be in 0 .. {num_experts}")
        order, expert_offsets, token_rows, token_offsets = sort_rows(topk_index, num_experts)
        rows = int(expert_offsets[-1])
        order, token_rows = order[:rows], token_rows[:rows]
        token_index = order // max(slots, 1)
    else:
        order, token_index, expert_offsets, token_rows, token_offsets = found
    return RowRouting(
        token_index=token_index,
        weight=topk_weight.flatten()[order],
        expert_offsets=expert_offsets,
        token_rows=token_rows,
        token_offsets=token_offsets,
        num_tokens=tokens,
        is_checked=True,
    )


def sort_rows(topk_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots by expert: (slot of each row int64 [S], expert_offsets, token_rows, token_offsets).

    No size depends on the data and nothing is read back. Empty slots sort behind every row.
    """
    tokens, slots = topk_index.shape
    flat, device = topk_index.flatten(), topk_index.device
    sorted_expert, order = flat.sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=device, dtype=flat.dtype)
    expert_offsets = torch.searchsorted(sorted_expert, bounds, out_int32=True)
    # Where each slot went; a token's filled slots, in slot order, are its rows.
    row_of_slot = torch.empty_like(order)
    row_of_slot[order] = torch.arange(len(order), device=device)
    # Out of range (possible where looking would wait for the device) is as good as empty.
    filled = (flat >= 0) & (flat < num_experts)
    ends = filled.cumsum(0)
    token_offsets = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
    if slots:
        token_offsets[1:] = ends[slots - 1 :: slots]
    # Filled slots move to the front; the rest lands behind them on one spare place.
    token_rows = torch.zeros(len(order) + 1, dtype=torch.int32, device=device)
    place = torch.where(filled, ends - 1, len(order))
    token_rows[place] = torch.where(filled, row_of_slot, 0).int()
    return order, expert_offsets, token_rows[:-1], token_offsets


@torch.library.custom_op("dvpa_kernels::route_rows", mutates_args=())
def route_rows(topk_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sort_rows` as one opaque operator: a single node under `torch.compile`."""
    return sort_rows(topk_index, num_experts)


@route_rows.register_fake
def _(topk_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, slots = topk_index.shape
    return (
        topk_index.new_empty(tokens * slots, dtype=torch.int64),
        topk_index.new_empty(num_experts + 1, dtype=torch.int32),
        topk_index.new_empty(tokens * slots, dtype=torch.int32),
        topk_index.new_empty(tokens + 1, dtype=torch.int32),
    )


def check_routing(routing: RowRouting) -> None:
    """Every index and offset of a routing, by value (waits for the device).

    Raises:
        ValueError: naming the column and the allowed range.
    """
    rows = routing.token_index.numel()
    for name, wanted in (("weight", rows), ("token_rows", rows)):
        if getattr(routing, name).shape != (wanted,):
            raise ValueError(
                f"routing.{name}: shape {tuple(getattr(routing, name).shape)} must be ({wanted},)"
            )
    if routing.token_offsets.shape != (routing.num_tokens + 1,):
        raise ValueError(
            f"routing.token_offsets: shape {tuple(routing.token_offsets.shape)} must be "
            f"({routing.num_tokens + 1},)"
        )
    for name, dtype in (
        ("token_index", torch.int64),
        ("expert_offsets", torch.int32),
        ("token_rows", torch.int32),
        ("token_offsets", torch.int32),
    ):
        if getattr(routing, name).dtype != dtype:
            raise ValueError(
                f"routing.{name}: dtype {getattr(routing, name).dtype} must be {dtype}"
            )
    for name in ("expert_offsets", "token_offsets"):
        offsets = getattr(routing, name)
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last > rows or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"routing.{name}: {first} .. {last} must rise from 0 to at most {rows} rows"
            )
    real = int(routing.expert_offsets[-1])
    if int(routing.token_offsets[-1]) != real:
        raise ValueError(
            f"routing.token_offsets: {int(routing.token_offsets[-1])} rows must be the {real} of "
            "routing.expert_offsets"
        )
    for name, bound in (("token_index", routing.num_tokens), ("token_rows", real)):
        column = getattr(routing, name)[:real]
        if real and not 0 <= int(column.min()) <= int(column.max()) < bound:
            raise ValueError(
                f"routing.{name}: {int(column.min())} .. {int(column.max())} must be in "
                f"0 .. {bound - 1}"
            )
