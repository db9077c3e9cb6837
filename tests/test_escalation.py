"""Escalation while decoding: the statistic, and what it does to a running request."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_oracle import (
    NUM_NEW,
    Arrival,
    greedy,
    logits_of,
    make_engine,
    oracle,
    preempt_at_random,
    serve,
)
from hypothesis import given
from hypothesis import strategies as st

from dvpa.engine import Engine, EscalationParams, SamplingParams, SpeculateParams
from dvpa.engine.escalation import Doubt
from dvpa.engine.request import Segment
from dvpa.engine.runner import StepResult
from dvpa.pricing import price

EAGER = EscalationParams(upper=0.75, lower=0.6, smoothing=0.3)

uncertainties = st.lists(st.floats(0, 1), max_size=40)
shares = st.floats(0, 1)


@given(uncertainties, shares, shares, st.floats(0, 0.95), st.integers(0, 2))
def test_the_statistic_is_a_running_mean_with_hysteresis(
    values: list[float], one: float, other: float, smoothing: float, max_times: int
) -> None:
    lower, upper = sorted((one, other))
    doubt = Doubt(
        EscalationParams(lower=lower, upper=upper, smoothing=smoothing, max_times=max_times)
    )
    mean, is_armed, times = None, True, 0
    for value in values:
        present = value if mean is None else smoothing * mean + (1 - smoothing) * value
        expected = present > upper and is_armed and times < max_times
        assert doubt.is_too_much(value) == expected
        if expected:  # the token is to be judged again: it does not count
            is_armed, times = False, times + 1
        else:
            mean, is_armed = present, is_armed or present < lower
    assert doubt.num_escalations == times <= max_times


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("lower, upper: 0.8, 0.7", {"lower": 0.8}),
        ("lower, upper: -0.1, 0.7", {"lower": -0.1}),
        ("lower, upper: 0.4, 1.1", {"upper": 1.1}),
        ("lower, upper: nan, 0.7", {"lower": float("nan")}),
        ("smoothing: 1.0", {"smoothing": 1.0}),
        ("max_times: 3", {"max_times": 3}),
        ("max_times: -1", {"max_times": -1}),
        ("step: 'top'", {"step": "top"}),
    ],
)
def test_bad_bounds_are_named(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        EscalationParams(**values)


def expected_answer(
    prompt: list[int],
    tier: int,
    params: EscalationParams,
    highest: int = 2,
    reads: int | None = None,
) -> tuple[list[int], list[int]]:
    """Tokens, and the tier of each, by plain forward passes over what the cache should hold."""
    model, doubt, ids = oracle().model, Doubt(params), list(prompt)
    tiers = [tier if reads is None else reads] * (len(prompt) - 1) + [tier]
    while len(ids) < len(prompt) + NUM_NEW:
        logits_V = logits_of(model, ids, tiers)[-1]
        if tiers[-1] < highest and doubt.is_too_much(1 - float(logits_V.softmax(-1).max())):
            tiers[-1] = highest if params.step == "highest" else tiers[-1] + 1
            continue
        ids.append(int(logits_V.argmax()))
        tiers.append(tiers[-1])
    return ids[len(prompt) :], tiers[len(prompt) - 1 : -1]


@pytest.mark.parametrize(
    ("num_pages", "read_prompt", "step"),
    [
        (None, "tier", "next"),
        (None, "base", "highest"),
        (56, "tier", "highest"),
        (56, "base", "next"),
    ],
)
def test_escalated_requests_continue_over_the_rows_they_have(
    num_pages: int | None, read_prompt: str, step: str
) -> None:
    known, bounds = oracle(), replace(EAGER, step=step)
    engine = make_engine(
        known.model, num_pages, page_size=1, escalation=bounds, read_prompt=read_prompt
    )
    preempt_at_random(engine, 0.0 if num_pages is None else 0.2)
    arrivals = [Arrival(prompt, greedy(), at=i // 3) for i, prompt in enumerate(known.prompts)]
    serve(engine, arrivals)
    times = []
    for i, arrival in enumerate(arrivals):
        first = known.tier_of(i)
        reads = 0 if read_prompt == "base" else None
        tokens, tiers = expected_answer(known.prompts[i], first, bounds, reads=reads)
        assert arrival.tokens() == tokens
        record = arrival.last().telemetry
        assert record is not None
        assert record.tier_tokens == tuple(tiers.count(tier) for tier in range(3))
        assert tiers == sorted(tiers) and record.tier == tiers[-1]
        jumps = tiers[-1] - first if step == "next" else int(tiers[-1] > first)
        assert record.escalations == jumps <= 2
        assert record.decided_by == ("escalation" if record.escalations else "tier_map")
        times.append(record.escalations)
    assert set(times) == ({0, 1, 2} if step == "next" else {0, 1})
    assert engine.progress.num_escalations == sum(times)
    assert (engine.scheduler.num_preemptions > 0) == (num_pages is not None)


class CacheWatch:
    """Sees in every step of one request which rows of the cache change, bit for bit."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._run = engine, engine.runner.run
        self._before = self.rows([], 0)
        self.redone: list[int] = []
        self.changed: list[int] = []
        engine.runner.run = self.run  # type: ignore[method-assign]

    def rows(self, pages: list[int], end: int) -> torch.Tensor:
        layers = self._engine.runner.cache.layers
        return torch.stack([layer[pages].flatten(0, 1)[:end].clone() for layer in layers])

    def run(self, segments: list[Segment]) -> StepResult:
        [segment] = segments
        result = self._run(segments)
        now = self.rows(segment.request.pages, segment.end)
        for i, (row, before) in enumerate(zip(now[-1], self._before[-1], strict=False)):
            if not torch.equal(row, before):
                (self.redone if i == segment.start else self.changed).append(i)
        self._before = now
        return result


def test_the_cache_is_kept_and_one_row_is_redone() -> None:
    known = oracle()
    cost = price(known.model.config)
    per_token = [tier.flops_per_token for tier in cost.tiers]
    escalated = 0
    for i in range(20):
        if known.tier_of(i) or len(known.prompts[i]) == 1:
            continue
        engine = make_engine(known.model, escalation=EAGER, read_prompt="base")
        watch = CacheWatch(engine)
        [output] = engine.generate([known.prompts[i]], greedy())
        record, size = output.telemetry, len(known.prompts[i])
        assert output.finish_reason == "length" and watch.changed == []
        assert len(watch.redone) == record.escalations
        # The row in doubt was paid for at the lower tier, too.
        tiers = expected_answer(known.prompts[i], 0, EAGER, reads=0)[1]
        lower = sum(per_token[tier] for tier in range(tiers[-1]))
        rows = (size - 1) * per_token[0] + sum(per_token[tier] for tier in tiers) + lower
        assert record.flops == rows + cost.head_flops_per_request
        escalated += record.escalations
    assert escalated > 2


@pytest.mark.parametrize(
    "params",
    [
        {"tier": 0},
        {"allow_escalation": False, "max_tokens": NUM_NEW},
        {"speculate": SpeculateParams(length=2)},
    ],
    ids=str,
)
def test_who_never_escalates(params: dict[str, Any]) -> None:
    known = oracle()
    always = EscalationParams(upper=0.0, lower=0.0)
    engine = make_engine(known.model, escalation=always)
    for i, output in enumerate(engine.generate(known.prompts, greedy(**params))):
        known.check(i, params.get("tier", known.tier_of(i)), output.token_ids)
        assert output.telemetry.escalations == 0
    assert engine.progress.num_escalations == 0


def test_a_cap_is_a_promise_and_a_capped_request_may_go_up_to_it() -> None:
    known = oracle()
    engine = make_engine(known.model, escalation=EAGER)
    for cap in (0, 1):
        outputs = engine.generate(known.prompts[:10], greedy(max_tier=cap))
        for i, output in enumerate(outputs):
            first = min(known.tier_of(i), cap)
            tokens, tiers = expected_answer(known.prompts[i], first, EAGER, highest=cap)
            assert list(output.token_ids) == tokens
            assert output.telemetry.tier == tiers[-1] <= cap
    assert engine.progress.num_escalations > 0


def test_at_most_max_times() -> None:
    known = oracle()
    for max_times in (0, 1):
        bounds = EscalationParams(upper=0.75, lower=0.75, smoothing=0.0, max_times=max_times)
        engine = make_engine(known.model, escalation=bounds)
        outputs = engine.generate(known.prompts, greedy())
        assert max(output.telemetry.escalations for output in outputs) == max_times


def test_each_completion_is_judged_by_itself() -> None:
    known = oracle()
    engine = make_engine(known.model, escalation=EAGER, page_size=4)
    prompts = [known.prompts[i] for i in range(20) if known.tier_of(i) == 0]
    params = SamplingParams(n=3, seed=3, max_tokens=8, temperature=1.2)
    differ = 0
    for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True):
        single = [replace(params, n=1, seed=3 + index) for index in range(3)]
        alone = make_engine(known.model, escalation=EAGER).generate([prompt] * 3, single)
        for choice, by_itself in zip(output.choices, alone, strict=True):
            assert choice.token_ids == by_itself.token_ids
            assert choice.telemetry.tier_tokens == by_itself.telemetry.tier_tokens
        differ += len({choice.telemetry.tier_tokens for choice in output.choices}) > 1
    assert differ > 0
