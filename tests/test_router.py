"""The router against a slow plain-Python transcription of design.md section 4.

The oracle shares no code with the router: lists and floats, one token at a time. It masks with
-inf, as the design asks. Transformers' DeepSeek-V3 once masked with 0.0, where an expert of a
dropped group wins as soon as the kept ones have a negative bias; 5.17 and 5.23 both mask with -inf
(read in their `DeepseekV3TopkRouter.forward`), so the parity tests may use negative biases too.
"""

import math
from typing import Any

import pytest
import torch
from helpers import left_padded, moe_layers, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvpa.config import DvpaConfig
from dvpa.model.router import NO_TIER, DvpaRouter, Routing, TierPlan


def oracle(
    token: list[float], weight: list[list[float]], bias: list[list[float]], tier: int, config: Any
) -> dict[int, float]:
    """Expert -> weight of one token, by the book: steps 1 to 4 of design.md section 4.

    Softmax scores are over the tier's pool: what is outside has no part in them.
    """
    rule = config.tiers[tier]
    size = config.n_routed_experts // config.n_group
    is_striped = config.pool == "striped"
    group_of = [e % config.n_group if is_striped else e // size for e in range(len(weight))]
    place = [e // config.n_group if is_striped else e % size for e in range(len(weight))]
    share = rule.experts_per_group if is_striped else size
    in_pool = [g < rule.num_groups and p < share for g, p in zip(group_of, place, strict=True)]
    logits = [sum(w * u for w, u in zip(r, token, strict=True)) for r in weight]
    if config.scoring_func == "softmax":
        total = sum(math.exp(z) for z, inside in zip(logits, in_pool, strict=True) if inside)
        scores = [math.exp(z) / total for z in logits]
    else:
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    choice = [s + b for s, b in zip(scores, bias[tier], strict=True)]
    choice = [c if inside else -math.inf for c, inside in zip(choice, in_pool, strict=True)]
    best = 2 if config.topk_method == "noaux_tc" else 1
    group_score = [
        sum(sorted(c for e, c in enumerate(choice) if group_of[e] == g)[-best:])
        for g in range(config.n_group)
    ]
    kept = sorted(range(config.n_group), key=lambda g: -group_score[g])[: rule.topk_group]
    choice = [c if group_of[e] in kept else -math.inf for e, c in enumerate(choice)]
    chosen = sorted(range(len(choice)), key=lambda e: -choice[e])[: rule.top_k]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * rule.routed_scaling_factor for e in chosen}


def route(config: DvpaConfig, tiers: Tensor, bias: Tensor, seed: int) -> tuple[Routing, Any]:
    """Route random tokens; returns the routing and the function giving the oracle's answer."""
    torch.manual_seed(seed)
    router = DvpaRouter(config)
    with torch.no_grad():
        router.weight.normal_(0, 0.3)
        router.tier_bias.copy_(bias)
    hidden = torch.randn(len(tiers), config.hidden_size)
    routing = router(hidden, TierPlan(tiers[None], int(tiers.max())))
    arguments = router.weight.double().tolist(), router.tier_bias.double().tolist()
    return routing, lambda t: oracle(hidden[t].double().tolist(), *arguments, int(tiers[t]), config)


def agree(routing: Routing, expected: Any, tiers: Tensor, config: DvpaConfig) -> None:
    for token, tier in enumerate(tiers.tolist()):
        index = routing.topk_index[token].tolist()
        weight = routing.topk_weight[token].tolist()
        ours = {e: w for e, w in zip(index, weight, strict=True) if e < config.n_routed_experts}
        theirs = expected(token) if tier != NO_TIER else {}
        assert ours.keys() == theirs.keys(), f"token {token}, tier {tier}"
        for expert, value in theirs.items():
            assert ours[expert] == pytest.approx(value, rel=1e-5)
        empty = [w for e, w in zip(index, weight, strict=True) if e == config.n_routed_experts]
        assert not any(empty)
        assert len(ours) + len(empty) == len(index)


@st.composite
def configs(draw: st.DrawFn) -> DvpaConfig:
    """Any valid combination of groups, pools, scores and slots."""
    n_group, size = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    pool = draw(st.sampled_from(["prefix", "striped"]))
    low, high = (2, size) if pool == "striped" else (1, n_group)
    pools = sorted(draw(st.sets(st.integers(low, high), max_size=3)) | {high})
    tiers: list[dict[str, Any]] = []
    for i, units in enumerate(pools):
        groups, share = (n_group, units) if pool == "striped" else (units, size)
        topk_group = draw(st.integers(1, groups))
        least = tiers[-1]["top_k"] if tiers else 1
        topk_group = max(topk_group, -(-least // share))
        tiers.append(
            {
                "name": f"tier{i}",
                "experts_per_group" if pool == "striped" else "num_groups": units,
                "top_k": draw(st.integers(least, topk_group * share)),
                "topk_group": topk_group,
                "routed_scaling_factor": draw(st.floats(0.5, 3.0)),
            }
        )
    return tiny_config(
        n_group=n_group,
        n_routed_experts=n_group * size,
        pool=pool,
        tiers=tiers,
        scoring_func=draw(st.sampled_from(["sigmoid", "softmax"])),
        topk_method=draw(st.sampled_from(["noaux_tc", "group_limited_greedy"])),
        norm_topk_prob=draw(st.booleans()),
        hidden_size=16,
    )


@settings(max_examples=150)
@given(configs(), st.integers(0, 10_000), st.sampled_from([0.0, 0.5, -0.9, -5.0, 4.0]))
def test_the_router_is_the_design(config: DvpaConfig, seed: int, shift: float) -> None:
    g = torch.Generator().manual_seed(seed)
    tiers = torch.randint(0, config.num_tiers, (12,), generator=g)
    bias = shift + 0.4 * torch.randn(config.num_tiers, config.n_routed_experts, generator=g)
    routing, expected = route(config, tiers, bias, seed)
    agree(routing, expected, tiers, config)


def test_a_negative_bias_never_lets_a_dropped_group_win() -> None:
    """The example of reference/codebases.md: with a 0.0 mask experts {0, 2} would win."""
    config = tiny_config(
        n_routed_experts=4,
        n_group=2,
        hidden_size=4,
        tiers=[
            {"name": "t", "num_groups": 2, "top_k": 2, "topk_group": 1, "routed_scaling_factor": 1}
        ],
    )
    router = DvpaRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
        scores = torch.tensor([0.2, 0.3, 0.6, 0.5])
        router.tier_bias.copy_(torch.tensor([[-0.6, -0.93, -0.58, -0.65]]))
    hidden = torch.logit(scores)[None]
    routing = router(hidden, TierPlan(torch.zeros(1, 1, dtype=torch.long), 0))
    assert set(routing.topk_index[0].tolist()) == {2, 3}


def test_padding_gets_no_slot() -> None:
    config = tiny_config()
    tiers = torch.tensor([NO_TIER, 0, NO_TIER, 2, 1])
    bias = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    routing, expected = route(config, tiers, bias, seed=3)
    agree(routing, expected, tiers, config)
    assert routing.tiers.tolist() == tiers.tolist()


def test_a_higher_tier_in_the_batch_changes_nothing_below() -> None:
    config = tiny_config()
    bias = 0.3 * torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    low, _ = route(config, torch.tensor([0, 1, 0, 1]), bias, seed=5)
    high, _ = route(config, torch.tensor([0, 1, 0, 2]), bias, seed=5)
    assert low.scores.shape == (4, 8)  # the pool of tier 1
    assert high.scores.shape == (4, 16)
    slots = low.topk_index.shape[1]
    assert torch.equal(low.topk_index[:3], high.topk_index[:3, :slots])
    torch.testing.assert_close(low.topk_weight[:3], high.topk_weight[:3, :slots])
    torch.testing.assert_close(low.scores[:3], high.scores[:3, :8])


def test_the_bias_chooses_but_never_weighs() -> None:
    config = tiny_config()
    tiers = torch.full((6,), 2)
    chosen_by_bias = torch.zeros(3, 16)
    chosen_by_bias[2, [1, 3, 5, 8, 10]] = 10.0  # three groups, five experts
    routing, _ = route(config, tiers, chosen_by_bias, seed=2)
    for token in range(6):
        assert set(routing.topk_index[token].tolist()) == {1, 3, 5, 8, 10}
        scores = routing.scores[token, routing.topk_index[token]]
        torch.testing.assert_close(routing.topk_weight[token], 2.2 * scores / scores.sum())


def test_only_the_bias_of_the_own_tier_counts() -> None:
    config = tiny_config()
    bias = torch.zeros(3, 16)
    plain, _ = route(config, torch.tensor([0, 1, 2]), bias, seed=4)
    bias[1] = torch.linspace(-3, 3, 16)
    changed, _ = route(config, torch.tensor([0, 1, 2]), bias, seed=4)
    assert torch.equal(plain.topk_index[[0, 2]], changed.topk_index[[0, 2]])
    assert not torch.equal(plain.topk_index[1], changed.topk_index[1])


def test_routing_is_fp32_in_a_bf16_model() -> None:
    model = tiny_model().to(torch.bfloat16)
    gate = moe_layers(model)[0].gate
    assert gate.weight.dtype == torch.bfloat16
    assert gate.tier_bias.dtype == torch.float32  # bf16 would swallow updates of 0.001
    batch = left_padded([5, 3])
    with torch.no_grad():
        out = model(batch.input_ids, batch.attention_mask, tiers=2)
    assert out.routing[0].topk_weight.dtype == torch.float32
    assert out.routing[0].scores.dtype == torch.float32


def test_casting_a_model_keeps_the_bias_exactly() -> None:
    model = tiny_model()
    before = [gate.gate.tier_bias.clone() for gate in moe_layers(model)]
    model.to(torch.bfloat16).float()
    for layer, bias in zip(moe_layers(model), before, strict=True):
        assert torch.equal(layer.gate.tier_bias, bias)


def test_gradients_reach_the_router_but_not_the_bias() -> None:
    model = tiny_model()
    batch = left_padded([6, 4])
    out = model(batch.input_ids, batch.attention_mask, tiers=1, labels=batch.input_ids)
    out.loss.backward()
    for layer in moe_layers(model):
        assert layer.gate.weight.grad[:8].any()
        assert not layer.gate.weight.grad[8:].any()  # outside the pool of tier 1
        assert not layer.gate.tier_bias.requires_grad
