"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache holds, per token and layer, only the normalised latent (`kv_lora_rank`) and the shared
rotary key (`qk_rope_head_dim`). Prompts expand the latent to keys and values per head; a single
decoded token uses the absorbed form instead, where `kv_b_proj` moves over to the query and the
output, so that the cache is read once and never expanded.

Letters: B batch, S new tokens, L cached + new tokens, H heads, N no-rope dims, P rope dims, V value
dims, C latent.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dvpa.config import DvpaConfig

LATENT_NORM_EPS = 1e-6  # DeepSeek-V3 fixes it: `rms_norm_eps` is for the hidden-size norms only


class DvpaRMSNorm(nn.Module):
    """RMS normalisation in fp32, scaled in the input's dtype."""

    def __init__(self, size: int, eps: float = LATENT_NORM_EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x32.to(x.dtype)


class DvpaAttention(nn.Module):
    """MLA over any Transformers `Cache`; names and shapes are DeepSeek-V3's."""

    def __init__(self, config: DvpaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = (
            1  # keys are handed over once per head, broadcast without a copy
        )
        self.is_causal = True
        self.attention_dropout = config.attention_dropout
        bias, heads = config.attention_bias, self.num_heads
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = DvpaRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias
        )
        self.kv_a_layernorm = DvpaRMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=bias)
        self.scaling = _softmax_scale(config)

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
        query = self._query(hidden_BSD).view(batch, length, self.num_heads, -1).transpose(1, 2)
        q_nope_BHSN, q_rope_BHSP = query.split(
            [config.qk_nope_head_dim, config.qk_rope_head_dim], -1
        )
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_BSD).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], -1
        )
        latent_B1SC = self.kv_a_layernorm(latent)[:, None]
        q_rope_BHSP, k_rope_B1SP = _rotate_both(
            q_rope_BHSP, k_rope[:, None], *position_embeddings, interleaved=config.rope_interleave
        )
        absorbed = False
        latent_B1LC, k_rope_B1LP = latent_B1SC, k_rope_B1SP
        if past_key_values is not None:
            absorbed = length == 1 and past_key_values.get_seq_length(self.layer_idx) > 0
            latent_B1LC, k_rope_B1LP = past_key_values.update(
                latent_B1SC, k_rope_B1SP, self.layer_idx
            )

        key_up_HNC, value_up_HVC = self.kv_b_proj.weight.view(
            self.num_heads, -1, config.kv_lora_rank
        ).split([config.qk_nope_head_dim, config.v_head_dim], 1)
        if absorbed:
            q_nope = torch.matmul(q_nope_BHSN, key_up_HNC)  # [B, H, S, C]
            k_nope = value = latent_B1LC.expand(-1, self.num_heads, -1, -1)
        else:
            q_nope = q_nope_BHSN
            expanded = self.kv_b_proj(latent_B1LC[:, 0]).unflatten(-1, (self.num_heads, -1))
            k_nope, value = expanded.transpose(1, 2).split(
                [config.qk_nope_head_dim, config.v_head_dim], -1
            )
        key = torch.cat((k_nope, k_rope_B1LP.expand(-1, self.num_heads, -1, -1)), -1)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation, eager_attention_forward
        )
        mixed_BSHX, _ = attend(
            self,
            torch.cat((q_nope, q_rope_BHSP), -1),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if absorbed:
            mixed_BSHX = torch.einsum("bshc,hvc->bshv", mixed_BSHX, value_up_HVC)
        out: Tensor = self.o_proj(mixed_BSHX.reshape(batch, length, -1))
        return out

    def _query(self, hidden_BSD: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(hidden_BSD)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BSD)))


def eager_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention; the softmax is fp32. Returns ([B, S, H, V], weights [B, H, S, L])."""
    if module.num_key_value_groups > 1:
        key = key.repeat_interleave(module.num_key_value_groups, 1)
        value = value.repeat_interleave(module.num_key_value_groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def _rotate_both(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotary embedding; `interleaved` weights store the pairs side by side and are parted first."""
    cos, sin = cos[:, None], sin[:, None]
    return rotate(query, cos, sin, interleaved), rotate(key, cos, sin, interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of the last dimension."""
    if interleaved:
        x = torch.cat((x[..., ::2], x[..., 1::2]), -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _softmax_scale(config: DvpaConfig) -> float:
    """1 / sqrt(query width), times the squared YaRN magnitude where the rope is stretched (V3)."""
    rope, scale = config.rope_parameters or {}, config.qk_head_dim**-0.5
    magnitude, factor = rope.get("mscale_all_dim", 0), rope.get("factor", 1.0)
    if rope.get("rope_type", "default") != "default" and magnitude and factor > 1:
        scale *= (0.1 * magnitude * math.log(factor) + 1.0) ** 2
    return scale
