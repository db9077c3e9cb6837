"""The parts of a decoder layer as the flattened pass runs them: plain weights, few operators.

Projections that read the same input are one matrix. The model's own parameters become views of it,
so that no weight is held twice; only `kv_b_proj` is, in the two shapes the absorbed form multiplies
with (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Letters: T rows, D hidden, H heads, N no-rope dims, P rope dims, V value dims, C latent, F width.
"""

import torch
from torch import Tensor, nn

from dvpa import ops
from dvpa.model.attention import DvpaAttention, DvpaRMSNorm
from dvpa.model.experts import DvpaMLP
from dvpa.model.router import DvpaRouter, TierPlan


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
        return ops.swiglu(x, self.gate_up, self.down)


class Router:
    """Chooses each row's routed experts, inside the pool of its tier."""

    def __init__(self, router: DvpaRouter) -> None:
        config, self.tier_bias = router.config, router.tier_bias
        # Ablation gates have no kernel.
        self.module = None if config.gate == "deepseek_v3" else router
        self.weight = router.weight.detach()
        self.table = ops.RouterTable(
            pool_sizes=tuple(config.pool_size(tier) for tier in range(config.num_tiers)),
            top_k=tuple(tier.top_k for tier in config.tiers),
            topk_group=tuple(tier.topk_group for tier in config.tiers),
            scaling=tuple(tier.routed_scaling_factor for tier in config.tiers),
            group_size=config.group_size,
            norm_topk_prob=config.norm_topk_prob,
            softmax=config.scoring_func == "softmax",
            best_of_group=2 if config.topk_method == "noaux_tc" else 1,
            stripes=config.n_group if config.pool == "striped" else 0,
        )

    def __call__(self, x: Tensor, tiers_T: Tensor, max_tier: int) -> tuple[Tensor, Tensor]:
        """[T, D] -> (experts [T, K], their weights [T, K])."""
        if self.module is not None:
            routing = self.module(x, TierPlan(tiers_T, max_tier))
            return routing.topk_index, routing.topk_weight
        return ops.route(x, self.weight, self.tier_bias, tiers_T, self.table, max_tier)


class Projections:
    """What of multi-head latent attention is linear: into queries and cache rows, and out again."""

    def __init__(self, attention: DvpaAttention) -> None:
        config = attention.config
        self.heads, self.scaling = attention.num_heads, attention.scaling
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent, self.value = config.kv_lora_rank, config.v_head_dim
        has_query_latent = config.q_lora_rank is not None
        query = attention.q_a_proj if has_query_latent else attention.q_proj
        into, into_bias = fuse(query, attention.kv_a_proj_with_mqa)
        self.key_value_up = attention.kv_b_proj.weight.detach()
        key_up_HNC, value_up_HVC = self.key_value_up.view(self.heads, -1, self.latent).split(
            [self.nope, self.value], 1
        )
        self.weights = ops.AttentionWeights(
            into=into,
            into_bias=into_bias,
            query_norm=attention.q_a_layernorm.weight.detach() if has_query_latent else None,
            query_up=attention.q_b_proj.weight.detach() if has_query_latent else None,
            latent_norm=attention.kv_a_layernorm.weight.detach(),
            key_up=key_up_HNC.transpose(1, 2).contiguous(),
            value_up=value_up_HVC.contiguous(),
            out=attention.o_proj.weight.detach(),
            out_bias=attention.o_proj.bias,
            eps=attention.kv_a_layernorm.variance_epsilon,
            scaling=attention.scaling,
            interleaved=config.rope_interleave,
        )

    def enter(
        self, hidden_TD: Tensor, cos_TP: Tensor, sin_TP: Tensor, cache: Tensor, slots_T: Tensor
    ) -> Tensor:
        """Rotated queries [T, H, N + P]; writes the rows' places in a layer's cache."""
        weights = self.weights
        projected = ops.linear(hidden_TD, weights.into, weights.into_bias)
        row_width = self.latent + self.rope
        query, row = projected.split([projected.shape[1] - row_width, row_width], 1)
        if weights.query_norm is not None and weights.query_up is not None:
            query = ops.rms_norm(query.contiguous(), weights.query_norm, weights.eps)
            query = ops.linear(query, weights.query_up)
        return ops.latent_rows(
            query,
            row,
            weights.latent_norm,
            weights.eps,
            cos_TP,
            sin_TP,
            weights.interleaved,
            cache,
            slots_T,
            self.heads,
            self.nope,
        )

    def decode(
        self,
        query_THX: Tensor,
        cache: Tensor,
        page_table: Tensor,
        row_sequence: Tensor,
        row_length: Tensor,
    ) -> Tensor:
        """Values [T, H, V] that single rows attend to, in the absorbed form.

        See `ops.latent_attention` for the table.
        """
        q_nope, q_rope = query_THX.split([self.nope, self.rope], -1)
        absorbed = torch.cat((ops.linear(q_nope.contiguous(), self.weights.key_up), q_rope), -1)
        table = (page_table, row_sequence, row_length)
        mixed_THC = ops.latent_attention(absorbed, cache, *table, self.latent, self.scaling)
        return ops.linear(mixed_THC, self.weights.value_up)

    def expand(self, cache: Tensor, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys [L, H, N + P] and values [L, H, V] of the first `length` rows of these pages."""
        rows_LW = cache[pages].flatten(0, 1)[:length]
        latent, k_rope = rows_LW.split([self.latent, self.rope], -1)
        expanded = ops.linear(latent.contiguous(), self.key_value_up)
        k_nope, value_LHV = expanded.unflatten(1, (self.heads, -1)).split(
            [self.nope, self.value], -1
        )
        key_LHX = torch.cat((k_nope, k_rope[:, None].expand(-1, self.heads, -1)), -1)
        return key_LHX, value_LHV

    def leave(self, mixed_THV: Tensor) -> Tensor:
        """Values of all heads to the residual stream, [T, D]."""
        return ops.linear(mixed_THV.flatten(1), self.weights.out, self.weights.out_bias)


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
