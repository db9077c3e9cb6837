"""Grouped-query attention over the paged cache, through the same operators as the latent one.

A key-value head's cache row is its value followed by its rotated key. To `latent_attention` that
is a latent and a rope key: a query of zeros and the rotated query scores the keys alone, and what
is mixed are the values.

Letters: T rows, D hidden, H heads, G key-value heads, X head dims, L positions.
"""

import torch
from torch import Tensor

from dvpa import ops
from dvpa.engine.layers import Norm, fuse
from dvpa.model.attention import rotate
from dvpa.model.grouped_attention import DvpaGroupedAttention


class GroupedProjections:
    """Grouped-query attention into queries and cache rows, and out again; see `Projections`."""

    def __init__(self, attention: DvpaGroupedAttention) -> None:
        config = attention.config
        self.heads, self.groups = attention.num_heads, attention.num_key_value_heads
        self.value = self._width = config.head_dim
        self.scaling = attention.scaling
        self._interleaved = config.rope_interleave
        self._into, self._into_bias = fuse(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out, self._out_bias = attention.o_proj.weight.detach(), attention.o_proj.bias
        self._norms = None
        if config.qk_norm is not None:
            self._norms = (Norm(attention.q_norm), Norm(attention.k_norm))
        self._normed_width = config.head_dim if config.qk_norm == "head" else None

    def enter(
        self, hidden_TD: Tensor, cos_TX: Tensor, sin_TX: Tensor, cache: Tensor, slots_T: Tensor
    ) -> Tensor:
        """Rotated queries [T, H, X]; writes the rows' places in a layer's cache."""
        projected = ops.linear(hidden_TD, self._into, self._into_bias)
        keys = self.groups * self._width
        query, key, value = projected.split([self.heads * self._width, keys, keys], 1)
        if self._norms is not None:
            query, key = (
                self._norm(norm, each) for norm, each in zip(self._norms, (query, key), strict=True)
            )
        turned = (cos_TX[:, None], sin_TX[:, None], self._interleaved)
        query_THX = rotate(query.unflatten(1, (self.heads, -1)), *turned)
        key_TGX = rotate(key.unflatten(1, (self.groups, -1)), *turned)
        rows_TGW = torch.cat((value.unflatten(1, (self.groups, -1)), key_TGX), -1)
        cache.flatten(1, 2).index_copy_(1, slots_T, rows_TGW.transpose(0, 1))
        return query_THX

    def decode(
        self,
        query_THX: Tensor,
        cache: Tensor,
        page_table: Tensor,
        row_sequence: Tensor,
        row_length: Tensor,
    ) -> Tensor:
        """Values [T, H, X] that single rows attend to; see `ops.latent_attention` for the table."""
        table = (page_table, row_sequence, row_length)
        padded_THW = torch.cat((torch.zeros_like(query_THX), query_THX), -1)
        mixed = [
            ops.latent_attention(query.contiguous(), rows, *table, self._width, self.scaling)
            for query, rows in zip(padded_THW.chunk(self.groups, 1), cache, strict=True)
        ]
        return torch.cat(mixed, 1)

    def expand(self, cache: Tensor, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [L, H, X] of every head, of the first `length` rows of these pages."""
        rows_LGW = cache[:, pages].flatten(1, 2)[:, :length].transpose(0, 1)
        value, key = rows_LGW.repeat_interleave(self.heads // self.groups, 1).chunk(2, -1)
        return key, value

    def leave(self, mixed_THX: Tensor) -> Tensor:
        """Values of all heads to the residual stream, [T, D]."""
        return ops.linear(mixed_THX.flatten(1), self._out, self._out_bias)

    def _norm(self, norm: Norm, x: Tensor) -> Tensor:
        """Over each head, or over the whole row."""
        rows = x.contiguous().view(-1, self._normed_width or x.shape[1])
        return norm(rows).view(x.shape)
