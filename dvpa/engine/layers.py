"""The parts of a decoder layer as the flattened pass runs them: plain weights, few operators.

Projections that read the same input are one matrix. The model's own parameters become views of it,
so that no weight is held twice; only `kv_b_proj` is, in the two shapes the absorbed form multiplies
with (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Letters: T rows, D hidden, H heads, N no-rope dims, P rope dims, V value dims, C latent, F width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvpa import ops
from dvpa.model.attention import DvpaAttention, DvpaRMSNorm, rotate
from dvpa.model.experts import DvpaMLP


class Norm:
    """An RMS norm."""

    def __init__(self, norm: DvpaRMSNorm) -> None:
        self.weight, self.eps = norm.weight.detach(), norm.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return ops.rms_norm(x, self.weight, self.eps)


class Mlp:
    """A SwiGLU MLP: a dense layer's, or the shared experts'."""

    def __init__(self, mlp: DvpaMLP) -> None:
        self.gate_up, _ = fuse(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj.weight.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        gate, up = ops.linear(x, self.gate_up).chunk(2, -1)
        return ops.linear(F.silu(gate) * up, self.down)


class Projections:
    """What of multi-head latent attention is linear: into queries and cache rows, and out again."""

    def __init__(self, attention: DvpaAttention) -> None:
        config = attention.config
        self.heads, self.scaling = attention.num_heads, attention.scaling
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent, self.value = config.kv_lora_rank, config.v_head_dim
        self._interleave = config.rope_interleave
        down = attention.kv_a_proj_with_mqa
        if config.q_lora_rank is None:
            self._into, self._bias = fuse(attention.q_proj, down)
            self._query_norm, self._query_up = None, None
        else:
            self._into, self._bias = fuse(attention.q_a_proj, down)
            self._query_norm = Norm(attention.q_a_layernorm)
            self._query_up = attention.q_b_proj.weight.detach()
        self._latent_norm = Norm(attention.kv_a_layernorm)
        self.key_value_up = attention.kv_b_proj.weight.detach()
        key_up_HNC, value_up_HVC = self.key_value_up.view(self.heads, -1, self.latent).split(
            [self.nope, self.value], 1
        )
        self._key_up_HCN = key_up_HNC.transpose(1, 2).contiguous()
        self._value_up_HVC = value_up_HVC.contiguous()
        self._out = attention.o_proj.weight.detach()
        self._out_bias = attention.o_proj.bias

    def enter(self, hidden_TD: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [T, H, N + P] and cache rows [T, C + P], both rotated."""
        projected = ops.linear(hidden_TD, self._into, self._bias)
        row_width = self.latent + self.rope
        query, row = projected.split([projected.shape[1] - row_width, row_width], 1)
        if self._query_up is not None:
            assert self._query_norm is not None
            query = ops.linear(self._query_norm(query.contiguous()), self._query_up)
        query_THX = query.unflatten(1, (self.heads, -1))
        q_nope, q_rope = query_THX.split([self.nope, self.rope], -1)
        latent, k_rope = row.split([self.latent, self.rope], -1)
        q_rope = rotate(q_rope, cos_TP[:, None], sin_TP[:, None], self._interleave)
        k_rope = rotate(k_rope, cos_TP, sin_TP, self._interleave)
        rows = torch.cat((self._latent_norm(latent.contiguous()), k_rope), -1)
        return torch.cat((q_nope, q_rope), -1), rows

    def absorb(self, query_THX: Tensor) -> Tensor:
        """Queries in the latent space of the cache, [T, H, C + P]."""
        q_nope, q_rope = query_THX.split([self.nope, self.rope], -1)
        return torch.cat((ops.linear(q_nope.contiguous(), self._key_up_HCN), q_rope), -1)

    def values(self, mixed_THC: Tensor) -> Tensor:
        """Mixed latents to values, [T, H, V]."""
        return ops.linear(mixed_THC, self._value_up_HVC)

    def expand(self, rows_LW: Tensor) -> tuple[Tensor, Tensor]:
        """Cache rows to keys [L, H, N + P] and values [L, H, V] of every head."""
        latent, k_rope = rows_LW.split([self.latent, self.rope], -1)
        expanded = ops.linear(latent.contiguous(), self.key_value_up)
        k_nope, value_LHV = expanded.unflatten(1, (self.heads, -1)).split(
            [self.nope, self.value], -1
        )
        key_LHX = torch.cat((k_nope, k_rope[:, None].expand(-1, self.heads, -1)), -1)
        return key_LHX, value_LHV

    def leave(self, mixed_THV: Tensor) -> Tensor:
        """Values of all heads to the residual stream, [T, D]."""
        return ops.linear(mixed_THV.flatten(1), self._out, self._out_bias)


def fuse(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """One weight and bias for layers that read the same input; their own become views of them."""
    with torch.no_grad():
        weight = torch.cat([layer.weight.detach() for layer in layers])
        sizes = [layer.out_features for layer in layers]
        for layer, part in zip(layers, weight.split(sizes), strict=True):
            layer.weight.data = part
        if all(layer.bias is None for layer in layers):
            return weight, None
        biases: list[Tensor] = [
            weight.new_zeros(size) if layer.bias is None else layer.bias.detach()
            for layer, size in zip(layers, sizes, strict=True)
        ]
        return weight, torch.cat(biases)
