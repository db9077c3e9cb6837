"""Every tensor of a dvpa checkpoint and its shape, from the config alone; DeepSeek-V3's own names.

Tests hold the list against what `save_pretrained` writes. Tied word embeddings have no `lm_head`.
"""

from collections.abc import Iterator

from dvpa.config import DvpaConfig
from dvpa.pricing import HEAD_CERTAINTIES

Shape = tuple[int, ...]
HEAD_PREFIX = "difficulty_head."
TIER_BIAS = ".mlp.gate.tier_bias"
ROUTER_WEIGHT = ".mlp.gate.weight"


def tensor_shapes(config: DvpaConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor, layer by layer."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes.update((prefix + name, shape) for name, shape in _layer(config, layer))
    if config.num_nextn_predict_layers:
        shapes.update((mtp_prefix(config) + name, shape) for name, shape in _mtp(config))
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    shapes.update((HEAD_PREFIX + name, shape) for name, shape in _head(config))
    return shapes


def mtp_prefix(config: DvpaConfig) -> str:
    """What the names of the multi-token prediction module's tensors begin with, as in V3."""
    return f"model.layers.{config.num_hidden_layers}."


def expert_index(name: str) -> int | None:
    """The routed expert that a tensor belongs to; None if it is no routed expert's."""
    _, found, rest = name.partition(".mlp.experts.")
    return int(rest.split(".")[0]) if found else None


def _mtp(config: DvpaConfig) -> Iterator[tuple[str, Shape]]:
    """V3 also stores copies of the embedding and the head here; ours are the model's own."""
    hidden = config.hidden_size
    yield from _layer(config, config.num_hidden_layers)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{norm}.weight", (hidden,)
    yield "eh_proj.weight", (hidden, 2 * hidden)


def _layer(config: DvpaConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    for name, shape in _attention(config):
        yield f"self_attn.{name}", shape
    if layer < config.first_k_dense_replace:
        yield from _mlp("mlp", hidden, config.intermediate_size)
        return
    yield "mlp.gate.weight", (config.n_routed_experts, hidden)
    yield "mlp.gate.tier_bias", (config.num_tiers, config.n_routed_experts)
    if config.n_shared_experts:
        yield from _mlp("mlp.shared_experts", hidden, width * config.n_shared_experts)
    for expert in range(config.n_routed_experts):
        yield from _mlp(f"mlp.experts.{expert}", hidden, width)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _attention(config: DvpaConfig) -> Iterator[tuple[str, Shape]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.kv_lora_rank is None:
        yield from _grouped_attention(config, query)
        return
    biased: list[tuple[str, int]] = []
    if config.q_lora_rank is None:
        yield "q_proj.weight", (query, hidden)
    else:
        yield "q_a_proj.weight", (config.q_lora_rank, hidden)
        yield "q_a_layernorm.weight", (config.q_lora_rank,)
        yield "q_b_proj.weight", (query, config.q_lora_rank)
        biased.append(("q_a_proj", config.q_lora_rank))
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    yield "kv_a_proj_with_mqa.weight", (latent, hidden)
    yield "kv_a_layernorm.weight", (config.kv_lora_rank,)
    key_value = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield "kv_b_proj.weight", (key_value, config.kv_lora_rank)
    yield "o_proj.weight", (hidden, heads * config.v_head_dim)
    biased += [("kv_a_proj_with_mqa", latent), ("o_proj", hidden)]
    for name, size in biased if config.attention_bias else ():
        yield f"{name}.bias", (size,)


def _grouped_attention(config: DvpaConfig, query: int) -> Iterator[tuple[str, Shape]]:
    hidden, key = config.hidden_size, config.num_key_value_heads * config.head_dim
    outputs = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": hidden}
    for name, size in outputs.items():
        yield f"{name}.weight", (size, query if name == "o_proj" else hidden)
        if config.attention_bias:
            yield f"{name}.bias", (size,)
    if config.qk_norm is not None:
        is_by_head = config.qk_norm == "head"
        yield "q_norm.weight", (config.head_dim if is_by_head else query,)
        yield "k_norm.weight", (config.head_dim if is_by_head else key,)


def _head(config: DvpaConfig) -> Iterator[tuple[str, Shape]]:
    if config.difficulty is None:
        return
    hidden, width = config.hidden_size, config.difficulty.hidden_size
    yield "norm.weight", (hidden,)
    yield "query.weight", (1, hidden)
    yield "fc1.weight", (width, 2 * hidden + HEAD_CERTAINTIES)
    yield "fc1.bias", (width,)
    yield "fc2.weight", (1, width)
    yield "theta", (config.num_tiers,)
    yield "log_slope", (1,)
