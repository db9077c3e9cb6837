"""Growing the pool: lower tiers bit-identical, the new one near the last, experts learning."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM
from dvpa.tasks import train_tokenizer
from dvpa_train.batches import assign_tiers, collate
from dvpa_train.config import Recipe, StageConfig, load_recipe
from dvpa_train.examples import GradedSource
from dvpa_train.growth import ROUTER_STD, grow
from dvpa_train.module import TierModule


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The pico recipe."""
    return load_recipe("train/pico.yaml")


@pytest.fixture(scope="module")
def source(recipe: Recipe) -> GradedSource:
    """Its tasks, with a tokenizer trained on them."""
    assert recipe.data.graded is not None
    source = GradedSource(recipe.data.graded, seed=0)
    tokenizer: PreTrainedTokenizerBase = train_tokenizer(
        source.evaluation.training_lines(3000), 320
    )
    source.prepare(tokenizer)
    return source


def _batch(source: GradedSource, start: int, size: int) -> dict[str, Tensor]:
    return collate(source.train_batch(start, start + size), pad_id=3, prompt_loss=False)


def _train(
    model: DvpaForCausalLM, source: GradedSource, steps: int, rate: float = 5e-3
) -> DvpaForCausalLM:
    """Plain training at the model's top tier, with load balancing."""
    stage = StageConfig("test", "foundation", model.config.num_tiers, steps=steps)
    stage.tier_weights = [0.0] * model.config.top_tier + [1.0]
    module = TierModule(model, stage, load_recipe("train/pico.yaml").optimizer, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        rows = assign_tiers(_batch(source, 64 * step, 64), stage, 0, step)
        out = model(rows.input_ids, tiers=rows.tiers, use_cache=False)
        module.balancer.observe(out.routing)
        optimizer.zero_grad()
        module.loss(out.logits, rows)[0].backward()
        optimizer.step()
        module.balancer.update(stage.bias_update_rate)
    return model


@torch.no_grad()
def _nll(model: DvpaForCausalLM, batch: dict[str, Tensor], tier: int) -> float:
    logits = model(batch["input_ids"], batch["attention_mask"], tiers=tier, use_cache=False).logits
    labels = batch["labels"].flatten()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100))


@pytest.fixture(scope="module")
def trained_base(recipe: Recipe, source: GradedSource) -> DvpaForCausalLM:
    """A base tier trained until its loss has clearly fallen."""
    torch.manual_seed(0)
    config = recipe.model_config().truncate(1)
    config.initializer_range = 0.1
    model = DvpaForCausalLM(config)
    before = _nll(model, _batch(source, 10**6, 256), 0)
    model = _train(model, source, steps=150)
    assert _nll(model, _batch(source, 10**6, 256), 0) < 0.6 * before
    return model


def _full(recipe: Recipe, tiers: int) -> DvpaConfig:
    config = recipe.model_config().truncate(tiers)
    config.initializer_range = 0.1
    return config


def test_lower_tiers_stay_bit_identical(
    recipe: Recipe, source: GradedSource, trained_base: DvpaForCausalLM
) -> None:
    batch = _batch(source, 0, 32)
    model = trained_base
    for tiers in (2, 3):
        grown = grow(model, _full(recipe, tiers), seed=5)
        for tier in range(tiers - 1):
            old = model(
                batch["input_ids"], batch["attention_mask"], tiers=tier, use_cache=False
            ).logits
            new = grown(
                batch["input_ids"], batch["attention_mask"], tiers=tier, use_cache=False
            ).logits
            assert torch.equal(old, new)
        model = grown


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_new_tier_starts_within_five_percent_of_its_predecessor(
    recipe: Recipe, source: GradedSource, trained_base: DvpaForCausalLM, seed: int
) -> None:
    held_out = _batch(source, 10**6, 512)
    grown = grow(trained_base, _full(recipe, 2), seed=seed)
    before, after = _nll(grown, held_out, 0), _nll(grown, held_out, 1)
    assert abs(after - before) <= 0.05 * before, (before, after)


def test_new_experts_begin_silent_and_learn(
    recipe: Recipe, source: GradedSource, trained_base: DvpaForCausalLM
) -> None:
    grown = grow(trained_base, _full(recipe, 2), seed=5)
    old = trained_base.config.n_routed_experts
    experts = grown.model.layers[1].mlp.experts
    assert not experts.down_proj[old:].any()
    assert experts.gate_up_proj[old:].std() > 0
    router = grown.model.layers[1].mlp.gate.weight[old:]
    assert 0 < router.std() < 3 * ROUTER_STD
    held_out = _batch(source, 10**6, 256)
    before = _nll(grown, held_out, 1)
    _train(grown, source, steps=60)
    assert experts.down_proj[old:].abs().sum() > 0
    assert _nll(grown, held_out, 1) < before


def test_growing_into_other_tiers_is_refused(recipe: Recipe, trained_base: DvpaForCausalLM) -> None:
    other = recipe.model_config().to_dict()
    other["tiers"][0]["routed_scaling_factor"] = 9.0
    with pytest.raises(ValueError, match="must begin with"):
        grow(trained_base, DvpaConfig.from_dict(other), seed=0)
