"""One flattened pass through the decoder: T positions of many requests, each at its own tier.

No padding and no batch axis. Positions are ordered so that those a layer runs are one slice:

    probes | decode rows, chunks | resumed after the trunk | resumed after the probe layers

Probes leave after `probe_layer`, the resumed enter with states kept from their probe. Decode rows
(and short verifications) read the cache in the absorbed form, whatever its length; chunks of a
prompt expand it to keys and values per head, which is cheaper for many positions.

Letters: T positions, D hidden, H heads, X query width, V value width, C latent, W cache row,
L visible positions, R rows with logits, S sequences, M pages of one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dvpa import ops
from dvpa.engine.cache import LatentCache
from dvpa.engine.grouped import GroupedProjections
from dvpa.engine.layers import Mlp, Norm, Projections, Router
from dvpa.model.causal_lm import DvpaForCausalLM
from dvpa.model.decoder import DvpaDecoderLayer
from dvpa.model.experts import DvpaExperts, DvpaMoE
from dvpa.model.grouped_attention import DvpaGroupedAttention

# Routed experts that are not in the module: (layer, hidden, topk_index, topk_weight) -> [T, D].
ExpertsOfLayer = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Chunk:
    """Rows `first` .. `last` - 1 of the step: positions `start` and following of one sequence."""

    first: int
    last: int
    start: int
    pages: Tensor

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + self.last - self.first


@dataclass(frozen=True)
class Step:
    """The positions of one pass, in the order above; integer tensors of length T.

    `slots` are their places in the cache. `bounds` are the row numbers where the four kinds end.
    Rows `decode` use the absorbed form: row r belongs to sequence `decode_sequence[r]` of
    `page_table` [S, M] and sees `decode_length[r]` positions.
    """

    token_ids: Tensor
    positions: Tensor
    tiers: Tensor
    max_tier: int
    slots: Tensor
    bounds: tuple[int, int, int, int]
    decode: slice
    decode_sequence: Tensor
    decode_length: Tensor
    page_table: Tensor
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Passed:
    """States after the last layer of each row (before the final norm), and the probes' on the way.

    `trunk` and `probe` [probes, D]; `probe_states` is the whole step's after the probe layers.
    """

    hidden: Tensor
    trunk: Tensor
    probe_states: Tensor


class _Layer:
    """One decoder layer's parts."""

    def __init__(self, layer: DvpaDecoderLayer) -> None:
        mlp = layer.mlp
        self.attention_norm = Norm(layer.input_layernorm)
        attention = layer.self_attn
        self.attention: Projections | GroupedProjections = (
            GroupedProjections(attention)
            if isinstance(attention, DvpaGroupedAttention)
            else Projections(attention)
        )
        self.mlp_norm = Norm(layer.post_attention_layernorm)
        self.router = Router(mlp.gate) if isinstance(mlp, DvpaMoE) else None
        self.experts: DvpaExperts | None = mlp.experts if isinstance(mlp, DvpaMoE) else None
        always_on = mlp.shared_experts if isinstance(mlp, DvpaMoE) else mlp
        self.mlp = None if always_on is None else Mlp(always_on)

    def fused(self, has_experts: bool) -> ops.DecodeLayer:
        """The same for `DecodeLayers`, up to the routed experts if they are elsewhere."""
        routed, router, experts = None, self.router, self.experts
        if router is not None and experts is not None and has_experts:
            routed = ops.RoutedWeights(
                router=router.weight,
                tier_bias=router.tier_bias,
                table=router.table,
                gate_up=experts.gate_up_proj.detach(),
                down=experts.down_proj.detach(),
            )
        assert isinstance(self.attention, Projections)
        return ops.DecodeLayer(
            attention_norm=self.attention_norm.weight,
            attention=self.attention.weights,
            mlp_norm=self.mlp_norm.weight,
            eps=self.mlp_norm.eps,
            mlp=None if self.mlp is None else (self.mlp.gate_up, self.mlp.down),
            routed=routed,
            returns_normed=router is not None and routed is None,
        )


@dataclass(frozen=True)
class _Fused:
    """Layers `first` .. `last` - 1 in one call."""

    first: int
    last: int
    run: ops.DecodeLayers


class Decoder:
    """The layers of a `DvpaForCausalLM` over a paged cache; weights are shared with the model.

    Steps of few rows, all of them decode rows, are one call for many layers on CPUs (`fused_steps`
    counts them); others, and all on other devices or with grouped-query attention, run operator by
    operator (`operator_steps`).
    """

    def __init__(
        self, model: DvpaForCausalLM, cache: LatentCache, experts: ExpertsOfLayer | None = None
    ) -> None:
        config = model.config
        self.cache = cache
        self.first_moe = config.first_k_dense_replace
        difficulty = config.difficulty
        self.probe_layer = self.first_moe if difficulty is None else difficulty.probe_layer
        self.probes_all = difficulty is not None and self.probe_layer == config.num_hidden_layers
        layers = model.model.layers[: config.num_hidden_layers]  # one more is no part of the stack
        self._layers = [_Layer(cast("DvpaDecoderLayer", layer)) for layer in layers]
        self._embedding = model.model.embed_tokens.weight.detach()
        self._rotary = model.model.rotary_emb
        self._norm = Norm(model.model.norm)
        self._head = model.lm_head.weight.detach()
        self._experts = experts
        self.fused_steps = self.operator_steps = 0
        is_latent = config.kv_lora_rank is not None
        is_fused = is_latent and ops.DecodeLayer.is_possible(self._embedding)
        self._fused = self._fuse() if is_fused else None

    def embed(self, token_ids: Tensor) -> Tensor:
        """States before the first layer, [T, D]."""
        return self._embedding[token_ids]

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Final norm and language-model head, [R, vocab]."""
        return ops.linear(self._norm(hidden_RD), self._head)

    def __call__(self, step: Step, hidden_TD: Tensor) -> Passed:
        """Run the step on `hidden_TD`, embeddings and kept states; overwrites it."""
        cos, sin = self._rotary(hidden_TD, step.positions[None])
        is_decode = step.decode == slice(0, len(hidden_TD)) and len(hidden_TD) <= ops.DECODE_ROWS
        if is_decode and self._fused is not None:
            self.fused_steps += 1
            return self._decode(self._fused, step, hidden_TD, cos[0], sin[0])
        self.operator_steps += 1
        probes, fresh, after_trunk, end = step.bounds
        trunk = probe_states = hidden_TD
        for index, layer in enumerate(self._layers):
            if index == self.first_moe:
                trunk = hidden_TD[:probes].clone()
            if index == self.probe_layer:
                probe_states = hidden_TD.clone()
            first = 0 if index < self.probe_layer else probes
            last = end if index >= self.probe_layer else after_trunk
            rows = slice(first, last if index >= self.first_moe else fresh)
            if rows.start == rows.stop:
                continue
            hidden = hidden_TD[rows]
            normed = layer.attention_norm(hidden)
            hidden = hidden + self._attend(index, normed, cos[0, rows], sin[0, rows], step, rows)
            normed = layer.mlp_norm(hidden)
            if layer.mlp is not None:
                hidden = hidden + layer.mlp(normed)
            if layer.router is not None:
                hidden = hidden + self._routed(index, normed, step.tiers[rows], step.max_tier)
            hidden_TD[rows] = hidden
        return Passed(hidden_TD, trunk, probe_states)

    def _decode(
        self, fused: list[_Fused], step: Step, hidden_TD: Tensor, cos: Tensor, sin: Tensor
    ) -> Passed:
        """A step of decode rows only; none of them is a probe's."""
        table = (step.page_table, step.decode_sequence, step.decode_length)
        rows = ops.DecodeRows(cos, sin, step.slots, *table, step.tiers)
        probe_states = hidden_TD
        for part in fused:
            if part.first == self.probe_layer:
                probe_states = hidden_TD.clone()
            normed = part.run(hidden_TD, rows)
            if normed is not None:
                hidden_TD += self._routed(part.last - 1, normed, step.tiers, step.max_tier)
        return Passed(hidden_TD, hidden_TD[:0], probe_states)

    def _fuse(self) -> list[_Fused]:
        """Parts end before the probe layer's, and where experts are elsewhere."""
        layers = [layer.fused(self._has_cpu_experts(layer)) for layer in self._layers]
        parts: list[_Fused] = []
        first = 0
        for last, layer in enumerate(layers, 1):
            if layer.returns_normed or last in (self.probe_layer, len(layers)):
                run = ops.DecodeLayers(layers[first:last], self.cache.layers[first:last])
                parts.append(_Fused(first, last, run))
                first = last
        return parts

    def _has_cpu_experts(self, layer: _Layer) -> bool:
        """Whether a fused layer may run the routed experts, too."""
        if self._experts is not None or layer.experts is None or layer.router is None:
            return False
        if layer.router.module is not None:
            return False
        return ops.resolve_backend(layer.experts.backend, "cpu") == "cpu"

    def _routed(self, index: int, hidden_TD: Tensor, tiers_T: Tensor, max_tier: int) -> Tensor:
        router, experts = self._layers[index].router, self._layers[index].experts
        assert router is not None and experts is not None
        chosen = router(hidden_TD, tiers_T, max_tier)
        if self._experts is not None:
            return self._experts(index, hidden_TD, *chosen)
        weights = (experts.gate_up_proj, experts.down_proj)
        return ops.expert_mlp(hidden_TD, *weights, *chosen, experts.backend)

    def _attend(
        self, index: int, hidden_TD: Tensor, cos: Tensor, sin: Tensor, step: Step, rows: slice
    ) -> Tensor:
        """Attention of rows `rows` of the step over the cache, which they enter first."""
        attention, cache = self._layers[index].attention, self.cache.layers[index]
        query_THX = attention.enter(hidden_TD, cos, sin, cache, step.slots[rows])
        mixed_THV = hidden_TD.new_empty(len(hidden_TD), attention.heads, attention.value)
        if rows.start <= step.decode.start < min(step.decode.stop, rows.stop):
            here = slice(step.decode.start - rows.start, step.decode.stop - rows.start)
            table = (step.page_table, step.decode_sequence, step.decode_length)
            mixed_THV[here] = attention.decode(query_THX[here], cache, *table)
        for chunk in step.chunks:
            if rows.start <= chunk.first < rows.stop:
                here = slice(chunk.first - rows.start, chunk.last - rows.start)
                key, value = attention.expand(cache, chunk.pages, chunk.end)
                mixed_THV[here] = _causal(query_THX[here], key, value, attention.scaling)
        return attention.leave(mixed_THV)


def _causal(query_THX: Tensor, key_LHX: Tensor, value_LHV: Tensor, scaling: float) -> Tensor:
    """Attention of the last T of L positions, [T, H, V]."""
    visible = None
    if len(query_THX) < len(key_LHX):
        position = torch.arange(len(key_LHX), device=key_LHX.device)
        visible = position <= position[-len(query_THX) :, None]
    mixed_HTV = F.scaled_dot_product_attention(
        query_THX.transpose(0, 1),
        key_LHX.transpose(0, 1),
        value_LHV.transpose(0, 1),
        attn_mask=visible,
        is_causal=visible is None,
        scale=scaling,
    )
    return mixed_HTV.transpose(0, 1)
