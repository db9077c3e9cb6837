"""Outcomes against a real model: what one teacher-forced pass says is what greedy decoding does."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from outcome_world import LINES, TASKS, sum_model, sum_tokenizer, task

from dvpa.evaluate.outcomes import OutcomeTable, collect_outcomes, collect_text_nll
from dvpa.model import DvpaForCausalLM
from dvpa.tasks.encoding import encode_prompt, encode_task, left_pad, right_pad


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return sum_tokenizer()


@pytest.fixture(scope="module")
def model() -> DvpaForCausalLM:
    """Some answers are right and some are not."""
    return sum_model()


@pytest.fixture(scope="module")
def table(model: DvpaForCausalLM, tokenizer: Any) -> OutcomeTable:
    return collect_outcomes(model, tokenizer, TASKS, batch_size=20, uncertainty=True)


def test_encoding_fixes_the_format(tokenizer: Any) -> None:
    prompt, answer = encode_task(tokenizer, "3+4=", "7")
    assert prompt == encode_prompt(tokenizer, "3+4=") and prompt[0] == tokenizer.bos_token_id
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(prompt[1:]) == "3+4=" and tokenizer.decode(answer[:-1]) == "7"
    with pytest.raises(ValueError, match="question"):
        encode_task(tokenizer, "", "7")
    with pytest.raises(ValueError, match="bos_token_id"):
        encode_task(SimpleNamespace(encode=lambda *_, **__: [1], bos_token_id=None), "a", "b")


def test_padding_goes_where_it_says() -> None:
    ids, mask = left_pad([[5], [6, 7, 8]], pad_id=3)
    assert ids.tolist() == [[3, 3, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    ids, mask = right_pad([[5], [6, 7, 8]], pad_id=3)
    assert ids.tolist() == [[5, 3, 3], [6, 7, 8]] and mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert ids.dtype == mask.dtype == np.int64
    for empty in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one"):
            left_pad(empty, pad_id=0)


def test_exact_match_is_what_greedy_generation_does(
    model: DvpaForCausalLM, tokenizer: Any, table: OutcomeTable
) -> None:
    model.eval()
    pairs = [encode_task(tokenizer, t.question, t.answer) for t in TASKS]
    ids, mask = left_pad([prompt for prompt, _ in pairs], pad_id=tokenizer.pad_token_id)
    for tier in range(table.num_tiers):
        with torch.inference_mode():
            output = model.generate(
                torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                tiers=tier,
                do_sample=False,
                max_new_tokens=6,
                pad_token_id=tokenizer.pad_token_id,
            )
        completions = output[:, ids.shape[1] :].tolist()
        right = [
            float(row[: len(answer)] == answer)
            for row, (_, answer) in zip(completions, pairs, strict=True)
        ]
        assert right == table.quality[:, tier].tolist()
    # The comparison means something only if both outcomes occur, at every tier.
    assert (table.quality.mean(axis=0) > 0.2).all() and (table.quality.mean(axis=0) < 1).all()


def test_a_prompt_read_by_the_base_tier_is_answered_as_routed_requests_are(
    model: DvpaForCausalLM, tokenizer: Any
) -> None:
    """`prompt_tier=0` scores what `generate` does over a cache that the base tier has written."""
    table = collect_outcomes(model, tokenizer, TASKS, prompt_tier=0)
    for tier in range(model.config.num_tiers):
        for row in range(0, len(TASKS), 5):
            prompt, answer = encode_task(tokenizer, TASKS[row].question, TASKS[row].answer)
            ids = torch.tensor([prompt])
            tiers = torch.zeros_like(ids)
            tiers[:, -1] = tier
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                tiers=tiers,
                do_sample=False,
                max_new_tokens=len(answer),
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )[0, len(prompt) :].tolist()
            assert (made == answer) == bool(table.quality[row, tier]), (row, tier)
    whole = collect_outcomes(model, tokenizer, TASKS)
    np.testing.assert_array_equal(table.nll[:, 0], whole.nll[:, 0])  # the base tier either way
    assert (table.nll[:, 1:] != whole.nll[:, 1:]).any()


def test_nll_matches_a_request_on_its_own(
    model: DvpaForCausalLM, tokenizer: Any, table: OutcomeTable
) -> None:
    model.eval()
    for row in (0, 25, 47):
        prompt, answer = encode_task(tokenizer, TASKS[row].question, TASKS[row].answer)
        ids = torch.tensor([prompt + answer])
        for tier in range(table.num_tiers):
            with torch.inference_mode():
                logp = model(ids, tiers=tier).logits[0].log_softmax(-1)
            steps = range(len(prompt), ids.shape[1])
            expected = -sum(float(logp[at - 1, ids[0, at]]) for at in steps) / len(answer)
            assert table.nll[row, tier] == pytest.approx(expected, abs=1e-4)
        assert len(set(table.nll[row])) == table.num_tiers  # each tier really ran
        assert table.prompt_tokens[row] == len(prompt)
        assert table.completion_tokens[row].tolist() == [len(answer)] * 3


def test_difficulty_reads_the_prompt_only(
    model: DvpaForCausalLM, tokenizer: Any, table: OutcomeTable
) -> None:
    other = [task(t.question, "12345678", t.level) for t in TASKS]
    changed = collect_outcomes(model, tokenizer, other, batch_size=7)
    np.testing.assert_allclose(changed.difficulty, table.difficulty, atol=1e-5)
    assert (
        np.ptp(table.difficulty) > 0 and ((table.difficulty >= 0) & (table.difficulty <= 1)).all()
    )
    with torch.inference_mode():
        alone = model.score(torch.tensor([encode_prompt(tokenizer, TASKS[40].question)]))
    assert table.difficulty[40] == pytest.approx(float(alone.difficulty), abs=1e-5)


def test_base_uncertainty_is_the_nll_of_the_models_own_answer(
    model: DvpaForCausalLM, tokenizer: Any, table: OutcomeTable
) -> None:
    model.eval()
    right = table.quality[:, 0] == 1
    np.testing.assert_array_equal(table.uncertainty[right], table.nll[right, 0])
    eos = tokenizer.eos_token_id
    checked = 0
    for row in np.flatnonzero(~right)[:4]:
        ids = encode_prompt(tokenizer, TASKS[row].question)
        total, count = 0.0, 0
        limit = int(table.completion_tokens.max()) + 2
        while count < limit and (count == 0 or ids[-1] != eos):
            with torch.inference_mode():
                logp = model(torch.tensor([ids]), tiers=0).logits[0, -1].log_softmax(-1)
            total, count = total - float(logp.max()), count + 1
            ids.append(int(logp.argmax()))
        assert table.uncertainty[row] == pytest.approx(total / count, abs=1e-4)
        checked += 1
    assert checked > 0


def test_without_a_head_the_difficulty_is_nan_and_the_mode_is_kept(
    model: DvpaForCausalLM, tokenizer: Any
) -> None:
    head, model.difficulty_head = model.difficulty_head, None
    try:
        model.train()
        calls: list[tuple[int, int]] = []
        table = collect_outcomes(
            model, tokenizer, TASKS[:5], batch_size=2, progress=lambda *at: calls.append(at)
        )
        assert model.training
    finally:
        model.difficulty_head = head
    assert np.isnan(table.difficulty).all() and np.isnan(table.uncertainty).all()
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_bad_input_is_refused(model: DvpaForCausalLM, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="at least one task"):
        collect_outcomes(model, tokenizer, [])
    with pytest.raises(ValueError, match="batch_size"):
        collect_outcomes(model, tokenizer, TASKS, batch_size=0)
    with pytest.raises(ValueError, match="max_position_embeddings 256"):
        collect_outcomes(model, tokenizer, [task("1" * 300, "2")])
    with pytest.raises(ValueError, match="prompt_fraction"):
        collect_text_nll(model, tokenizer, ["some text"], prompt_fraction=1.0)


def test_text_quality_is_relative_to_the_top_tier(model: DvpaForCausalLM, tokenizer: Any) -> None:
    table = collect_text_nll(model, tokenizer, LINES[:9], batch_size=4)
    assert (table.quality[:, -1] == 1).all()
    for row in range(len(table)):
        for tier in range(table.num_tiers):
            loss = max(table.nll[row, tier] - table.nll[row, -1], 0.0)
            assert table.quality[row, tier] == pytest.approx(math.exp(-loss))
    ids = [tokenizer.bos_token_id, *tokenizer.encode(LINES[3], add_special_tokens=False)]
    assert table.prompt_tokens[3] + table.completion_tokens[3, 0] == len(ids)


def test_jsonl_round_trip_and_errors(table: OutcomeTable, tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    holed = dataclasses.replace(table, difficulty=np.where(table.level == 1, np.nan, 0.25))
    holed.save_jsonl(path)
    loaded = OutcomeTable.load_jsonl(path)
    for field in dataclasses.fields(OutcomeTable):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(holed, field.name))
    assert [entry.name for entry in tmp_path.iterdir()] == ["outcomes.jsonl"]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5]]))
    with pytest.raises(ValueError, match=r"outcomes.jsonl:2: not valid JSON"):
        OutcomeTable.load_jsonl(path)
    path.write_text(lines[0].replace('"level"', '"lvl"'))
    with pytest.raises(ValueError, match=r":1: a row must have exactly the fields"):
        OutcomeTable.load_jsonl(path)


def test_split_is_disjoint_and_seeded(table: OutcomeTable) -> None:
    parts = table.split(seed=3, fractions=(0.5, 0.25, 0.25))
    assert [len(part) for part in parts] == [24, 12, 12]
    assert sorted(key for part in parts for key in part.ids) == sorted(table.ids)
    again = table.split(seed=3, fractions=(0.5, 0.25, 0.25))
    assert [part.ids for part in parts] == [part.ids for part in again]
    assert parts[0].ids != table.split(seed=4, fractions=(0.5,))[0].ids
    row = table.ids.index(parts[1].ids[0])
    np.testing.assert_array_equal(parts[1].quality[0], table.quality[row])
    with pytest.raises(ValueError, match="fractions"):
        table.split(seed=0, fractions=(0.8, 0.4))


def test_a_table_checks_its_shapes(table: OutcomeTable) -> None:
    with pytest.raises(ValueError, match="nll must have shape"):
        dataclasses.replace(table, nll=table.nll[:, :2])
    with pytest.raises(ValueError, match="quality must lie"):
        dataclasses.replace(table, quality=table.quality + 0.5)
