"""The gates that are ablations: against a plain transcription, in the engine, refused by export."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_oracle import Oracle, make_engine
from helpers import tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvpa.checkpoint.export import export_tier
from dvpa.config import DvpaConfig
from dvpa.engine import SamplingParams
from dvpa.model.router import NO_TIER, DvpaRouter, TierPlan
from dvpa_train.balance import LoadBalancer

QUOTA_TIERS = [
    {"name": "base", "num_groups": 1, "top_k": 2, "topk_group": 1, "routed_scaling_factor": 1.0},
    {"name": "middle", "num_groups": 2, "top_k": 3, "topk_group": 2, "routed_scaling_factor": 1.0},
    {"name": "top", "num_groups": 4, "top_k": 6, "topk_group": 4, "routed_scaling_factor": 1.0},
]
GATES: dict[str, dict[str, Any]] = {
    "fixed_denominator": {"gate": "fixed_denominator"},
    "group_quota": {"gate": "group_quota", "tiers": QUOTA_TIERS},
}


def best(scores: dict[int, float], bias: list[float], count: int) -> list[int]:
    return sorted(scores, key=lambda e: -(scores[e] + bias[e]))[:count]


def limited(scores: dict[int, float], bias: list[float], config: DvpaConfig, tier: int) -> Any:
    """The scores of a tier's pool that its best groups hold."""
    rule, size = config.tiers[tier], config.group_size
    groups = {
        g: sum(sorted(scores[e] + bias[e] for e in range(g * size, (g + 1) * size))[-2:])
        for g in range(rule.num_groups)
    }
    kept = sorted(groups, key=lambda g: -groups[g])[: rule.topk_group]
    return {e: scores[e] for g in kept for e in range(g * size, (g + 1) * size)}


def oracle(hidden: Tensor, router: DvpaRouter, tier: int) -> dict[int, float]:
    """Expert -> weight of one token by the definition."""
    config, bias = router.config, router.tier_bias.tolist()
    raw = (router.weight.double() @ hidden.double()).sigmoid().tolist()
    scores = dict(enumerate(raw))
    if config.gate == "group_quota":
        chosen, start, top_k = [], 0, 0
        for t in range(tier + 1):
            end = config.pool_size(t)
            added = {e: scores[e] for e in range(start, end)}
            chosen += best(added, bias[t], config.tiers[t].top_k - top_k)
            start, top_k = end, config.tiers[t].top_k
        base = chosen[: config.tiers[0].top_k]
    else:
        chosen = best(limited(scores, bias[tier], config, tier), bias[tier], _slots(config, tier))
        base = best(limited(scores, bias[0], config, 0), bias[0], _slots(config, 0))
    total = sum(scores[e] for e in base)
    scale = config.tiers[tier].routed_scaling_factor
    return {e: scores[e] / total * scale for e in chosen}


def _slots(config: DvpaConfig, tier: int) -> int:
    return int(config.tiers[tier].top_k)


def make_router(gate: str, seed: int) -> DvpaRouter:
    router = DvpaRouter(tiny_config(**GATES[gate]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.normal_(0, 0.3, generator=generator)
        router.tier_bias.normal_(-0.2, 0.4, generator=generator)
    return router


def weights_of(router: DvpaRouter, hidden: Tensor, tiers: Tensor) -> list[dict[int, float]]:
    routing = router(hidden, TierPlan(tiers[None], int(tiers.max())))
    rows = zip(routing.topk_index.tolist(), routing.topk_weight.tolist(), strict=True)
    empty = router.config.n_routed_experts
    return [
        {e: w for e, w in zip(index, weight, strict=True) if e != empty} for index, weight in rows
    ]


@given(gate=st.sampled_from(sorted(GATES)), seed=st.integers(0, 10_000))
def test_a_gate_is_its_formula(gate: str, seed: int) -> None:
    router = make_router(gate, seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(12, 32, generator=generator)
    tiers = torch.randint(NO_TIER, 3, (12,), generator=generator)
    for row, tier, found in zip(hidden, tiers, weights_of(router, hidden, tiers), strict=True):
        wanted = {} if tier == NO_TIER else oracle(row, router, int(tier))
        assert found == pytest.approx(wanted, rel=1e-5)


@given(seed=st.integers(0, 10_000))
def test_with_quotas_a_tier_is_the_lower_one_and_more(seed: int) -> None:
    router = make_router("group_quota", seed)
    hidden = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    of_tier = [weights_of(router, hidden, torch.full((8,), tier)) for tier in range(3)]
    for lower, higher in pairwise(of_tier):
        for few, many in zip(lower, higher, strict=True):
            assert {e: many[e] for e in few} == pytest.approx(few, rel=1e-5)
            assert len(many) > len(few)


@pytest.mark.parametrize("gate", GATES)
def test_the_engine_answers_as_the_model(gate: str) -> None:
    oracle = Oracle(**GATES[gate])
    engine = make_engine(oracle.model, page_size=4)
    for tier in range(oracle.num_tiers):
        params = SamplingParams(max_tokens=12, temperature=0.0, tier=tier, ignore_eos=True)
        for prompt, output in enumerate(engine.generate(oracle.prompts[:6], params)):
            oracle.check(prompt, tier, output.token_ids)


@pytest.mark.parametrize("gate", GATES)
def test_a_checkpoint_keeps_its_gate_and_cannot_be_exported(gate: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(**GATES[gate]))
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = type(model).from_pretrained(tmp_path / "checkpoint")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(ids, tiers=1).logits, model(ids, tiers=1).logits)
    with pytest.raises(ValueError, match=f"gate: '{gate}' is an ablation"):
        export_tier(tmp_path / "checkpoint", 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_balancing_stays_among_the_experts_that_a_tier_adds() -> None:
    model = tiny_model(tiny_config(**GATES["group_quota"]), bias=0.0)
    batch = torch.randint(3, 64, (16, 24), generator=torch.Generator().manual_seed(0))
    balancer = LoadBalancer(model)

    def violations() -> list[float]:
        """The busiest expert over the mean, among those that each tier adds."""
        balancer.observe(model(batch, tiers=torch.arange(16) % 3, use_cache=False).routing)
        load = balancer.load.sum(1)[-1]
        return [float(part.max() / part.mean()) for part in load.split([4, 4, 8])]

    before = violations()
    first = balancer.load.clone()
    balancer.update(0.01)
    bias = model.model.layers[1].mlp.gate.tier_bias
    for tier, (start, end) in enumerate([(0, 4), (4, 8), (8, 16)]):
        load = first[0, tier:, start:end].sum(0)
        assert torch.equal(bias[tier, start:end].sign(), (load.mean() - load).sign())
        assert not bias[tier, :start].any() and not bias[tier, end:].any()
    for _ in range(80):
        violations()
        balancer.update(0.01)
    after = violations()
    assert all(late < early for late, early in zip(after, before, strict=True)), (before, after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "topk"}, "gate: 'topk' must be one of deepseek_v3, fixed_denominator"),
        ({"gate": "fixed_denominator", "norm_topk_prob": False}, "norm_topk_prob: False must be"),
        ({"gate": "group_quota", "scoring_func": "softmax"}, "scoring_func: 'softmax' must be"),
        ({"gate": "group_quota"}, r"tiers\[1\].topk_group: 1 must be all 2"),
        (
            {"gate": "group_quota", "tiers": [QUOTA_TIERS[0], {**QUOTA_TIERS[2], "top_k": 2}]},
            r"tiers\[1\].top_k: 2 must be in 3 \.\. 14",
        ),
    ],
)
def test_what_a_gate_needs_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
