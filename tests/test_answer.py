"""Answers: text, tiers, reasons and telemetry; what bad requests say."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_config, tiny_model
from transformers import PreTrainedTokenizerBase

from dvpa.model import Answer, DvpaForCausalLM, answer
from dvpa.model.answer import encode_prompt, load, stream
from dvpa.pricing import price
from dvpa.tasks.tokenizer import train_tokenizer
from dvpa.tiers import TelemetryRecord, TierMap

PROMPTS = ["one and two", "sort 312 ->", "four", "two and three and one and two 99 ->"]
FIELDS = (
    "request_id tier tier_name difficulty success_by_tier decided_by thresholds activated_params "
    "flops prompt_tokens completion_tokens tier_tokens escalations queue_ms score_ms ttft_ms "
    "total_ms"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["one and two", "two and three", "sort 312 -> 123", "four"] * 4, 300)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> DvpaForCausalLM:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    return tiny_model(
        tiny_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **ids), seed=1
    )


def fitted(model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """A threshold map under which these prompts meet different tiers."""
    untouched = answer(model, tokenizer, PROMPTS, max_new_tokens=1)
    d = sorted(a.telemetry.difficulty for a in untouched)
    cuts = ((d[0] + d[1]) / 2, (d[2] + d[3]) / 2)
    names, costs = model.tier_map.tier_names, model.tier_map.costs
    model.tier_map = TierMap("threshold", names, costs, 2, cuts)


def test_an_answer_is_greedy_generate_at_its_tier(
    model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    fitted(model, tokenizer)
    answers = answer(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert {a.telemetry.tier for a in answers} == {0, 1, 2}
    for prompt, given in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.bos_token_id
        tiers = torch.zeros_like(ids)  # the base tier reads the prompt
        tiers[:, -1] = given.telemetry.tier  # the answer begins at the chosen one
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            tiers=tiers,
            max_new_tokens=6,
            do_sample=False,
        )
        assert given.token_ids == out[0, ids.shape[1] :].tolist()
        assert given.text == tokenizer.decode(given.token_ids, skip_special_tokens=True).strip()
        # The same decision as the model's own, inside one forward.
        decided = model(ids).tiers.tolist()
        assert decided == [given.telemetry.tier]


@pytest.mark.parametrize("tier", ["auto", "base", 2])
def test_a_streamed_answer_is_the_answer(
    tier: int | str, model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    fitted(model, tokenizer)
    for prompt in PROMPTS:
        *pieces, last = stream(model, tokenizer, prompt, tier, max_new_tokens=10)
        assert isinstance(last, Answer)
        assert all(isinstance(piece, str) and piece for piece in pieces)
        assert "".join(pieces).strip() == last.text
        (whole,) = answer(model, tokenizer, [prompt], tier, max_new_tokens=10)
        assert (whole.text, whole.token_ids) == (last.text, last.token_ids)


def test_telemetry_of_a_decided_request(
    model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    fitted(model, tokenizer)
    priced = price(model.config)
    (given,) = answer(model, tokenizer, PROMPTS[:1], max_new_tokens=5)
    record = given.telemetry
    assert [field.name for field in fields(record)] == FIELDS.split()
    assert list(record.to_dict()) == FIELDS.split()
    ids = tokenizer(PROMPTS[0])["input_ids"]
    assert record.tier_name == ["base", "middle", "top"][record.tier]
    assert record.decided_by == "tier_map"
    head = model.score(torch.tensor([ids]))
    assert record.difficulty == pytest.approx(float(head.difficulty))
    assert record.thresholds == model.tier_map.thresholds
    assert record.activated_params == priced.tiers[record.tier].activated_params
    assert record.prompt_tokens == len(ids)
    assert record.completion_tokens == len(given.token_ids) <= 5
    assert sum(record.tier_tokens) == record.tier_tokens[record.tier] == len(given.token_ids)
    # The base tier reads the prompt, the chosen tier its last token and all but the answer's last.
    reading = len(ids) * priced.tiers[0].flops_per_token + priced.head_flops_per_request
    decoding = len(given.token_ids) * priced.tiers[record.tier].flops_per_token
    assert record.flops == reading + decoding
    assert (record.escalations, record.queue_ms) == (0, 0.0)
    assert 0 < record.score_ms <= record.ttft_ms <= record.total_ms
    assert len(record.request_id) == 32
    for name, value in record.to_dict().items():
        assert PROMPTS[0] not in str(value), name


def test_an_override_is_not_scored(
    model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    fitted(model, tokenizer)
    for tier, index in [("middle", 1), (0, 0), ("2", 2)]:
        (given,) = answer(model, tokenizer, ["four"], tier, max_new_tokens=3)
        record = given.telemetry
        assert (record.tier, record.decided_by, record.difficulty) == (index, "override", None)
        passes = record.prompt_tokens + record.completion_tokens - 1
        assert record.flops == passes * price(model.config).tiers[index].flops_per_token


@pytest.mark.parametrize("broken", ["nan", "no head", "unfitted"])
def test_fallback_is_counted_and_said(
    broken: str, model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    if broken == "nan":
        fitted(model, tokenizer)
        with torch.no_grad():
            model.difficulty_head.query.weight.fill_(math.nan)
    if broken == "no head":
        model.difficulty_head = None
    before = model.policy.counters["fallback"]
    (given,) = answer(model, tokenizer, ["four"], max_new_tokens=3)
    assert given.telemetry.tier == 2
    assert given.telemetry.decided_by == "fallback"
    assert (given.telemetry.difficulty is None) == (broken != "unfitted")
    assert model.policy.counters["fallback"] == before + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [""]}, "prompt: must not be empty"),
        ({"prompts": [" \n\t "]}, "prompt: must not be empty"),
        ({"prompts": ["one " * 300]}, "prompt: .* tokens must be fewer than the context of 256"),
        ({"tier": "huge"}, r"tier: 'huge' is not a tier; known tiers: base \(0\)"),
        ({"tier": 7}, "tier: 7 is not a tier"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 must be 1 or more"),
        ({"max_new_tokens": -3}, "max_new_tokens: -3"),
    ],
)
def test_a_bad_request_is_one_clear_error(
    arguments: dict[str, Any],
    message: str,
    model: DvpaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(ValueError, match=message):
        answer(model, tokenizer, **{"prompts": ["four"], **arguments})


def test_no_prompts_no_answers(model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert answer(model, tokenizer, []) == []


def test_any_unicode_is_a_prompt(
    model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    (given,) = answer(model, tokenizer, ["\u00e4\u4e16 \U0001f600"], max_new_tokens=2)
    assert given.telemetry.prompt_tokens > 3


def test_decoding_stops_at_the_end_of_the_context(
    model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    model.config.max_position_embeddings = 12
    model.generation_config.eos_token_id = None
    (given,) = answer(model, tokenizer, ["one"], "base", max_new_tokens=50)
    assert given.telemetry.prompt_tokens + given.telemetry.completion_tokens == 12


def test_decoding_stops_at_the_end_of_an_answer(
    model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.generation_config.suppress_tokens = [
        i for i in range(len(tokenizer)) if i != tokenizer.eos_token_id
    ]
    (given,) = answer(model, tokenizer, ["one"], "base", max_new_tokens=50)
    assert given.token_ids == [tokenizer.eos_token_id]
    assert given.text == ""


def test_an_error_while_decoding_reaches_the_caller(
    model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(model, tokenizer, ["one"])


def test_sampling_options_are_passed_on(
    model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 12}
    torch.manual_seed(0)
    first = answer(model, tokenizer, ["one"], "top", **options)[0].token_ids
    torch.manual_seed(0)
    again = answer(model, tokenizer, ["one"], "top", **options)[0].token_ids
    torch.manual_seed(1)
    other = answer(model, tokenizer, ["one"], "top", **options)[0].token_ids
    assert first == again != other


def test_load(model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load(tmp_path / "nowhere")
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="the checkpoint has no tokenizer"):
        load(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load(tmp_path)
    assert not loaded.training
    expected = answer(model, tokenizer, ["one and"], "middle", max_new_tokens=4)[0]
    given = answer(loaded, loaded_tokenizer, ["one and"], "middle", max_new_tokens=4)[0]
    assert given.token_ids == expected.token_ids
    assert isinstance(given.telemetry, TelemetryRecord)


def test_special_tokens_in_a_prompt_are_text(
    model: DvpaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, safe = load(tmp_path)
    ids = encode_prompt(loaded, safe, "one </s> two")[0].tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert safe.decode(ids[1:]).strip() == "one </s> two"
