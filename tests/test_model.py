"""The whole model: tiers are slices, mixing and padding change nothing; generation, gradients."""

from typing import Any

import pytest
import torch
from helpers import left_padded, thresholds, tiny_config, tiny_model
from torch import Tensor

from dvpa.model import DvpaForCausalLM
from dvpa.tiers import TierMap

NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model() -> DvpaForCausalLM:
    """Shared and never changed; tests that change a model make their own."""
    return tiny_model()


def spread(model: DvpaForCausalLM, batch: Any) -> list[int]:
    """Give the model a tier map that sends this batch to every tier; returns the tiers."""
    d = model.score(batch.input_ids, batch.attention_mask).difficulty.sort().values.tolist()
    model.tier_map = thresholds(model, (d[0] + d[1]) / 2, (d[-2] + d[-1]) / 2)
    score = model.score(batch.input_ids, batch.attention_mask).difficulty
    return [model.tier_map.tier(value) for value in score.tolist()]


# Tiers


@torch.no_grad()
def test_mixed_tiers_per_sequence_equal_separate_forwards(model: DvpaForCausalLM) -> None:
    batch = left_padded([9, 7, 4, 1, 9])
    tiers = torch.tensor([0, 1, 2, 1, 0])
    mixed = model(*batch, tiers=tiers)
    assert torch.equal(mixed.tiers, tiers)
    for row, tier in enumerate(tiers.tolist()):
        alone = model(*(part[row : row + 1] for part in batch), tiers=tier)
        valid = batch.attention_mask[row].bool()
        torch.testing.assert_close(mixed.logits[row, valid], alone.logits[0, valid], **NEAR)


@torch.no_grad()
def test_mixed_tiers_per_token_equal_a_switch_while_decoding(model: DvpaForCausalLM) -> None:
    """A context whose tier changes midway, in one forward and as two from one cache."""
    batch = left_padded([9, 6])
    tiers = torch.tensor([[0] * 5 + [2] * 4, [2] * 5 + [1] * 4])
    whole = model(*batch, tiers=tiers)
    assert torch.equal(whole.tiers, tiers)
    first = model(
        batch.input_ids[:, :5],
        batch.attention_mask[:, :5],
        batch.position_ids[:, :5],
        tiers=tiers[:, 0],
        use_cache=True,
    )
    second = model(
        batch.input_ids[:, 5:],
        batch.attention_mask,
        batch.position_ids[:, 5:],
        past_key_values=first.past_key_values,
        tiers=tiers[:, 5],
    )
    valid = batch.attention_mask.bool()
    joined = torch.cat((first.logits, second.logits), 1)
    torch.testing.assert_close(whole.logits[valid], joined[valid], **NEAR)


@pytest.mark.parametrize("tier", [0, 1, 2])
@torch.no_grad()
def test_a_tier_is_the_truncated_model_with_sliced_weights(
    tier: int, model: DvpaForCausalLM
) -> None:
    config = model.config.truncate(tier + 1)
    cut = DvpaForCausalLM(config).eval()
    full, pool = model.state_dict(), config.n_routed_experts
    sliced = {}
    for name, target in cut.state_dict().items():
        part = full[name]
        if name.endswith("tier_bias"):
            part = part[: tier + 1, :pool]
        elif part.shape != target.shape:
            part = part[:pool]
        sliced[name] = part
    cut.load_state_dict(sliced)
    batch = left_padded([8, 3])
    valid = batch.attention_mask.bool()
    for lower in range(tier + 1):
        expected = model(*batch, tiers=lower).logits[valid]
        torch.testing.assert_close(cut(*batch, tiers=lower).logits[valid], expected, **NEAR)


@torch.no_grad()
def test_tiers_by_name_index_and_tensor_agree(model: DvpaForCausalLM) -> None:
    ids = left_padded([6]).input_ids
    expected = model(ids, tiers=1).logits
    for tiers in ("middle", "1", torch.tensor([1]), torch.full((1, 6), 1)):
        torch.testing.assert_close(model(ids, tiers=tiers).logits, expected, **NEAR)
    assert not torch.allclose(model(ids, tiers=0).logits, expected)
    assert not torch.allclose(model(ids, tiers=2).logits, expected)


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        (3, "0=base, 1=middle, 2=top"),
        (-1, "tier: -1 is not one of"),
        ("huge", "'huge' is not one of"),
        (torch.tensor([0, 3]), "tier"),
        (torch.tensor([0, -2]), "tier"),
        (torch.tensor([0, 1, 2]), r"tiers: shape \(3,\) must be \(2,\) or \(2, 5\)"),
        (torch.zeros(2, 4, dtype=torch.long), r"tiers: shape \(2, 4\)"),
    ],
)
def test_bad_tiers_are_named(tiers: Any, message: str, model: DvpaForCausalLM) -> None:
    with pytest.raises(ValueError, match=message):
        model(left_padded([5, 5]).input_ids, tiers=tiers)


def test_both_or_no_inputs_are_refused(model: DvpaForCausalLM) -> None:
    ids = left_padded([4]).input_ids
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: exactly one"):
        model(ids, inputs_embeds=torch.zeros(1, 4, 32), tiers=0)
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: exactly one"):
        model(tiers=0)


@torch.no_grad()
def test_embeddings_instead_of_ids(model: DvpaForCausalLM) -> None:
    ids = left_padded([5]).input_ids
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded, tiers=1).logits, model(ids, tiers=1).logits)


# What the model decides by itself


@torch.no_grad()
def test_the_head_and_the_map_decide_per_sequence() -> None:
    model = tiny_model()
    batch = left_padded([9, 7, 4, 2])
    expected = spread(model, batch)
    assert set(expected) == {0, 1, 2}
    out = model(*batch)
    assert out.tiers.tolist() == expected
    head = model.score(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(out.difficulty, head.difficulty)
    torch.testing.assert_close(head.difficulty, 1 - head.success[:, 0])
    assert (head.success.diff(dim=1) >= 0).all()
    chosen = model(*batch, tiers=torch.tensor(expected))
    valid = batch.attention_mask.bool()
    torch.testing.assert_close(out.logits[valid], chosen.logits[valid], **NEAR)
    assert model.policy.counters["tier_map"] == 4
    assert [len(out.routing), len(chosen.routing)] == [2, 2]


@torch.no_grad()
def test_the_probe_is_reused_where_every_request_stays_at_base() -> None:
    model = tiny_model()
    model.tier_map = thresholds(model, 2.0, 2.0)
    batch = left_padded([7, 4])
    runs: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: runs.append(i))
    out = model(*batch, use_cache=True)
    assert runs == [0, 1, 2]  # no layer twice
    assert out.tiers.tolist() == [0, 0]
    runs.clear()
    model.tier_map = thresholds(model, 0.0, 2.0)
    model(*batch, use_cache=True)
    assert runs == [0, 1, 1, 2]  # the trunk once, the probe layer again at the higher tier
    step = {
        "input_ids": torch.tensor([[5], [6]]),
        "attention_mask": torch.ones(2, 8, dtype=torch.long)
        * batch.attention_mask[:, :1].new_ones(1),
        "tiers": out.tiers,
    }
    step["attention_mask"][:, :7] = batch.attention_mask
    reference = model(*batch, tiers=0, use_cache=True).past_key_values
    torch.testing.assert_close(
        model(**step, past_key_values=out.past_key_values).logits,
        model(**step, past_key_values=reference).logits,
        **NEAR,
    )


def test_an_unfitted_map_sends_everything_to_the_top(model: DvpaForCausalLM) -> None:
    before = model.policy.counters["fallback"]
    out = model(*left_padded([5, 3]))
    assert out.tiers.tolist() == [2, 2]
    assert model.policy.counters["fallback"] == before + 2


@pytest.mark.parametrize("default", [0, 1, 2])
@torch.no_grad()
def test_a_nan_difficulty_falls_back_and_is_counted(default: int) -> None:
    model = tiny_model()
    costs = model.tier_map.costs
    names = ("base", "middle", "top")
    model.tier_map = TierMap("threshold", names, costs, default, (0.2, 0.4))
    model.difficulty_head.fc2.weight.fill_(float("nan"))
    out = model(*left_padded([5, 3]))
    assert out.difficulty.isnan().all()
    assert out.tiers.tolist() == [default, default]
    assert model.policy.counters["fallback"] == 2
    assert out.logits.isfinite().all()


@torch.no_grad()
def test_without_a_head_the_default_tier_answers() -> None:
    model = tiny_model(tiny_config(difficulty=None))
    out = model(*left_padded([5, 3]))
    assert out.difficulty is None
    assert out.tiers.tolist() == [2, 2]
    assert model.policy.counters["fallback"] == 2
    with pytest.raises(ValueError, match="no difficulty head"):
        model.score(left_padded([4]).input_ids)


@torch.no_grad()
def test_the_score_ignores_padding(model: DvpaForCausalLM) -> None:
    batch = left_padded([9, 4])
    both = model.score(batch.input_ids, batch.attention_mask)
    alone = model.score(batch.input_ids[1:, 5:])
    torch.testing.assert_close(both.z[1:], alone.z, rtol=1e-4, atol=1e-5)


def test_training_the_head_leaves_the_backbone_alone() -> None:
    model = tiny_model()
    model.score(left_padded([5]).input_ids).success.sum().backward()
    for name, parameter in model.named_parameters():
        touched = parameter.grad is not None and bool(parameter.grad.any())
        assert touched == name.startswith("difficulty_head."), name


def test_a_map_for_other_tiers_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="tier_map: its tiers"):
        model.tier_map = TierMap.untrained(["a", "b"], [1.0, 2.0])


def test_a_cached_prompt_needs_its_tiers(model: DvpaForCausalLM) -> None:
    batch = left_padded([5])
    cache = model(batch.input_ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="tiers: required once a prompt is cached"):
        model(torch.tensor([[4]]), past_key_values=cache)


# Generation


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generate_keeps_the_decided_tier(beams: int) -> None:
    model = tiny_model()
    batch = left_padded([9, 7, 4, 2])
    expected = spread(model, batch)
    assert set(expected) == {0, 1, 2}
    arguments = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "max_new_tokens": 8,
        "num_beams": beams,
        "do_sample": False,
    }
    seen: list[list[int]] = []
    decide = model.forward

    def watching(*args: Any, **kwargs: Any) -> Any:
        out = decide(*args, **kwargs)
        seen.append(out.tiers.tolist())
        return out

    model.forward = watching
    decided = model.generate(**arguments)
    repeated = [tier for tier in expected for _ in range(beams)]
    assert len(seen) > 3
    assert all(tiers == repeated for tiers in seen)
    model.forward = decide
    assert torch.equal(decided, model.generate(**arguments, tiers=torch.tensor(expected)))


@pytest.mark.parametrize("tiers", [0, "middle", torch.tensor([2, 0, 1])], ids=str)
@torch.no_grad()
def test_generate_equals_decoding_without_a_cache(tiers: Any, model: DvpaForCausalLM) -> None:
    batch = left_padded([8, 5, 2])
    arguments = {"attention_mask": batch.attention_mask, "max_new_tokens": 6, "do_sample": False}
    generated = model.generate(batch.input_ids, tiers=tiers, **arguments)
    ids, mask = batch.input_ids, batch.attention_mask
    ended = torch.zeros(3, dtype=torch.bool)
    for _ in range(generated.shape[1] - 8):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, mask, positions, tiers=tiers, use_cache=False).logits[:, -1]
        token = logits.argmax(-1).masked_fill(ended, model.config.pad_token_id)
        ended |= token == model.config.eos_token_id
        ids = torch.cat((ids, token[:, None]), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    assert torch.equal(generated, ids)


@torch.no_grad()
def test_generate_without_a_cache_and_with_several_samples(model: DvpaForCausalLM) -> None:
    batch = left_padded([6, 4])
    arguments = {"attention_mask": batch.attention_mask, "max_new_tokens": 5, "tiers": 1}
    cached = model.generate(batch.input_ids, do_sample=False, **arguments)
    plain = model.generate(batch.input_ids, do_sample=False, use_cache=False, **arguments)
    assert torch.equal(cached, plain)
    torch.manual_seed(0)
    samples = model.generate(batch.input_ids, do_sample=True, num_return_sequences=3, **arguments)
    assert samples.shape[0] == 6


# Training


def gradients(model: DvpaForCausalLM) -> dict[str, Tensor]:
    batch = left_padded([9, 6])
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    model.zero_grad()
    out = model(*batch, tiers=torch.tensor([1, 2]), labels=labels, use_cache=False)
    out.loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(reentrant: bool) -> None:
    model = tiny_model().train()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], msg=name)


def test_checkpointing_also_where_the_model_decides() -> None:
    """`tiers=None` fills a scratch cache in eval mode; checkpointed layers do without one."""
    model = tiny_model().train()
    model.tier_map = thresholds(model, 2.0, 2.0)
    model.gradient_checkpointing_enable()
    batch = left_padded([6, 4])
    out = model(*batch, labels=batch.input_ids)
    out.loss.backward()
    assert out.tiers.tolist() == [0, 0]
    expected = model.eval()(*batch, tiers=0, labels=batch.input_ids).loss
    torch.testing.assert_close(out.loss, expected)


def test_every_parameter_of_the_pool_learns(model: DvpaForCausalLM) -> None:
    own = tiny_model().train()
    found = gradients(own)
    assert {n for n, _ in own.named_parameters() if not n.startswith("difficulty_head")} == set(
        found
    )


def test_the_loss_is_shifted_and_skips_padding(model: DvpaForCausalLM) -> None:
    batch = left_padded([7, 4])
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    out = model(*batch, tiers=0, labels=labels)
    logs = out.logits[:, :-1].log_softmax(-1)
    kept = labels[:, 1:] != -100
    picked = logs.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(out.loss, -picked[kept].mean())


@torch.no_grad()
def test_outputs_of_transformers_are_there(model: DvpaForCausalLM) -> None:
    ids = left_padded([6]).input_ids
    out = model(ids, tiers=2, output_hidden_states=True, logits_to_keep=1)
    assert out.logits.shape == (1, 1, 64)
    assert len(out.hidden_states) == 4
    torch.testing.assert_close(out.logits, model(ids, tiers=2).logits[:, -1:])
    assert isinstance(model(ids, tiers=2, return_dict=False), tuple)


def test_pricing_counts_the_built_model(model: DvpaForCausalLM) -> None:
    from dvpa.pricing import price

    for changes in ({}, {"tie_word_embeddings": True, "q_lora_rank": 12, "attention_bias": True}):
        with torch.device("meta"):
            built = DvpaForCausalLM(tiny_config(**changes))
        assert price(built.config).total_params == sum(p.numel() for p in built.parameters())
