"""Grouped-query attention (arXiv 2305.13245): what checkpoints without multi-head latent attention
have. Chosen by `kv_lora_rank: null`.

With `qk_norm: head` every head's queries and keys are RMS-normalised (Qwen3), with `qk_norm:
projection` the whole projections are (OLMoE); both before the rotation.

Letters: B batch, S new tokens, H heads, G key-value heads, X head dims.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dvpa.config import DvpaConfig
from dvpa.model.attention import DvpaRMSNorm, eager_attention_forward, rotate


class DvpaGroupedAttention(nn.Module):
    """Attention over any Transformers `Cache`; names and shapes are Qwen3-MoE's and Mixtral's."""

    def __init__(self, config: DvpaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.num_key_value_heads = (
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.is_causal = True
        self.attention_dropout = config.attention_dropout
        self.scaling = config.head_dim**-0.5
        hidden, bias = config.hidden_size, config.attention_bias
        queries = self.num_heads * config.head_dim
        keys = self.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=bias)
        if config.qk_norm is not None:
            is_by_head = config.qk_norm == "head"
            eps = config.rms_norm_eps
            self.q_norm = DvpaRMSNorm(config.head_dim if is_by_head else queries, eps)
            self.k_norm = DvpaRMSNorm(config.head_dim if is_by_head else keys, eps)

    def forward(
        self,
        hidden_BSD: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend from S new tokens to all cached and new ones; returns [B, S, D]."""
        config, (batch, length) = self.config, hidden_BSD.shape[:2]
        query, key = self.q_proj(hidden_BSD), self.k_proj(hidden_BSD)
        if config.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        query_BSHX = query.view(batch, length, self.num_heads, -1)
        key_BSGX = key.view(batch, length, self.num_key_value_heads, -1)
        if config.qk_norm == "head":
            query_BSHX, key_BSGX = self.q_norm(query_BSHX), self.k_norm(key_BSGX)
        cos, sin = (table[:, None] for table in position_embeddings)
        query_BHSX = rotate(query_BSHX.transpose(1, 2), cos, sin, config.rope_interleave)
        key_BGSX = rotate(key_BSGX.transpose(1, 2), cos, sin, config.rope_interleave)
        value_BGSX = self.v_proj(hidden_BSD).view_as(key_BSGX).transpose(1, 2)
        if past_key_values is not None:
            key_BGSX, value_BGSX = past_key_values.update(key_BGSX, value_BGSX, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation, eager_attention_forward
        )
        mixed_BSHX, _ = attend(
            self,
            query_BHSX,
            key_BGSX,
            value_BGSX,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        out: Tensor = self.o_proj(mixed_BSHX.reshape(batch, length, -1))
        return out
