"""What one request gets: text, stops, log-probabilities, seeds; and what settings are taken."""

import dataclasses
from typing import Any

import pytest
import torch
from engine_oracle import (
    NUM_NEW,
    Arrival,
    greedy,
    logits_of,
    make_engine,
    one,
    oracle,
    preempt_at_random,
    serve,
)
from helpers import tiny_config, tiny_model
from transformers import PreTrainedTokenizerBase

from dvpa.engine import Engine, EngineConfig, SamplingParams, SpeculateParams
from dvpa.model import DvpaForCausalLM, answer
from dvpa.pricing import price
from dvpa.tasks.tokenizer import train_tokenizer
from dvpa.tiers import TierMap

TEXTS = ["one and two", "sort 312 ->", "four", "two and three and one and two 99 ->"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["one and two", "two and three", "sort 312 -> 123", "four"] * 4, 300)


@pytest.fixture(scope="module")
def speaker(tokenizer: PreTrainedTokenizerBase) -> DvpaForCausalLM:
    """A model with a vocabulary of text, and a fitted map under which TEXTS meet every tier."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    model = tiny_model(
        tiny_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **ids), seed=1
    )
    scores = sorted(
        a.telemetry.difficulty for a in answer(model, tokenizer, TEXTS, max_new_tokens=1)
    )
    cuts = ((scores[0] + scores[1]) / 2, (scores[2] + scores[3]) / 2)
    names, costs = model.tier_map.tier_names, model.tier_map.costs
    model.tier_map = TierMap("threshold", names, costs, 2, cuts)
    return model


@pytest.fixture
def engine() -> Engine:
    """Over the oracle's model, which never ends an answer by itself."""
    return make_engine(oracle().model, page_size=4)


# -- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fitted", [True, False])
def test_base_read_answers_are_those_of_the_model_alone(
    speaker: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase, fitted: bool
) -> None:
    before = speaker.tier_map
    try:
        if not fitted:  # then no score is usable, and the tier that answers reads the prompt
            speaker.tier_map = TierMap.untrained(before.tier_names, before.costs)
        engine = Engine(speaker, tokenizer, read_prompt="base", page_size=4)
        outputs = engine.generate(TEXTS, greedy(max_tokens=6))
        expected = answer(speaker, tokenizer, TEXTS, max_new_tokens=6)
    finally:
        speaker.tier_map = before
    for output, alone in zip(outputs, expected, strict=True):
        assert list(output.token_ids) == alone.token_ids
        assert output.text.strip() == alone.text
        for name in ("tier", "decided_by", "tier_tokens", "prompt_tokens", "thresholds"):
            assert getattr(output.telemetry, name) == getattr(alone.telemetry, name), name
        # `generate` cannot begin without a token: it reads the last one again at the base tier too.
        twice = output.telemetry.tier == 0
        once = price(speaker.config).tiers[0].flops_per_token
        assert output.telemetry.flops == alone.telemetry.flops - once * twice
    assert {o.telemetry.tier for o in outputs} == ({0, 1, 2} if fitted else {2})


def test_prompts_come_as_text_or_ids_one_or_many(
    speaker: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine, params = Engine(speaker, tokenizer), greedy(max_tokens=4, tier=1)
    ids = tokenizer(TEXTS[0])["input_ids"]
    given = [engine.generate(prompt, params) for prompt in (TEXTS[0], [TEXTS[0]], ids, [ids])]
    assert len({(len(outputs), outputs[0].token_ids, outputs[0].text) for outputs in given}) == 1
    assert given[0][0].prompt_token_ids == tuple(ids)
    assert given[0][0].text == tokenizer.decode(given[0][0].token_ids, skip_special_tokens=True)
    assert engine.generate([]) == []
    each = engine.generate(TEXTS, [greedy(max_tokens=n) for n in (1, 2, 3, 4)])
    assert [len(output.token_ids) for output in each] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="params: 2 given for 4 prompts"):
        engine.generate(TEXTS, [params, params])


def test_more_prompts_than_the_queue_holds(engine: Engine) -> None:
    known = oracle()
    small = make_engine(known.model, max_queue=2, max_num_seqs=2)
    outputs = small.generate(known.prompts, greedy(max_tokens=2, tier=0))
    assert [list(o.token_ids) for o in outputs] == [known.answer(i, 0)[:2] for i in range(20)]


# -- ends -----------------------------------------------------------------------------------------


def test_the_end_of_an_answer() -> None:
    known = oracle()
    answers = [known.answer(i, 2) for i in range(20)]
    i = next(i for i, tokens in enumerate(answers) if len(set(tokens[:4])) == 4)
    prompt, tokens = known.prompts[i], answers[i]
    try:
        known.model.generation_config.eos_token_id = [tokens[2], tokens[3]]
        engine = make_engine(known.model)
    finally:
        known.model.generation_config.eos_token_id = None

    def end(**params: Any) -> tuple[list[int], str]:
        output = one(engine, prompt, greedy(tier=2, **params))
        return list(output.token_ids), output.finish_reason

    assert end() == (tokens[:3], "stop")
    assert end(ignore_eos=True) == (tokens, "length")
    assert end(stop_token_ids=[tokens[1]]) == (tokens[:2], "stop")
    assert end(ignore_eos=True, stop_token_ids=[tokens[1]]) == (tokens[:2], "stop")
    assert end(max_tokens=3) == (tokens[:3], "stop")
    assert end(max_tokens=2) == (tokens[:2], "length")
    # Held back, the end is not even chosen: other tokens take its place from there on.
    held, _ = end(min_tokens=5, max_tokens=6)
    assert held[:2] == tokens[:2] and not {tokens[2], tokens[3]} & set(held[:5])


def test_without_max_tokens_the_context_is_the_end() -> None:
    model = tiny_model(tiny_config(max_position_embeddings=40))
    model.generation_config.eos_token_id = None
    engine = make_engine(model)
    output = one(engine, [5, 6, 7], greedy(max_tokens=None, tier=1))
    assert len(output.token_ids) == 37 and output.finish_reason == "length"
    output = one(engine, [5] * 39, greedy(max_tokens=20, tier=1))
    assert len(output.token_ids) == 1 and output.finish_reason == "length"


def test_stop_strings(speaker: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    engine, prompt = Engine(speaker, tokenizer), TEXTS[3]
    letters = {i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip().isalnum()}
    readable = dict.fromkeys(set(range(len(tokenizer))) - letters, -100.0)

    def complete(**params: Any) -> tuple[str, str]:
        params = {"max_tokens": 24, "ignore_eos": True, "logit_bias": readable, **params}
        output = one(engine, prompt, greedy(tier=2, **params))
        return output.text, output.finish_reason

    text, _ = complete()
    start = next(i for i in range(3, len(text)) if text.index(text[i : i + 4]) == i)
    stop, before = text[start : start + 4], text[:start]
    assert len(stop) == 4, "a random string, so it crosses the borders of tokens"
    assert complete(stop=stop) == (before, "stop")
    assert complete(stop=["@@@", stop], include_stop_str_in_output=True) == (before + stop, "stop")
    assert complete(stop="@@@") == (text, "length")
    assert complete(stop=stop, min_tokens=24) == (text, "length")
    arrival = Arrival(prompt, greedy(tier=2, max_tokens=24, logit_bias=readable, stop=[stop]))
    serve(engine, [arrival])
    assert "".join(piece.text for piece in arrival.pieces) == before


# -- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("read_prompt", ["tier", "base"])
@pytest.mark.parametrize("tier", ["auto", 0, 2])
@pytest.mark.parametrize("prompt", [0, 1, 6, 7])
def test_logprobs_are_those_of_a_plain_forward(
    prompt: int, tier: int | str, read_prompt: str
) -> None:
    known = oracle()
    engine = make_engine(
        known.model, page_size=4, max_num_seqs=4, max_num_batched_tokens=9, read_prompt=read_prompt
    )
    ids = known.prompts[prompt]
    params = greedy(tier=tier, max_tokens=4, logprobs=3, prompt_logprobs=2, temperature=0.0)
    for _ in range(2):  # the second time with a known prefix, which must not hide anything
        output = one(engine, ids, params)
    used = known.tier_of(prompt) if tier == "auto" else int(tier)
    reads = 0 if tier == "auto" and read_prompt == "base" else used
    tiers = [reads] * (len(ids) - 1) + [used] * 4
    expected = logits_of(known.model, [*ids, *output.token_ids][:-1], tiers).log_softmax(-1)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    rows = [*output.prompt_logprobs[1:], *output.logprobs]
    assert len(rows) == len(ids) - 1 + 4
    for row, token, logprob_V in zip(rows, [*ids[1:], *output.token_ids], expected, strict=True):
        assert row is not None and row.token_id == token
        assert abs(row.logprob - float(logprob_V[token])) < 1e-4
        best = logprob_V.topk(len(row.top))
        assert torch.allclose(torch.tensor([*row.top.values()]), best.values, atol=1e-4)
    assert [len(row.top) for row in rows if row] == [2] * (len(ids) - 1) + [3] * 4


def test_logprobs_with_preemption_and_speculation() -> None:
    known = oracle()
    params = greedy(
        tier=2, logprobs=1, prompt_logprobs=1, speculate=SpeculateParams(length=3), ignore_eos=True
    )
    engine = make_engine(known.model, 56, page_size=1)
    preempt_at_random(engine)
    outputs = engine.generate(known.prompts[:10], params)
    assert engine.scheduler.num_preemptions > 0 and engine.progress.num_accepted > 0
    for prompt, output in zip(known.prompts, outputs, strict=False):
        expected = logits_of(known.model, [*prompt, *output.token_ids][:-1], 2).log_softmax(-1)
        rows = [*(output.prompt_logprobs or ())[1:], *output.logprobs]
        tokens = [*prompt[1:], *output.token_ids]
        found = torch.tensor([row.logprob for row in rows if row is not None])
        assert torch.allclose(found, expected[range(len(tokens)), tokens], atol=1e-4)


# -- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculate", [None, SpeculateParams(length=4)])
def test_seeded_outputs_do_not_depend_on_the_crowd(speculate: SpeculateParams | None) -> None:
    known = oracle()
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 8, "frequency_penalty": 0.4},
    ]
    params = [
        SamplingParams(
            **kinds[i % 3],
            seed=i,
            max_tokens=NUM_NEW,
            tier=(1, 2, 2, 0)[i % 4],
            speculate=speculate,
        )
        for i in range(20)
    ]
    alone = [
        one(make_engine(known.model), prompt, own).token_ids
        for prompt, own in zip(known.prompts, params, strict=True)
    ]
    crowded = make_engine(known.model, 56, page_size=1, max_num_seqs=8, max_num_batched_tokens=9)
    preempt_at_random(crowded)
    outputs = crowded.generate(known.prompts, params)
    assert [output.token_ids for output in outputs] == alone
    assert crowded.scheduler.num_preemptions > 9


def test_completions_of_one_prompt_bring_their_own_seeds(engine: Engine) -> None:
    prompt, params = oracle().prompts[6], SamplingParams(seed=7, tier=1, n=3, max_tokens=8)
    output = one(engine, prompt, params)
    assert [choice.index for choice in output.choices] == [0, 1, 2]
    assert output.token_ids == output.choices[0].token_ids
    single = [
        one(engine, prompt, dataclasses.replace(params, n=1, seed=7 + i)).token_ids
        for i in range(3)
    ]
    assert [choice.token_ids for choice in output.choices] == single
    assert len(set(single)) == 3
    unseeded = dataclasses.replace(params, seed=None)
    assert one(engine, prompt, unseeded).token_ids != one(engine, prompt, unseeded).token_ids


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", True),
        ("max_queue", 0),
        ("page_size", 1.5),
        ("cache_bytes", 0),
        ("cache_bytes", 100),
        ("read_prompt", "top"),
        ("degrade_from", 1.0),
        ("max_resident_bytes", 0),
        ("dtype", "int8"),
    ],
)
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: {value!r}"):
        Engine(oracle().model, **{field: value})


def test_settings_come_as_a_whole_or_one_by_one() -> None:
    config = EngineConfig(page_size=8, max_queue=3)
    engine = Engine(oracle().model, config=config, max_queue=5)
    assert engine.config == dataclasses.replace(config, max_queue=5)
    assert engine.pages.page_size == 8
    with pytest.raises(ValueError, match=r"max_num_batched_tokens: 4 must be at least .* \(32\)"):
        Engine(oracle().model, max_num_batched_tokens=4)
