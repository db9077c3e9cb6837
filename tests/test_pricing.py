"""Prices against meta-device models, ours and Transformers' own, and against counted FLOPs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dvpa.config import DvpaConfig, load_model_config
from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price

MODEL_CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "model").glob("*.yaml"))
SHARED_FIELDS = (
    "attention_bias",
    "first_k_dense_replace",
    "hidden_size",
    "intermediate_size",
    "kv_lora_rank",
    "moe_intermediate_size",
    "n_shared_experts",
    "num_attention_heads",
    "num_hidden_layers",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "tie_word_embeddings",
    "v_head_dim",
    "vocab_size",
)
every_config = pytest.mark.parametrize("path", MODEL_CONFIGS, ids=lambda path: path.stem)


def meta_model(config: DvpaConfig) -> nn.Module:
    with torch.device("meta"):
        return DvpaForCausalLM(config)


def meta_deepseek(config: DvpaConfig, tier: int) -> nn.Module:
    """Transformers' own model of one tier, from the architecture's fields alone."""
    one = config.tiers[tier]
    pool = one.num_groups * config.n_routed_experts // config.n_group
    exported = DeepseekV3Config(
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        num_key_value_heads=config.num_attention_heads,
        n_routed_experts=pool,
        n_group=one.num_groups,
        topk_group=one.topk_group,
        num_experts_per_tok=one.top_k,
        pad_token_id=None,
        num_nextn_predict_layers=0,
        num_mtp_layers=0,
    )
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(exported)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def mtp_prefix(config: DvpaConfig) -> str:
    return f"model.layers.{config.num_hidden_layers}."


def count_activated(model: nn.Module, config: DvpaConfig, tier: int, of_mtp: bool = False) -> int:
    """Parameters on a token's path, by the names of the whole model's parameters."""
    one, total = config.tiers[tier], 0
    for name, parameter in model.named_parameters():
        if name.startswith(mtp_prefix(config)) != of_mtp:
            continue
        share = 1.0
        untied_embedding = "embed_tokens" in name and not config.tie_word_embeddings
        if name.startswith("difficulty_head.") or untied_embedding:
            share = 0.0
        elif ".mlp.experts." in name:
            share = one.top_k / config.n_routed_experts
        elif name.endswith(".mlp.gate.weight"):
            share = one.num_groups / config.n_group
        total += round(parameter.numel() * share)
    return total


def fp8_bytes(model: nn.Module) -> int:
    """Bytes of Transformers' model as DeepSeek stores it: E4M3 matrices with fp32 block scales."""
    total = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            total += 4 * tensor.numel()
        elif "inv_freq" in name:
            continue
        elif (".self_attn." in name or ".mlp." in name) and "norm" not in name and tensor.ndim > 1:
            if name.endswith("mlp.gate.weight"):
                total += 2 * tensor.numel()
                continue
            *experts, rows, columns = tensor.shape
            matrices = math.prod(experts)
            if name.endswith("experts.gate_up_proj"):  # gate and up are stored as two matrices
                rows, matrices = rows // 2, 2 * matrices
            blocks = math.ceil(rows / 128) * math.ceil(columns / 128)
            total += matrices * (rows * columns + 4 * blocks)
        else:
            total += 2 * tensor.numel()
    return total


def assert_exact(config: DvpaConfig) -> None:
    model, priced = meta_model(config), price(config)
    mtp = {n: p for n, p in model.named_parameters() if n.startswith(mtp_prefix(config))}
    assert priced.mtp_params == sum(parameter.numel() for parameter in mtp.values())
    assert (priced.mtp_params > 0) == bool(config.num_nextn_predict_layers)
    assert priced.total_params == count(model) - priced.mtp_params
    head = getattr(model, "difficulty_head", None)
    assert priced.head_params == (0 if head is None else count(head))
    for tier, tier_price in enumerate(priced.tiers):
        deepseek = meta_deepseek(config, tier)
        moe_layers = config.num_hidden_layers - config.first_k_dense_replace
        assert tier_price.name == config.tier_names[tier]
        assert tier_price.tier_params == count(deepseek)
        assert tier_price.activated_params == count_activated(model, config, tier)
        head = config.vocab_size * config.hidden_size
        drafted = count_activated(model, config, tier, of_mtp=True) + head if mtp else 0
        assert tier_price.mtp_activated_params == drafted
        assert tier_price.flops_per_token == 2 * tier_price.activated_params
        bias_bytes = 4 * config.pool_size(tier) * moe_layers
        assert tier_price.weight_bytes == 2 * count(deepseek) + bias_bytes
        assert tier_price.weight_bytes_fp8 == fp8_bytes(deepseek)


@every_config
def test_shipped_config_is_priced_exactly(path: Path) -> None:
    assert_exact(load_model_config(path))


@st.composite
def small_configs(draw: st.DrawFn) -> DvpaConfig:
    groups, group_size = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    num_tiers = draw(st.integers(1, groups))
    prefix = [*sorted(draw(st.permutations(range(1, groups)))[: num_tiers - 1]), groups]
    tiers: list[dict[str, Any]] = []
    for num_groups in prefix:
        low = tiers[-1]["top_k"] if tiers else 1
        topk_group = draw(st.integers(math.ceil(low / group_size), num_groups))
        top_k = draw(st.integers(low, topk_group * group_size))
        tier = {"name": f"t{num_groups}", "num_groups": num_groups, "top_k": top_k}
        tiers.append(tier | {"topk_group": topk_group, "routed_scaling_factor": 1.0})
    layers = draw(st.integers(1, 4))
    dense = draw(st.integers(0, layers - 1))
    probe = draw(st.none() | st.integers(max(1, dense), layers))
    sizes = st.integers(1, 300)
    return DvpaConfig(
        vocab_size=draw(sizes),
        hidden_size=draw(sizes),
        intermediate_size=draw(sizes),
        moe_intermediate_size=draw(sizes),
        num_hidden_layers=layers,
        num_nextn_predict_layers=draw(st.integers(0, 1)),
        num_attention_heads=draw(st.integers(1, 4)),
        n_shared_experts=draw(st.integers(0, 3)),
        n_routed_experts=groups * group_size,
        n_group=groups,
        kv_lora_rank=draw(sizes),
        q_lora_rank=draw(st.none() | sizes),
        qk_rope_head_dim=2 * draw(st.integers(1, 40)),
        qk_nope_head_dim=draw(st.integers(1, 40)),
        v_head_dim=draw(st.integers(1, 40)),
        first_k_dense_replace=dense,
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=None,
        eos_token_id=None,
        tiers=tiers,
        difficulty=None if probe is None else {"probe_layer": probe, "hidden_size": draw(sizes)},
    )


@settings(max_examples=40)
@given(config=small_configs())
def test_any_config_is_priced_exactly(config: DvpaConfig) -> None:
    assert_exact(config)


def counted_flops(model: nn.Module, ids: torch.Tensor) -> int:
    """FLOPs of a forward pass, without the rotary table, which some versions multiply together."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    tables = sum(flops for name, flops in by_module.items() if name.endswith("rotary_emb"))
    return int(by_module["Global"] - tables)


@pytest.mark.parametrize("tier", [0, 1, 2])
def test_flops_are_those_that_run(tier: int) -> None:
    """Counted on Transformers' model: matrix products only, so norms and gate weights are apart."""
    config = load_model_config("model/pico.yaml")
    torch.manual_seed(0)
    model = meta_deepseek(config, tier).to_empty(device="cpu").to(torch.float32).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    for buffer in model.buffers():
        nn.init.zeros_(buffer)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    tokens = 6
    ids = torch.arange(tokens)[None]
    counted = counted_flops(model, ids)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    # Every position of a prefill multiplies with all `tokens` of them, masked or not.
    priced = price(config, context=tokens).tiers[tier]
    assert counted == tokens * (priced.flops_per_token - 2 * norms)


def test_context_adds_attention_linearly() -> None:
    config = load_model_config("model/pico.yaml")
    short, middle, long = (price(config, context) for context in (0, 100, 200))
    for a, b, c in zip(short.tiers, middle.tiers, long.tiers, strict=True):
        per_token = 2 * config.num_attention_heads * (8 + 8 + 8) * config.num_hidden_layers
        assert b.flops_per_token - a.flops_per_token == 100 * per_token
        assert c.flops_per_token - b.flops_per_token == 100 * per_token
    with pytest.raises(ValueError, match="context: -1 must be 0 or more"):
        price(config, -1)


def test_cache_bytes_are_the_latent_of_every_layer() -> None:
    config = load_model_config("model/dvpa-7b-32b.yaml")
    assert {tier.kv_bytes_per_token for tier in price(config).tiers} == {48 * (512 + 64) * 2}


def test_large_model_is_what_its_tiers_are_called() -> None:
    config = load_model_config("model/dvpa-7b-32b.yaml")
    for tier in price(config).tiers:
        named = 1e9 * int(tier.name.removesuffix("b"))
        assert abs(tier.activated_params / named - 1) <= 0.03


def test_the_large_models_module_is_one_layer_of_many() -> None:
    priced = price(load_model_config("model/dvpa-7b-32b.yaml"))
    assert priced.total_params == pytest.approx(153e9, rel=0.01)
    assert priced.mtp_params == pytest.approx(3.35e9, rel=0.01)


def test_seed_model_is_deepseekmoe_16b_in_size() -> None:
    priced = price(load_model_config("model/deepseekmoe-16b.yaml"))
    assert priced.total_params == pytest.approx(16.4e9, rel=0.01)


@every_config
def test_scale_is_root_of_top_k(path: Path) -> None:
    """The measured default (design.md section 4); a config that departs from it should say so."""
    for tier in load_model_config(path).tiers:
        assert tier.routed_scaling_factor == pytest.approx(math.sqrt(tier.top_k), abs=1e-3)


def test_probe_flops_are_the_layers_before_the_head() -> None:
    config = load_model_config("model/pico.yaml")
    model = meta_model(config)
    activated = 0
    for name, parameter in model.named_parameters():
        if name.startswith(("model.layers.0.", "model.layers.1.")):
            experts, router = ".mlp.experts." in name, name.endswith("mlp.gate.weight")
            activated += parameter.numel() // (8 if experts else 4 if router else 1)
    pooling = 2 * config.hidden_size
    assert price(config).probe_flops_per_token == 2 * (activated + pooling)
    config.difficulty = None
    assert price(config).head_params == 0
    assert price(config).probe_flops_per_token == 0
