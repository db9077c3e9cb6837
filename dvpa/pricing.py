"""What a model costs, tier by tier: parameters, FLOPs, bytes. Exact, analytic, no torch.

Every weight of the architecture is listed once (`_weights`, `_mtp`); all numbers are sums over that
list. Tests hold them against models on the meta device and against Transformers' own DeepSeek-V3.

The multi-token prediction module (`num_nextn_predict_layers`) has prices of its own, `mtp_params`
and `mtp_activated_params`, and is in no other number: it runs in training or as a draft, never when
a tier answers by itself. DeepSeek counts likewise: 671B parameters, and 14B of the module.

Left out on purpose: activations, optimizer state and communication. The difficulty head runs once
per request, not once per token, so it counts in `total_params` only.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvpa.architecture import Architecture

BF16_BYTES = 2
FP32_BYTES = 4
HEAD_CERTAINTIES = 3  # what the difficulty head reads off the logit lens
FP8_BLOCK = 128  # DeepSeek-V3 stores one fp32 scale per 128 x 128 block of an E4M3 matrix


@dataclass(frozen=True)
class TierPrice:
    """The price of one tier.

    Attributes:
        name: the tier's name.
        activated_params: parameters a token multiplies with; the embedding row is not counted.
        tier_params: parameters of the tier exported as a `deepseek_v3` model of its own.
        flops_per_token: 2 * activated_params plus the attention over `context` earlier tokens.
        kv_bytes_per_token: bytes of bf16 cache per token, over all layers.
        weight_bytes: bytes of the exported tier in bf16 (selection bias in fp32).
        weight_bytes_fp8: the same with attention and MLP matrices in block-scaled FP8.
        ratio_to_top: activated_params divided by the top tier's.
        mtp_activated_params: what a token multiplies with in the multi-token prediction module at
            this tier, the shared head included; 0 without the module.
    """

    name: str
    activated_params: int
    tier_params: int
    flops_per_token: int
    kv_bytes_per_token: int
    weight_bytes: int
    weight_bytes_fp8: int
    ratio_to_top: float
    mtp_activated_params: int


@dataclass(frozen=True)
class ModelPrice:
    """The price of a model; `total_params` includes the difficulty head's `head_params`.

    `mtp_params`: the multi-token prediction module, which `total_params` leaves out; embedding and
    head are the model's own and not counted again. 0 without the module.

    `probe_flops_per_token`: what scoring costs per prompt token (the layers before the head, at the
    base tier); `head_flops_per_request`: the head and its logit lens, once; of these
    `shared_lens_flops` are not spent where the base tier reads the prompt, since its own logits are
    the lens (0 where the probe is not all of its layers). All 0 without a head.
    `trunk_flops_per_token`: the dense first layers, which no tier runs twice.
    """

    total_params: int
    mtp_params: int
    head_params: int
    probe_flops_per_token: int
    head_flops_per_request: int
    shared_lens_flops: int
    trunk_flops_per_token: int
    tiers: tuple[TierPrice, ...]

    def scoring_flops(self, prompt_tokens: int, tier: int, read_prompt: str = "tier") -> int:
        """What deciding a request's tier adds, as the engine counts it.

        The head; above the base tier also the probe layers where the tier reads the prompt
        (`read_prompt`), whose trunk is not run twice, or else ("base") the prompt's last token,
        which the base tier has read before.
        """
        head = self.head_flops_per_request
        if read_prompt == "base":
            again = self.tiers[0].flops_per_token if head and tier else 0
            return head - self.shared_lens_flops + again
        again = self.probe_flops_per_token - self.trunk_flops_per_token
        return head + (again * prompt_tokens if head and tier else 0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary, the schema of `dvpa plan --json`."""
        return asdict(self)


@dataclass(frozen=True)
class _Weight:
    """`stored` tensors of one shape ([out, in] if a matrix), `active` of them on a token's path."""

    shape: tuple[int, ...]
    stored: int = 1
    active: int = 1
    quantized: bool = False

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def fp8_bytes(self) -> int:
        """Bytes of one such tensor in an FP8 checkpoint."""
        if not self.quantized:
            return BF16_BYTES * self.size
        blocks = prod(-(-side // FP8_BLOCK) for side in self.shape)
        return self.size + FP32_BYTES * blocks


def price(config: "Architecture", context: int = 0) -> ModelPrice:
    """Price `config` per tier, with `context` earlier tokens in the cache.

    Raises:
        ValueError: `context` is negative.
    """
    if context < 0:
        raise ValueError(f"context: {context} must be 0 or more")
    num_tiers = config.num_tiers
    weights = [list(_weights(config, tier)) for tier in range(num_tiers)]
    activated = [sum(w.size * w.active for w in of_tier) for of_tier in weights]
    tiers = tuple(
        _tier_price(config, tier, weights[tier], activated[tier], activated[-1], context)
        for tier in range(num_tiers)
    )
    head = _head_params(config)
    probe = _probe_flops(config, context)
    lens = 2 * config.vocab_size * config.hidden_size if head else 0
    probes_all = head and config.difficulty.probe_layer == config.num_hidden_layers
    trunk = _layer_flops(config, context, config.first_k_dense_replace)
    total = tiers[-1].tier_params + head
    mtp = sum(w.size * w.stored for w in _mtp(config, num_tiers - 1))
    return ModelPrice(
        total, mtp, head, probe, 2 * head + lens, lens if probes_all else 0, trunk, tiers
    )


def _tier_price(
    config: "Architecture",
    tier: int,
    weights: list[_Weight],
    activated: int,
    activated_top: int,
    context: int,
) -> TierPrice:
    stored = sum(w.size * w.stored for w in weights)
    # Not a parameter but part of the checkpoint: the tier's row of tier_bias, fp32 in every format.
    bias_bytes = FP32_BYTES * config.pool_size(tier) * _num_moe_layers(config)
    fp8_bytes = sum(w.fp8_bytes * w.stored for w in weights)
    return TierPrice(
        name=config.tier_names[tier],
        activated_params=activated,
        tier_params=stored,
        flops_per_token=2 * activated + _attention_flops(config, context, config.num_hidden_layers),
        kv_bytes_per_token=BF16_BYTES * config.kv_width * config.num_hidden_layers,
        weight_bytes=BF16_BYTES * stored + bias_bytes,
        weight_bytes_fp8=fp8_bytes + bias_bytes,
        ratio_to_top=activated / activated_top,
        mtp_activated_params=_mtp_activated(config, tier),
    )


def _attention_flops(config: "Architecture", context: int, num_layers: int) -> int:
    """FLOPs of one token's attention over `context` tokens in `num_layers`: scores and values.

    In the expanded form of MLA. The absorbed form used for decoding multiplies over the latent
    instead: more FLOPs, fewer bytes.
    """
    per_head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return 2 * context * config.num_attention_heads * per_head * num_layers


def _probe_flops(config: "Architecture", context: int) -> int:
    """FLOPs per prompt token before the difficulty head, its pooling included."""
    if config.difficulty is None:
        return 0
    pooling = 2 * config.hidden_size  # norm and attention query
    return _layer_flops(config, context, config.difficulty.probe_layer) + 2 * pooling


def _layer_flops(config: "Architecture", context: int, num_layers: int) -> int:
    """FLOPs per token of the first layers at the base tier."""
    weights = sum(weight.size * weight.active for weight in _layers(config, 0, num_layers))
    return 2 * weights + _attention_flops(config, context, num_layers)


def _num_moe_layers(config: "Architecture") -> int:
    return config.num_hidden_layers - config.first_k_dense_replace


def _weights(config: "Architecture", tier: int) -> Iterator[_Weight]:
    """Every weight of `tier` as a model of its own, without the difficulty head."""
    embedding = (config.vocab_size, config.hidden_size)
    yield _Weight(embedding)  # lm_head
    if not config.tie_word_embeddings:
        yield _Weight(embedding, active=0)
    yield _Weight((config.hidden_size,))  # final norm
    yield from _layers(config, tier, config.num_hidden_layers)


def _layers(config: "Architecture", tier: int, num_layers: int) -> Iterator[_Weight]:
    """Every weight of the first `num_layers` layers at `tier`."""
    dense = min(config.first_k_dense_replace, num_layers)
    yield from _stack(config, tier, dense, num_layers - dense)


def _mtp(config: "Architecture", tier: int) -> Iterator[_Weight]:
    """Every weight of the multi-token prediction module at `tier` that no layer shares."""
    if config.num_nextn_predict_layers:
        hidden = config.hidden_size
        yield _Weight((hidden,), 3, 3)  # norms of embedding, state and output
        yield _Weight((hidden, 2 * hidden))  # eh_proj
        yield from _stack(config, tier, dense=0, moe=1)


def _mtp_activated(config: "Architecture", tier: int) -> int:
    own = sum(w.size * w.active for w in _mtp(config, tier))
    return own + config.vocab_size * config.hidden_size if own else 0


def _stack(config: "Architecture", tier: int, dense: int, moe: int) -> Iterator[_Weight]:
    """Every weight of so many dense and MoE layers at `tier`."""
    hidden, num_layers = config.hidden_size, dense + moe
    yield _Weight((hidden,), 2 * num_layers, 2 * num_layers)  # norms
    for weight in _attention(config):
        yield _Weight(weight.shape, num_layers, num_layers, weight.quantized)
    yield from _mlp(config, config.intermediate_size, dense, dense)
    if config.n_shared_experts:  # the shared experts are one wide MLP
        yield from _mlp(config, config.n_shared_experts * config.moe_intermediate_size, moe, moe)
    pool, top_k = config.pool_size(tier), _top_k(config, tier)
    yield from _mlp(config, config.moe_intermediate_size, pool * moe, top_k * moe)
    yield _Weight((pool, hidden), moe, moe)  # router rows


def _mlp(config: "Architecture", width: int, stored: int, active: int) -> Iterator[_Weight]:
    """Gate, up and down projection of a SwiGLU MLP (DeepSeek-V3 has no biases there)."""
    for shape in 2 * ((width, config.hidden_size),) + ((config.hidden_size, width),):
        yield _Weight(shape, stored, active, quantized=True)


def _attention(config: "Architecture") -> Iterator[_Weight]:
    """One layer's: latent (DeepSeek-V2, arXiv 2405.04434, section 2.1) or grouped-query."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.kv_lora_rank is None:
        yield from _grouped_attention(config, query_width)
        return
    latent_width = config.kv_lora_rank + config.qk_rope_head_dim
    biased = [latent_width, hidden] if config.attention_bias else []  # kv_a_proj, o_proj
    if config.q_lora_rank is None:
        yield _Weight((query_width, hidden), quantized=True)
    else:
        yield _Weight((config.q_lora_rank, hidden), quantized=True)
        yield _Weight((config.q_lora_rank,))  # norm
        yield _Weight((query_width, config.q_lora_rank), quantized=True)
        biased += [config.q_lora_rank] if config.attention_bias else []
    yield _Weight((latent_width, hidden), quantized=True)
    yield _Weight((config.kv_lora_rank,))  # norm
    key_value_width = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield _Weight((key_value_width, config.kv_lora_rank), quantized=True)
    yield _Weight((hidden, heads * config.v_head_dim), quantized=True)
    for width in biased:
        yield _Weight((width,))


def _grouped_attention(config: "Architecture", query_width: int) -> Iterator[_Weight]:
    hidden, key_width = config.hidden_size, config.kv_width // 2
    for width in (query_width, key_width, key_width):
        yield _Weight((width, hidden), quantized=True)
    yield _Weight((hidden, query_width), quantized=True)
    for width in (query_width, key_width, key_width, hidden) if config.attention_bias else ():
        yield _Weight((width,))
    if config.qk_norm is not None:
        is_by_head = config.qk_norm == "head"
        for width in (query_width, key_width):
            yield _Weight((config.head_dim if is_by_head else width,))


def _top_k(config: "Architecture", tier: int) -> int:
    assert config.tiers is not None  # resolved by the config itself
    return int(config.tiers[tier].top_k)


def _head_params(config: "Architecture") -> int:
    """Parameters of the difficulty head: norm, query, two linear layers, tier abilities, slope."""
    if config.difficulty is None:
        return 0
    hidden, width = config.hidden_size, config.difficulty.hidden_size
    pooling = 2 * hidden  # norm and attention query
    features = 2 * hidden + HEAD_CERTAINTIES  # pooled state, last state, certainty
    mlp = features * width + width + width  # the second layer has no bias
    return pooling + mlp + config.num_tiers + 1


@dataclass(frozen=True)
class ModelParts:
    """One tier's parameters by the place that a parallel layout gives them.

    `attention` (with both norms of its layer), `dense_mlp`, `shared_experts` and `router` are those
    of one layer, `expert` is one routed expert of one layer; `embedding` is 0 where it is tied to
    `head`.
    """

    embedding: int
    head: int
    final_norm: int
    attention: int
    dense_mlp: int
    shared_experts: int
    router: int
    expert: int
    num_dense_layers: int
    num_moe_layers: int
    num_experts: int

    @property
    def routed(self) -> int:
        """All routed experts of all layers."""
        return self.num_moe_layers * self.num_experts * self.expert

    @property
    def total(self) -> int:
        """All of them: `TierPrice.tier_params`."""
        layers = self.num_dense_layers + self.num_moe_layers
        moe = self.num_moe_layers * (self.shared_experts + self.router)
        outside = self.embedding + self.head + self.final_norm
        dense = self.num_dense_layers * self.dense_mlp
        return outside + layers * self.attention + dense + moe + self.routed


def split(config: "Architecture", tier: int) -> ModelParts:
    """The parts of `tier` as a model of its own; tests hold their sum against `price`."""
    hidden, vocabulary = config.hidden_size, config.vocab_size * config.hidden_size
    shared = config.n_shared_experts * config.moe_intermediate_size
    return ModelParts(
        embedding=0 if config.tie_word_embeddings else vocabulary,
        head=vocabulary,
        final_norm=hidden,
        attention=_size(_attention(config)) + 2 * hidden,
        dense_mlp=_size(_mlp(config, config.intermediate_size, 1, 1)),
        shared_experts=_size(_mlp(config, shared, 1, 1)) if shared else 0,
        router=config.pool_size(tier) * hidden,
        expert=_size(_mlp(config, config.moe_intermediate_size, 1, 1)),
        num_dense_layers=config.first_k_dense_replace,
        num_moe_layers=_num_moe_layers(config),
        num_experts=config.pool_size(tier),
    )


def _size(weights: Iterator[_Weight]) -> int:
    return sum(weight.size * weight.stored for weight in weights)
