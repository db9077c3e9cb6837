"""Rows of a step: labels, tiers, pairing, switching, determinism; losses and load balancing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dvpa.config import load_model_config
from dvpa.model import DvpaForCausalLM
from dvpa.model.router import NO_TIER
from dvpa_train.balance import LoadBalancer, load_metrics
from dvpa_train.batches import IGNORED, assign_tiers, collate
from dvpa_train.config import OptimizerConfig, StageConfig
from dvpa_train.losses import distillation_kl, token_nll
from dvpa_train.module import TierModule

EXAMPLES = [([1, 7, 8], [9, 2]), ([1, 5], [6, 4, 3, 2]), ([1, 4], [2])]


def _stage(**changes: object) -> StageConfig:
    fields = {"name": "joint", "kind": "joint", "num_tiers": 3, "steps": 10, **changes}
    return StageConfig(**fields)  # type: ignore[arg-type]


def test_labels_are_the_next_token_of_the_completion_only() -> None:
    batch = collate(EXAMPLES, pad_id=0, prompt_loss=False)
    assert batch["input_ids"].tolist() == [
        [1, 7, 8, 9, 2, 0],
        [1, 5, 6, 4, 3, 2],
        [1, 4, 2, 0, 0, 0],
    ]
    x = IGNORED
    assert batch["labels"].tolist() == [[x, x, 9, 2, x, x], [x, 6, 4, 3, 2, x], [x, 2, x, x, x, x]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 6, 3]


def test_prompt_loss_adds_the_prompt_but_never_padding() -> None:
    labels = collate(EXAMPLES, pad_id=0, prompt_loss=True)["labels"]
    assert labels[0].tolist() == [7, 8, 9, 2, IGNORED, IGNORED]


def test_padding_gets_no_tier_and_rows_follow_the_weights() -> None:
    batch = collate(EXAMPLES * 400, pad_id=0, prompt_loss=False)
    rows = assign_tiers(batch, _stage(tier_weights=[0.5, 0.0, 0.5]), seed=0, step=0)
    assert not rows.paired
    assert ((rows.tiers == NO_TIER) == (batch["attention_mask"] == 0)).all()
    first = rows.tiers[:, 0]
    assert set(first.tolist()) == {0, 2}
    assert abs((first == 0).float().mean() - 0.5) < 0.05


def test_distillation_pairs_every_example_with_itself_at_the_top() -> None:
    batch = collate(EXAMPLES, pad_id=0, prompt_loss=False)
    rows = assign_tiers(batch, _stage(distillation=0.5), seed=0, step=3)
    assert rows.paired
    assert torch.equal(rows.input_ids[:3], rows.input_ids[3:])
    assert torch.equal(rows.labels[:3], rows.labels[3:])
    real = batch["attention_mask"].bool()
    assert (rows.tiers[:3][real] == 2).all()
    assert (rows.tiers[3:][real] < 2).all()


def test_switched_rows_change_tier_once_inside_the_sequence() -> None:
    batch = collate([([1, *range(10, 20)], [*range(20, 30), 2])] * 64, pad_id=0, prompt_loss=False)
    rows = assign_tiers(batch, _stage(distillation=0.5, switch_fraction=1.0), seed=0, step=0)
    changes = (rows.tiers[64:, 1:] != rows.tiers[64:, :-1]).sum(1)
    assert changes.max() == 1
    assert (changes == 1).float().mean() > 0.4


@given(seed=st.integers(0, 5), step=st.integers(0, 1000))
def test_tiers_depend_on_seed_stage_and_step_only(seed: int, step: int) -> None:
    batch = collate(EXAMPLES, pad_id=0, prompt_loss=False)
    stage = _stage(distillation=0.5, switch_fraction=0.5)
    first, second = (assign_tiers(batch, stage, seed, step).tiers for _ in range(2))
    assert torch.equal(first, second)


def test_losses_against_their_definitions() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 2, 1])
    naive = [-torch.log_softmax(student[i], 0)[t] for i, t in enumerate(targets.tolist())]
    torch.testing.assert_close(token_nll(student, targets), torch.stack(naive))
    p = (teacher / 2).softmax(-1)
    kl = 4 * (p * (p.log() - F.log_softmax(student / 2, -1))).sum(-1)
    ours = distillation_kl(student, teacher, 2.0)
    torch.testing.assert_close(ours, kl.detach(), check_stride=False)
    ours.sum().backward()
    assert teacher.grad is None  # the teacher is a constant
    assert student.grad is not None


@pytest.fixture
def model() -> DvpaForCausalLM:
    """A random pico model."""
    torch.manual_seed(0)
    config = load_model_config("model/pico.yaml")
    config.initializer_range = 0.3
    return DvpaForCausalLM(config)


def test_step_loss_mixes_both_halves_and_reports_every_tier(model: DvpaForCausalLM) -> None:
    stage = _stage(distillation=0.25, tier_weights=[0.5, 0.5, 0.0])
    module = TierModule(model, stage, OptimizerConfig(), seed=0)
    rows = assign_tiers(collate(EXAMPLES * 8, 0, False), stage, 0, 0)
    logits = model(rows.input_ids, tiers=rows.tiers, use_cache=False).logits
    loss, sums = module.loss(logits, rows)
    parts = sums.means()
    scored = rows.labels != IGNORED
    nll = token_nll(logits[scored], rows.labels[scored])
    half = len(nll) // 2
    kl = distillation_kl(logits[scored][half:], logits[scored][:half], 1.0).mean()
    expected = 0.5 * (nll[:half].mean() + 0.75 * nll[half:].mean() + 0.25 * kl)
    torch.testing.assert_close(loss, expected)
    assert parts["nll/tier_2"] == pytest.approx(float(nll[:half].mean()))
    assert {"nll/tier_0", "nll/tier_1", "distillation"} <= parts.keys()


def test_balancing_moves_biases_toward_even_load_inside_the_pool(model: DvpaForCausalLM) -> None:
    balancer = LoadBalancer(model)
    ids = torch.randint(4, 300, (16, 12))
    tiers = torch.arange(16) % 3

    def worst() -> float:
        balancer.observe(model(ids, tiers=tiers, use_cache=False).routing)
        metrics = load_metrics(balancer.load, model.config)
        return metrics["balance/max_violation_worst_layer/top"]

    before = worst()
    load = balancer.load.clone()
    balancer.update(0.01)
    bias = model.model.layers[1].mlp.gate.tier_bias
    pool = model.config.pool_size(0)
    over = load[0, 0, :pool] > load[0, 0, :pool].mean()
    assert (bias[0, :pool][over] < 0).all()
    assert not bias[0, pool:].any()  # nothing outside the tier's pool moves
    assert torch.equal(balancer.last_load, load)
    assert not balancer.load.any()
    for _ in range(60):
        worst()
        balancer.update(0.01)
    assert worst() < before


def test_counts_equal_a_plain_loop_over_the_routing_record(model: DvpaForCausalLM) -> None:
    balancer = LoadBalancer(model)
    tiers = torch.randint(0, 3, (4, 9))
    tiers[0, 5:] = NO_TIER
    routing = model(torch.randint(4, 300, (4, 9)), tiers=tiers, use_cache=False).routing
    balancer.observe(routing)
    expected = np.zeros(balancer.load.shape)
    for layer, routed in enumerate(routing):
        for slots, tier in zip(routed.topk_index.tolist(), routed.tiers.tolist(), strict=True):
            for expert in slots:
                if tier != NO_TIER and expert < model.config.n_routed_experts:
                    expected[layer, tier, expert] += 1
    np.testing.assert_array_equal(balancer.load.numpy(), expected)
    real = tiers[tiers != NO_TIER].tolist()
    rows = len(routing) * sum(model.config.tiers[tier].top_k for tier in real)
    assert balancer.load.sum() == rows
