"""The escalation benchmark: replay against the engine itself, its arithmetic, its page."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import thresholds, tiny_config, tiny_model

from dvpa.engine import EscalationParams
from dvpa.pricing import price
from dvpa.tasks import GradedTasks, TaskSet, train_tokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
replay = import_module("escalation_replay")
rows = import_module("escalation_rows")
page = import_module("escalation_page")
bench = import_module("bench_escalation")

MAX_TOKENS = 6
START = replay.Start
# A random model doubts everything: bounds between which its running mean moves.
TWICE = EscalationParams(upper=0.97, lower=0.968, smoothing=0.0)


@pytest.fixture(scope="module")
def tasks() -> TaskSet:
    return GradedTasks(3, num_facts=300).sample("test", 24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("escalation")
    tokenizer = train_tokenizer(GradedTasks(3, num_facts=300).training_lines(400), 400)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    model = tiny_model(tiny_config(vocab_size=len(tokenizer), **ids), seed=1)
    scores = [run.difficulty for run in _never(model, tokenizer, folder)]
    low, high = np.quantile(scores, [0.6, 0.9])
    model.tier_map = thresholds(model, float(low), float(high))
    model.save_pretrained(folder)
    return folder


def _never(model: Any, tokenizer: Any, folder: Path) -> Any:
    model.tier_map = thresholds(model, 0.0, 1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    some = GradedTasks(3, num_facts=300).sample("test", 24)
    return replay.Replay(folder, START(), some, MAX_TOKENS).never()


@pytest.fixture(scope="module")
def replays(checkpoint: Path, tasks: TaskSet) -> dict[Any, Any]:
    starts = [START(), START(0), START(1), START(2), *(START(t, is_whole=True) for t in range(3))]
    return {start: replay.Replay(checkpoint, start, tasks, MAX_TOKENS, 16) for start in starts}


@pytest.mark.parametrize("start", [START(), START(0), START(1)], ids=["map", "base", "middle"])
@pytest.mark.parametrize("lower", [0.0, TWICE.lower])
def test_replay_is_what_the_engine_does(
    start: Any, lower: float, checkpoint: Path, tasks: TaskSet, replays: dict[Any, Any]
) -> None:
    """Texts, FLOPs and tiers of the engine left alone, at another batch size."""
    params = EscalationParams(upper=TWICE.upper, lower=lower, smoothing=TWICE.smoothing)
    one = replays[start]
    courses = one.courses(params)
    runs = one.runs(courses)
    engine = replay.open_engine(checkpoint, start, params, "base", 3)
    outputs = engine.generate([t.question for t in tasks], replay.params_of(start, MAX_TOKENS))
    for run, course, output in zip(runs, courses, outputs, strict=True):
        record = output.telemetry
        assert (run.text, run.tier, run.tier_tokens) == (
            output.text, record.tier, record.tier_tokens,
        )  # fmt: skip
        assert record.escalations == len(course)
        assert run.flops + one.overhead(run.first_tier) == record.flops
        assert run.flops_before <= run.flops
    lengths = {len(course) for course in courses}
    assert lengths >= ({0, 1} if lower == 0.0 or start.tier == 1 else {0, 1, 2})


def test_static_tiers_cost_what_they_need(
    checkpoint: Path, tasks: TaskSet, replays: dict[Any, Any]
) -> None:
    """No head and no row twice where the tier is known; a prompt read by the base tier or not."""
    engine = replays[START(0)].engine
    costs = [tier.flops_per_token for tier in price(engine.model.config).tiers]
    for tier in range(3):
        read, whole = replays[START(tier)].never(), replays[START(tier, is_whole=True)].never()
        for task, base_read, tier_read in zip(tasks, read, whole, strict=True):
            prompt = len(engine.admission.encode(task.question, replay.params_of(START(), 6)))
            answer = base_read.num_tokens
            assert base_read.flops == (prompt - 1) * costs[0] + answer * costs[tier]
            assert tier_read.flops == (prompt - 1 + tier_read.num_tokens) * costs[tier]
            assert base_read.tier_tokens[tier] == answer


def test_a_jump_goes_straight_to_the_top(replays: dict[Any, Any]) -> None:
    one = replays[START(0)]
    params = EscalationParams(upper=0.97, lower=0.0, smoothing=0.0)
    courses, climbs = one.jumps(params), one.courses(params)
    assert [c[:1] for c in courses] == [c[:1] for c in climbs]
    costs = [tier.flops_per_token for tier in price(one.engine.model.config).tiers]
    jumped = [(c, r) for c, r in zip(courses, one.runs(courses), strict=True) if c]
    assert jumped
    for course, run in jumped:
        at = course[0]
        assert course == (at, at)
        assert run.tier_tokens == (at, 0, run.num_tokens - at)
        # Up to the doubted position at the base tier, from it on at the top.
        assert run.flops == run.flops_before + (run.num_tokens - at) * costs[2]


def test_bounds_within_a_cost(
    checkpoint: Path, tasks: TaskSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best quality that is paid for, not the best of all."""
    split = rows.Split(checkpoint, tasks, MAX_TOKENS, 3)
    one = split.replays[START(0)]
    tried = [EscalationParams(upper=u, lower=0.0) for u in (0.0, 0.97, 1.0)]
    monkeypatch.setattr(rows, "grid", lambda: tried)
    costs = [rows.outcome_of(one.runs(one.courses(p))).flops.mean() for p in tried]
    assert costs[0] > costs[1] > costs[2]
    # A random model gets nothing right: let what goes up be right instead.
    real = rows.outcome_of

    def rigged(runs: Any) -> Any:
        found = real(runs)
        return rows.Outcome(found.goes_up, found.flops, found.goes_up)

    monkeypatch.setattr(rows, "outcome_of", rigged)
    for i in range(3):
        assert rows.within(split, START(0), one.courses, costs[i]) == tried[i]
    with pytest.raises(ValueError, match="no bounds"):
        rows.within(split, START(0), one.courses, costs[2] - 1)


def test_redone_pays_for_both(replays: dict[Any, Any]) -> None:
    one = replays[START(0)]
    runs = one.runs(one.courses(TWICE))
    whole = [replays[START(tier, is_whole=True)].never() for tier in range(3)]
    again = rows.redone(runs, whole)
    assert 0 < again.goes_up.sum() < len(runs)
    for i, run in enumerate(runs):
        new = whole[run.tier][i]
        assert again.goes_up[i] == (run.tier > 0)
        assert again.flops[i] == (run.flops_before + new.flops if run.tier else run.flops)
        assert again.quality[i] == (new.quality if run.tier else run.quality)


def test_random_courses_keep_the_rate(replays: dict[Any, Any]) -> None:
    one = replays[START()]
    courses = one.courses(TWICE)
    runs = one.runs(courses)
    drawn = rows.dealt(one, courses, seed=0)
    assert drawn.goes_up.sum() == pytest.approx(sum(run.tier > run.first_tier for run in runs))
    never = one.never()
    stays = np.array([run.first_tier == 2 for run in never])
    assert stays.any()
    assert not drawn.goes_up[stays].any()


def test_shortened_courses_fit_the_answer() -> None:
    assert rows.shortened((1, 4), 6) == (1, 4)
    assert rows.shortened((1, 4), 3) == (1, 2)
    assert rows.shortened((2, 4), 2) == (1,)
    assert rows.shortened((), 2) == ()


def outcome(quality: list[float], flops: float) -> Any:
    return rows.Outcome(np.array(quality), np.full(len(quality), flops), np.zeros(len(quality)))


def test_the_coin_mixes_the_best_two() -> None:
    """From the start on along the upper hull; a tier below the hull is passed over."""
    start, cheap = outcome([0.0, 0.0], 1.0), outcome([0.0, 0.1], 2.0)
    good, top = outcome([1.0, 0.0], 3.0), outcome([1.0, 0.2], 5.0)
    others = [start, cheap, good, top]
    assert rows.coin_quality(others, 1.0).tolist() == [0.0, 0.0]
    assert rows.coin_quality(others, 2.0).tolist() == [0.5, 0.0]
    assert rows.coin_quality(others, 4.0) == pytest.approx([1.0, 0.1])
    assert rows.coin_quality(others, 9.0).tolist() == [1.0, 0.2]
    worse = outcome([0.0, 0.0], 7.0)
    assert rows.coin_quality([top, worse], 6.0).tolist() == [1.0, 0.2]
    assert rows.above_coin(outcome([1.0, 1.0], 2.0), others).tolist() == [0.5, 1.0]


def test_intervals_over_requests_and_seeds() -> None:
    found = rows.difference([np.full(50, 0.1), np.full(50, 0.3)])
    assert found["mean"] == pytest.approx(0.2)
    assert found["per_seed"] == pytest.approx([0.1, 0.3])
    half = 12.706 * 0.1  # t with one degree of freedom times the standard error
    assert found["ci95_seeds"] == pytest.approx([0.2 - half, 0.2 + half], abs=1e-3)
    low, high = found["ci95_requests"]
    assert 0.15 < low < 0.2 < high < 0.25
    assert found["ci95_per_seed"][0] == pytest.approx([0.1, 0.1])
    assert "ci95_seeds" not in rows.difference([np.zeros(3)])


def test_auroc_of_a_doubt_that_knows() -> None:
    def run(quality: float, first: float, later: float) -> Any:
        seen = ((0, first), (1, later))
        return replay.Run("", quality, 1.0, 1.0, 0, 0, (2, 0), 0.5, seen)

    base = [run(1, 0.1, 0.5), run(0, 0.9, 0.1), run(0, 0.2, 0.9), run(1, 0.05, 0.1)]
    top = outcome([1, 1, 0, 1], 2.0)
    table = rows.doubt_table(base, np.array([0.1, 0.2, 0.9, 0.0]), top, np.array([1, 1, 0, 1]) > 0)
    repaired = table["all"]["base wrong, top right"]
    assert repaired == pytest.approx(
        {"share": 0.25, "first": 1.0, "mean": 2 / 3, "difficulty": 2 / 3}
    )
    assert table["kept at base"]["requests"] == 3
    assert table["kept at base"]["base wrong"]["difficulty"] == 1.0


def seed_result(number: int, shift: float) -> dict[str, Any]:
    rng = np.random.default_rng(number)

    def row(flops: float) -> dict[str, Any]:
        column = rng.random(30)
        return {
            "quality": column, "flops": flops, "goes_up": 0.1, "above_coin": column - shift,
            "escalate_minus": shift - column,
        }  # fmt: skip

    told = {"sweep": [[1.0, 0.2], [2.0, 0.3]], "sweep_jump": [[1.0, 0.1], [2.0, 0.4]]}
    label = {"share": 0.2, "first": 0.6, "mean": 0.7, "difficulty": 0.8}
    return {
        "seed": number,
        "activated_per_flop": 0.05,
        "tier_names": ("base", "top"),
        "static": [row(1e6), row(2e6)],
        "whole": [row(1e6), row(3e6)],
        "starts": {
            start: {"told": told, "rows": {name: row(1.5e6) for name in page.ROWS}}
            for start in page.STARTS
        },
        "instead_of_map": {
            name: {**row(1.2e6), "chosen": None} for name in ("map", "escalate", "jump")
        },
        "doubt": {"all": {"requests": 30, "base wrong": label}},
        "readings": {
            f"{read}, {then}": {**row(1e6), "wall_s": 1.0, "cpu_s": 2.0}
            for read in ("base", "tier")
            for then in ("never", "escalate")
        },
    }


def test_summary_and_page() -> None:
    assert set(page.STARTS) == set(bench.STARTS)
    seeds = [seed_result(5, 0.1), seed_result(6, 0.3)]
    result = {"batch": 32, "rounds": 3, **rows.summarise(seeds)}
    assert result["requests"] == 30
    escalate = result["starts"]["map"]["rows"]["escalate"]
    assert escalate["activated"] == pytest.approx(75_000)
    each = [seed["starts"]["map"]["rows"]["escalate"]["above_coin"].mean() for seed in seeds]
    assert escalate["above_coin"]["mean"] == pytest.approx(np.mean(each))
    (text, head, table), instead, doubt, readings = page.escalation_parts(result)
    assert "seeds 5, 6" in text
    assert len(table) == len(page.STARTS) * len(page.ROWS)
    assert all(len(line) == len(head) for line in table)
    assert [line[0] for line in instead[2]] == [
        "fitted tier map, never",
        "base, escalate",
        "base, jump",
    ]
    assert result["instead_of_map"]["map"]["minus_map"]["mean"] == 0.0
    assert doubt[2] == [["all", "base wrong", "20%", *(f"{v} ({v}, {v})" for v in
                         ("0.600", "0.700", "0.800"))]]  # fmt: skip
    assert [line[:2] for line in readings[2]][-1] == ["tier", "escalate"]
    expected = np.mean([
        s["readings"]["tier, never"]["quality"] - s["readings"]["base, never"]["quality"]
        for s in seeds
    ])  # fmt: skip
    assert result["readings"]["tier, never"]["minus_base"]["mean"] == pytest.approx(expected)
    assert page.escalation_png(result).startswith(b"\x89PNG")
