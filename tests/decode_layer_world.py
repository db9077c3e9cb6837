"""Layers for the decode kernel, rows for them, and the same layer operator by operator.

Letters: T rows, D hidden, H heads, N no-rope dims, P rope dims, V value dims, C latent, Q query
latent, F width, E experts.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dvpa_kernels import (
    AttentionWeights,
    DecodeLayer,
    DecodeLayers,
    DecodeRows,
    RoutedWeights,
    RouterTable,
    make_routing,
)
from dvpa_kernels.cpu import moe_mlp_cpu
from dvpa_kernels.cpu.attention import latent_attention_cpu, latent_rows_cpu
from dvpa_kernels.cpu.dense import linear_cpu, rms_norm_cpu, swiglu_cpu
from dvpa_kernels.cpu.router import route_cpu

TABLE = RouterTable(
    pool_sizes=(4, 8, 16),
    top_k=(2, 3, 5),
    topk_group=(1, 1, 3),
    scaling=(1.4, 1.7, 2.2),
    group_size=4,
    norm_topk_prob=True,
)
PAGE_SIZE, PAGES = 4, 40


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer's sizes and what it has."""

    hidden: int = 40
    heads: int = 3
    nope: int = 12
    rope: int = 8
    value: int = 10
    latent: int = 36
    query_latent: int = 0
    width: int = 24  # of the dense MLP or the shared experts; 0: none
    expert_width: int = 20  # 0: a dense layer
    table: RouterTable = TABLE
    has_bias: bool = False
    interleaved: bool = True


SHAPES = {
    "plain": Shape(),
    "query-latent-and-biases": Shape(query_latent=23, has_bias=True),
    "halves": Shape(interleaved=False, rope=66, latent=33, nope=7, value=65),
    "dense": Shape(expert_width=0, width=77),
    "routed-only": Shape(width=0),
    "no-mlp-at-all": Shape(width=0, expert_width=0),
    "one-tier": Shape(table=RouterTable((16,), (4,), (4,), (1.0,), 4, False), hidden=130),
    "wide": Shape(hidden=1100, heads=2, query_latent=40, latent=70, expert_width=33),
}
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@dataclass(frozen=True)
class Weights:
    """What a `DecodeLayer` is made of."""

    attention_norm: Tensor
    attention: AttentionWeights
    mlp_norm: Tensor
    eps: float
    mlp: tuple[Tensor, Tensor] | None
    routed: RoutedWeights | None

    def layer(self, isa: str | None = None, **changes: Any) -> DecodeLayer:
        return DecodeLayer(**{**vars(self), **changes}, isa=isa)


def make_weights(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Weights:
    """Random ones."""
    g = torch.Generator().manual_seed(seed)

    def matrix(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, generator=g) / sizes[-1] ** 0.5).to(dtype)

    def norm(size: int) -> Tensor:
        return (1 + 0.2 * torch.randn(size, generator=g)).to(dtype)

    s = shape
    query = s.heads * (s.nope + s.rope)
    into = (s.query_latent or query) + s.latent + s.rope
    attention = AttentionWeights(
        into=matrix(into, s.hidden),
        into_bias=matrix(into) if s.has_bias else None,
        query_norm=norm(s.query_latent) if s.query_latent else None,
        query_up=matrix(query, s.query_latent) if s.query_latent else None,
        latent_norm=norm(s.latent),
        key_up=matrix(s.heads, s.latent, s.nope),
        value_up=matrix(s.heads, s.value, s.latent),
        out=matrix(s.hidden, s.heads * s.value),
        out_bias=matrix(s.hidden) if s.has_bias else None,
        eps=1e-6,
        scaling=0.3,
        interleaved=s.interleaved,
    )
    routed = None
    if s.expert_width:
        tiers, experts = len(s.table.pool_sizes), s.table.pool_sizes[-1]
        routed = RoutedWeights(
            router=matrix(experts, s.hidden),
            tier_bias=0.2 * torch.randn(tiers, experts, generator=g),
            table=s.table,
            gate_up=matrix(experts, 2 * s.expert_width, s.hidden),
            down=matrix(experts, s.hidden, s.expert_width),
        )
    return Weights(
        attention_norm=norm(s.hidden),
        attention=attention,
        mlp_norm=norm(s.hidden),
        eps=1e-5,
        mlp=(matrix(2 * s.width, s.hidden), matrix(s.hidden, s.width)) if s.width else None,
        routed=routed,
    )


@dataclass(frozen=True)
class Batch:
    """Rows of several sequences; the last of two rows that share one sees the other."""

    hidden: Tensor
    cache: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    page_table: Tensor
    row_sequence: Tensor
    row_length: Tensor
    tiers: Tensor

    @property
    def rows(self) -> DecodeRows:
        return DecodeRows(*tuple(vars(self).values())[2:])

    def take(self, *rows: int) -> "Batch":
        """The same with these rows only."""
        index = torch.tensor(rows)
        parts = {
            name: getattr(self, name)[index]
            for name in ("hidden", "cos", "sin", "slots", "row_sequence", "row_length", "tiers")
        }
        return replace(self, **parts, cache=self.cache.clone())


def make_batch(shape: Shape, rows: int, dtype: torch.dtype, seed: int = 0) -> Batch:
    """Pages that no row sees are NaN."""
    g = torch.Generator().manual_seed(seed + 1)
    sequences, pages = max(1, rows - 1), 5
    angle = torch.randn(rows, shape.rope // 2, generator=g).repeat(1, 2)
    table = torch.stack([torch.randperm(PAGES, generator=g)[:pages] for _ in range(sequences)])
    sequence = torch.arange(rows).clamp(max=sequences - 1)
    length = torch.randint(1, 12, (rows,), generator=g)
    if rows > 1:
        length[-1] = length[-2] + 1
    place = length - 1
    if sequences > 1:  # every sequence its own pages
        table = torch.arange(sequences * pages).view(sequences, pages)
    num_pages = int(table.max()) + 1
    cache = torch.randn(num_pages, PAGE_SIZE, shape.latent + shape.rope, generator=g).to(dtype)
    slots = table[sequence, place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE
    seen = torch.zeros(num_pages * PAGE_SIZE, dtype=torch.bool)
    for row in range(rows):
        positions = torch.arange(int(length[row]))
        seen[table[sequence[row], positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE] = (
            True
        )
    cache.flatten(0, 1)[~seen] = float("nan")
    return Batch(
        hidden=torch.randn(rows, shape.hidden, generator=g).to(dtype),
        cache=cache,
        cos=angle.cos().to(dtype),
        sin=angle.sin().to(dtype),
        slots=slots,
        page_table=table.int(),
        row_sequence=sequence.int(),
        row_length=length.int(),
        tiers=torch.randint(-1, len(shape.table.pool_sizes), (rows,), generator=g),
    )


def run(layer: DecodeLayer, batch: Batch, threads: int = 1) -> tuple[Tensor, Tensor]:
    """Hidden states and the cache after the layer."""
    hidden, cache = batch.hidden.clone(), batch.cache.clone()
    assert DecodeLayers([layer], [cache])(hidden, batch.rows, threads=threads) is None
    return hidden, cache


def by_operators(weights: Weights, batch: Batch, isa: str) -> tuple[Tensor, Tensor]:
    """The same, operator by operator; the arithmetic of `Decoder` and nothing of its code."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return cast("Tensor", linear_cpu(x, weight, bias, isa=isa))

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return cast("Tensor", rms_norm_cpu(x, weight, eps, isa=isa))

    a, hidden, cache = weights.attention, batch.hidden.clone(), batch.cache.clone()
    heads, latent, nope = a.key_up.shape
    row_width = cache.shape[-1]
    projected = linear(norm(hidden, weights.attention_norm, weights.eps), a.into, a.into_bias)
    query, row = projected[:, :-row_width], projected[:, -row_width:]
    if a.query_norm is not None and a.query_up is not None:
        query = linear(norm(query.contiguous(), a.query_norm, a.eps), a.query_up)
    query_THX = latent_rows_cpu(
        *(query, row, a.latent_norm, a.eps, batch.cos, batch.sin, a.interleaved),
        *(cache, batch.slots, heads, nope),
        isa=isa,
    )
    assert query_THX is not None
    absorbed = linear(query_THX[..., :nope].contiguous(), a.key_up)
    mixed = latent_attention_cpu(
        torch.cat((absorbed, query_THX[..., nope:]), -1),
        *(cache, batch.page_table, batch.row_sequence, batch.row_length, latent, a.scaling),
        isa=isa,
    )
    assert mixed is not None
    hidden = hidden + linear(linear(mixed, a.value_up).flatten(1), a.out, a.out_bias)
    normed = norm(hidden, weights.mlp_norm, weights.eps)
    if weights.mlp is not None:
        hidden = hidden + cast("Tensor", swiglu_cpu(normed, *weights.mlp, isa=isa))
    if weights.routed is not None:
        hidden = hidden + routed_by_operators(weights.routed, normed, batch.tiers, isa)
    return hidden, cache


def routed_by_operators(r: RoutedWeights, normed: Tensor, tiers: Tensor, isa: str) -> Tensor:
    """The routed experts of the layer, router included."""
    chosen = route_cpu(
        normed, r.router, r.tier_bias, tiers, r.table, max_tier=int(tiers.max()), isa=isa
    )
    assert chosen is not None
    return moe_mlp_cpu(normed, r.gate_up, r.down, make_routing(*chosen, len(r.router)), isa=isa)


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """Bit for bit, NaN included, but for the sign of a NaN."""
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
