"""Outcomes through the engine: against teacher forcing, verifiers, resuming, Parquet."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_model
from outcome_world import TASKS, sum_model, sum_tokenizer, task

from dvpa.engine import Engine, SamplingParams
from dvpa.evaluate.engine_outcomes import CHUNK, checkpoint_id, constant_map, run_outcomes
from dvpa.evaluate.outcomes import collect_outcomes
from dvpa.evaluate.parquet import has_pyarrow, load_parquet, save_parquet
from dvpa.evaluate.table import OutcomeTable
from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price
from dvpa.tiers.tier_map import TierMap

NAMES = ("base", "middle", "top")
MANY = [task(f"{a}+{b}=", str(a + b)) for a in range(30) for b in range(5)]  # three chunks
TIMED = {"ms"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return sum_tokenizer()


@pytest.fixture(scope="module")
def model() -> DvpaForCausalLM:
    return sum_model()


def engine_of(model: DvpaForCausalLM, tokenizer: Any, **settings: Any) -> Engine:
    return Engine(
        model.eval(), tokenizer, **{"prefix_caching": False, "max_num_seqs": 16, **settings}
    )


@pytest.fixture(scope="module")
def engine(model: DvpaForCausalLM, tokenizer: Any) -> Engine:
    return engine_of(model, tokenizer)


@pytest.fixture(scope="module")
def table(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> OutcomeTable:
    return run_outcomes(engine, TASKS, tmp_path_factory.mktemp("run") / "outcomes.jsonl").table


def same(one: OutcomeTable, other: OutcomeTable, without: set[str] = TIMED) -> None:
    for field in fields(OutcomeTable):
        if field.name not in without:
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_it_agrees_with_teacher_forcing(
    model: DvpaForCausalLM,
    tokenizer: Any,
    table: OutcomeTable,
) -> None:
    """Greedy answers equal the reference where every reference token is the likeliest."""
    model.eval()
    fast = collect_outcomes(model, tokenizer, TASKS, uncertainty=True)
    assert table.ids == fast.ids and table.kind == fast.kind
    np.testing.assert_array_equal(table.level, fast.level)
    np.testing.assert_array_equal(table.prompt_tokens, fast.prompt_tokens)
    np.testing.assert_allclose(table.nll, fast.nll, atol=1e-4)
    np.testing.assert_allclose(table.difficulty, fast.difficulty, atol=1e-5)
    # A sum is compared as text here, whatever its tokens are.
    assert (table.quality >= fast.quality).all()
    assert (table.quality == fast.quality).mean() > 0.95
    right = fast.quality[:, 0] == 1
    np.testing.assert_allclose(table.uncertainty[right], fast.uncertainty[right], atol=1e-4)


def test_prompts_read_by_base_agree_with_teacher_forcing(
    model: DvpaForCausalLM,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    engine = engine_of(model, tokenizer, read_prompt="base")
    found = run_outcomes(engine, TASKS, tmp_path / "o.jsonl", with_nll=False).table
    fast = collect_outcomes(model, tokenizer, TASKS, prompt_tier=0)
    assert (found.quality >= fast.quality).all()
    assert (found.quality == fast.quality).mean() > 0.95
    assert np.isnan(found.nll).all()
    activated = [tier.activated_params for tier in price(model.config).tiers]
    read, answered = found.prompt_tokens[0] - 1, found.completion_tokens[0, 2]
    expected = (read * activated[0] + answered * activated[2]) / (read + answered)
    assert found.activated_params[0, 2] == pytest.approx(expected)


def test_costs_are_those_of_a_routed_request(engine: Engine, table: OutcomeTable) -> None:
    priced = price(engine.model.config)
    for tier in range(3):
        engine.set_tier_map(constant_map(engine.policy.tier_map, tier))
        params = SamplingParams(temperature=0, max_tokens=16)
        (output,) = engine.generate([TASKS[5].question], params)
        record = output.telemetry
        assert (record.tier, record.decided_by) == (tier, "tier_map")
        assert table.flops[5, tier] == record.flops
        assert table.completion_tokens[5, tier] == record.completion_tokens
        assert table.activated_params[5, tier] == priced.tiers[tier].activated_params
        # Scoring costs, and everything else is the tier's price.
        assert table.flops[5, tier] > priced.tiers[tier].flops_per_token * table.tokens[5, tier]
    assert (table.ms > 0).all()


def test_the_engine_keeps_its_tier_map(engine: Engine, tmp_path: Path) -> None:
    before = engine.policy.tier_map
    run_outcomes(engine, TASKS[:3], tmp_path / "o.jsonl", with_nll=False)
    assert engine.policy.tier_map is before
    with pytest.raises(ValueError, match="holds a run with other"):
        run_outcomes(engine, TASKS[:2], tmp_path / "o.jsonl", with_nll=False)
    assert engine.policy.tier_map is before


def test_verifiers_judge_and_not_tokens(engine: Engine, tmp_path: Path) -> None:
    """The same answers, compared as numbers: 3.0 is 3."""
    numeric = [replace(t, answer=f"{t.answer}.0", numeric=True) for t in TASKS]
    as_text = [replace(t, answer=f"{t.answer}.0") for t in TASKS]
    options: dict[str, Any] = {"with_nll": False, "max_tokens": 6}
    found = run_outcomes(engine, numeric, tmp_path / "numeric.jsonl", **options).table
    plain = run_outcomes(engine, TASKS, tmp_path / "plain.jsonl", **options).table
    failed = run_outcomes(engine, as_text, tmp_path / "text.jsonl", **options).table
    assert (found.quality >= plain.quality).all() and plain.quality.sum() > 10
    assert failed.quality.sum() == 0


def test_text_is_scored_by_nll_and_its_difficulty_by_the_question(
    engine: Engine,
    model: DvpaForCausalLM,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    texts = [replace(t, by_nll=True) for t in TASKS[:9]]
    found = run_outcomes(engine, [*texts, *TASKS[9:12]], tmp_path / "o.jsonl").table
    fast = collect_outcomes(model, tokenizer, TASKS[:12])
    np.testing.assert_allclose(found.difficulty, fast.difficulty, atol=1e-5)
    excess = np.maximum(found.nll - found.nll[:, -1:], 0)[:9]
    np.testing.assert_allclose(found.quality[:9], np.exp(-excess))
    assert set(found.quality[9:].ravel()) <= {0.0, 1.0}
    assert np.isfinite(found.flops).all() and np.isfinite(found.ms).all()
    tops = price(model.config).tiers[-1].flops_per_token * found.tokens[:9, -1]
    assert (found.flops[:9, -1] > tops).all()
    base = engine_of(model, tokenizer, read_prompt="base")
    with pytest.raises(ValueError, match="read_prompt"):
        run_outcomes(base, texts, tmp_path / "base.jsonl")


def test_a_killed_run_goes_on_and_ends_the_same(
    model: DvpaForCausalLM,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    path, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    unbroken = run_outcomes(engine_of(model, tokenizer), MANY, whole, with_nll=False)
    calls: list[tuple[int, int]] = []

    def kill(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_outcomes(engine_of(model, tokenizer), MANY, path, with_nll=False, progress=kill)
    assert calls == [(CHUNK, len(MANY)), (2 * CHUNK, len(MANY))]
    with path.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(whole.read_bytes().splitlines(keepends=True)[2 * CHUNK])
        file.write(b'{"id": "torn')
    resumed = run_outcomes(engine_of(model, tokenizer), MANY, path, with_nll=False)
    assert resumed.num_resumed == 2 * CHUNK
    same(resumed.table, unbroken.table)
    again = run_outcomes(engine_of(model, tokenizer), MANY, path, with_nll=False)
    assert again.num_resumed == len(MANY)
    same(again.table, resumed.table, set())


def test_another_run_in_the_same_file_is_refused(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    run_outcomes(engine, TASKS[:3], path, model_id="a", with_nll=False)
    for changed, match in (
        ({"model_id": "b"}, "model"),
        ({"model_id": "a", "max_tokens": 3}, "max_tokens"),
        ({"model_id": "a", "with_nll": True}, "with_nll"),
    ):
        with pytest.raises(ValueError, match=f"other {match}"):
            run_outcomes(engine, TASKS[:3], path, **{"with_nll": False, **changed})
    with pytest.raises(ValueError, match="other num_requests, tasks"):
        run_outcomes(engine, TASKS[:4], path, model_id="a", with_nll=False)
    other_answer = [*TASKS[:2], replace(TASKS[2], answer="no")]
    with pytest.raises(ValueError, match="other tasks"):
        run_outcomes(engine, other_answer, path, model_id="a", with_nll=False)


def test_bad_input_is_refused(
    engine: Engine,
    model: DvpaForCausalLM,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    path = tmp_path / "o.jsonl"
    with pytest.raises(ValueError, match="at least one"):
        run_outcomes(engine, [], path)
    with pytest.raises(ValueError, match="comes twice"):
        run_outcomes(engine, [TASKS[0], TASKS[0]], path)
    with pytest.raises(ValueError, match="prefix_caching"):
        run_outcomes(engine_of(model, tokenizer, prefix_caching=True), TASKS, path)
    with pytest.raises(ValueError, match="none of 1 fits"):
        run_outcomes(engine, [task("1" * 300, "2")], path)
    assert not path.exists()


def test_too_long_tasks_are_left_out_and_counted(engine: Engine, tmp_path: Path) -> None:
    tasks = [TASKS[0], task("1" * 300, "2"), TASKS[1]]
    found = run_outcomes(engine, tasks, tmp_path / "o.jsonl", with_nll=False)
    assert (found.num_too_long, found.table.ids) == (1, [TASKS[0].id, TASKS[1].id])


def test_a_constant_map_sends_everything_to_its_tier() -> None:
    names = TierMap.untrained(NAMES, (1.0, 2.0, 3.0))
    for tier in range(3):
        found = constant_map(names, tier)
        assert found.is_fitted
        assert set(found.tiers([0.0, 0.5, 1.0])) == {tier} == {found.default_tier}


def test_checkpoints_are_told_apart(tmp_path: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        tiny_model(seed=seed).save_pretrained(tmp_path)
        found.append(checkpoint_id(tmp_path))
    assert found[0] == found[1] != found[2]


def test_a_missing_tier_is_named(table: OutcomeTable, tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    table.save_jsonl(path)
    lines = path.read_text().splitlines()
    record = json.loads(lines[2])
    for name in ("quality", "flops"):
        short = {**record, name: record[name][:-1]}
        path.write_text("\n".join([*lines[:2], json.dumps(short), *lines[3:]]) + "\n")
        with pytest.raises(ValueError, match=rf":3: {name} has 2 tiers, not 3: a tier is missing"):
            OutcomeTable.load(path)
    path.write_text("\n".join([*lines, lines[4]]) + "\n")
    with pytest.raises(ValueError, match="stands in line 5 too"):
        OutcomeTable.load(path)


def test_tables_from_before_the_costs_still_load(table: OutcomeTable, tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    table.save_jsonl(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for name in ("activated_params", "flops", "ms"):
            del row[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = OutcomeTable.load(path)
    assert np.isnan(loaded.flops).all() and loaded.flops.shape == (len(table), 3)
    same(loaded, table, {"activated_params", "flops", "ms"})


@pytest.mark.skipif(not has_pyarrow(), reason="pyarrow is not installed: dvpa[parquet]")
def test_parquet_holds_a_row_per_request_and_tier(table: OutcomeTable, tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    path = tmp_path / "o.parquet"
    save_parquet(table, path, NAMES)
    same(OutcomeTable.load(path), table, set())
    rows = parquet.read_table(path)
    assert rows.num_rows == 3 * len(table)
    assert rows.column("tier_name").to_pylist()[:4] == [*NAMES, "base"]
    kept = rows.take([i for i in range(rows.num_rows) if i != 4])
    parquet.write_table(kept, path)
    with pytest.raises(ValueError, match="tier 1 is missing"):
        load_parquet(path)
    parquet.write_table(rows.drop_columns(["nll"]), path)
    with pytest.raises(ValueError, match="no column nll"):
        load_parquet(path)
    path.write_text("no parquet")
    with pytest.raises(ValueError, match=r"o\.parquet"):
        load_parquet(path)
