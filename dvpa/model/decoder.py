"""Decoder layers and their stack, from token ids to normalised hidden states.

With `tiers=None` the stack runs the request's own life (design: section 3): dense trunk, probe
layers at the base tier, the chooser (difficulty head and policy), then the rest at the chosen tier.
The trunk's output is reused; the probe layers are redone only if some request goes above the base
tier.

Letters: B batch, S new tokens, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dvpa.config import DvpaConfig
from dvpa.model.attention import DvpaAttention, DvpaRMSNorm
from dvpa.model.cache_name import CACHE_NAME
from dvpa.model.difficulty import DifficultyHead
from dvpa.model.experts import DvpaExperts, DvpaMLP, DvpaMoE
from dvpa.model.fp8_loading import fp8_weights
from dvpa.model.grouped_attention import DvpaGroupedAttention
from dvpa.model.precision import Fp32Buffers
from dvpa.model.router import NO_TIER, DvpaRouter, Routing, TierPlan

TierChooser = Callable[
    [Tensor, Tensor], Tensor
]  # states [B, S, D], prompt mask [B, S] -> tiers [B]


@dataclass(frozen=True)
class StackOutput:
    """What a pass through the stack gives.

    `hidden` [B, S, D] after the final norm, the cache, `tiers` int64 [B] or [B, S], one Routing per
    MoE layer, the states between layers if asked for, and the plan that the last layers ran.
    """

    hidden: Tensor
    past_key_values: Cache | None
    tiers: Tensor
    routing: tuple[Routing, ...]
    layer_states: tuple[Tensor, ...] | None
    plan: TierPlan


class DvpaRotaryEmbedding(Fp32Buffers, LlamaRotaryEmbedding):
    """Cosines and sines of positions, Transformers' own (YaRN included)."""


class DvpaDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a dense MLP (trunk) or a nested MoE, both pre-normalised with residuals."""

    def __init__(self, config: DvpaConfig, layer_idx: int) -> None:
        super().__init__()
        attention = DvpaGroupedAttention if config.kv_lora_rank is None else DvpaAttention
        self.self_attn = attention(config, layer_idx)
        self.is_moe = layer_idx >= config.first_k_dense_replace
        self.mlp = DvpaMoE(config) if self.is_moe else DvpaMLP(config, config.intermediate_size)
        self.input_layernorm = DvpaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DvpaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, plan: TierPlan, **kwargs: Any
    ) -> tuple[Tensor, Routing | None]:
        """[B, S, D] -> ([B, S, D], routing of a MoE layer)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **kwargs)
        normed = self.post_attention_layernorm(hidden)
        if not self.is_moe:
            return hidden + self.mlp(normed), None
        out, routing = self.mlp(normed, plan)
        return hidden + out, routing


class DvpaPreTrainedModel(PreTrainedModel):
    """Initialisation and the flags that Transformers reads.

    | tensor | initialised |
    | --- | --- |
    | linear, embedding, router and expert weights | normal, `initializer_range` |
    | norms | ones |
    | tier_bias, head abilities | zeros (steps between tiers start at softplus(0)) |
    """

    config_class = DvpaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DvpaDecoderLayer", "DvpaMtpLayer"]  # noqa: RUF012 (Transformers' contract)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["tier_bias"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; FP8 weights are dequantised."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.has_fp8_weights:  # `_load_pretrained_model` is no contract
            raise ValueError("this version of Transformers took FP8 codes for weights: use another")
        return loaded

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        *args: Any,
        **more: Any,
    ) -> Any:
        """As in Transformers, but FP8 weights are dequantised while they are read.

        Raises:
            ValueError: FP8 that cannot be read (naming the tensor), or that is to be used as FP8.
        """
        load = PreTrainedModel._load_pretrained_model
        with fp8_weights(model, state_dict, checkpoint_files, load_config) as tensors:
            return load(model, tensors, checkpoint_files, load_config, *args, **more)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DvpaRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.tier_bias)
        elif isinstance(module, DvpaExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, DifficultyHead):
            init.zeros_(module.theta)
            init.zeros_(module.log_slope)


class DvpaModel(DvpaPreTrainedModel):
    """Embedding, dense trunk, nested-MoE layers, final norm.

    `layers` may hold one more than `num_hidden_layers`, which the stack never runs: the module for
    multi-token prediction (`dvpa.model.mtp`), named as in V3.
    """

    def __init__(self, config: DvpaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DvpaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = DvpaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DvpaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        tiers: int | Tensor | None = None,
        choose: TierChooser | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        stop_at_probe: bool = False,
        **kwargs: Any,
    ) -> StackOutput:
        """Run the stack at `tiers` (int, [B] or [B, S]), or ask `choose` after the probe layers.

        Raises:
            ValueError: a tier out of range, or `tiers` missing although the cache already holds a
            prompt.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: exactly one of the two must be given")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None  # recomputed layers would fill it twice
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + past)[None]
        shared = self.shared_inputs(hidden, attention_mask, position_ids, past_key_values) | kwargs
        config, valid = self.config, _valid_positions(attention_mask, hidden)
        base = self.plan(0, valid)
        dense, probe = config.first_k_dense_replace, self._probe_layer
        states: list[Tensor] | None = [hidden] if output_hidden_states else None
        hidden, _ = self._run(hidden, range(dense), base, past_key_values, shared, states)
        routing: tuple[Routing, ...] = ()
        next_layer = dense
        if stop_at_probe:
            hidden, routing = self._run(hidden, range(dense, probe), base, None, shared, states)
            return StackOutput(hidden, None, base.tiers, routing, tuple(states or ()), base)
        if tiers is None:
            if past or choose is None:
                raise ValueError("tiers: required once a prompt is cached (pass outputs.tiers on)")
            scratch = DynamicCache(config=config) if past_key_values is not None else None
            probed, routing = self._run(hidden, range(dense, probe), base, scratch, shared, states)
            tiers = choose(probed, valid)
            if int(tiers.max()) == 0:  # nothing to redo: keep the base-tier probe and its cache
                hidden, next_layer = probed, probe
                for i in range(dense, probe) if scratch is not None else ():
                    past_key_values.update(scratch.layers[i].keys, scratch.layers[i].values, i)  # type: ignore[union-attr]
            else:
                routing, states = (), states[: dense + 1] if states else states
        plan = self.plan(tiers, valid)
        rest = range(next_layer, config.num_hidden_layers)
        hidden, rest_routing = self._run(hidden, rest, plan, past_key_values, shared, states)
        tiers_out = tiers if isinstance(tiers, Tensor) else plan.tiers.amax(1)
        hidden = self.norm(hidden)
        return StackOutput(
            hidden,
            past_key_values,
            tiers_out,
            routing + rest_routing,
            tuple(states) if states else None,
            plan,
        )

    def shared_inputs(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Cache | None = None,
    ) -> dict[str, Any]:
        """What every layer is given beside its states: rotary tables and the causal mask."""
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values},
        )
        return {
            "position_embeddings": self.rotary_emb(hidden, position_ids),
            "attention_mask": mask,
        }

    @property
    def _probe_layer(self) -> int:
        difficulty = self.config.difficulty
        return self.config.first_k_dense_replace if difficulty is None else difficulty.probe_layer

    def plan(self, tiers: int | Tensor, valid_BS: Tensor) -> TierPlan:
        """Spread `tiers` (int, [B] or [B, S]) over positions; padding gets no tier.

        Raises:
            ValueError: a tier that does not exist, or a shape that does not fit the batch.
        """
        if isinstance(tiers, int):
            top = self.config.tier_index(tiers)
            return TierPlan(torch.where(valid_BS, top, NO_TIER), top)
        batch, length = valid_BS.shape
        if tiers.shape not in ((batch,), (batch, length)):
            raise ValueError(
                f"tiers: shape {tuple(tiers.shape)} must be ({batch},) or ({batch}, {length})"
            )
        # The one wait for the device per forward pass.
        low, high = int(tiers.min()), int(tiers.max())
        if low < NO_TIER or high > self.config.top_tier:
            raise ValueError(
                f"tiers: {low} .. {high} must be in 0 .. {self.config.top_tier} "
                f"({NO_TIER}: padding)"
            )
        spread = tiers[:, None].expand(batch, length) if tiers.dim() == 1 else tiers
        return TierPlan(torch.where(valid_BS, spread.to(valid_BS.device), NO_TIER), max(high, 0))

    def _run(
        self,
        hidden: Tensor,
        layers: range,
        plan: TierPlan,
        past_key_values: Cache | None,
        shared: dict[str, Any],
        states: list[Tensor] | None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        routing = []
        for i in layers:
            hidden, routed = self.layers[i](hidden, plan, past_key_values=past_key_values, **shared)
            routing.append(routed)
            if states is not None:
                states.append(hidden)
        return hidden, tuple(r for r in routing if r is not None)


def _valid_positions(attention_mask: Tensor | None, hidden_BSD: Tensor) -> Tensor:
    """True where a new position is a real token; [B, S]."""
    batch, length = hidden_BSD.shape[:2]
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.ones(batch, length, dtype=torch.bool, device=hidden_BSD.device)
    return attention_mask[:, -length:].bool()
