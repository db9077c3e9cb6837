"""Requests that end early, refused, late or cancelled: the others get the same tokens."""

from typing import Any

import pytest
from engine_oracle import Arrival, Between, Oracle, greedy, make_engine, oracle, serve

from dvpa.engine import Piece, QueueFull


@pytest.fixture(scope="module")
def known() -> Oracle:
    return oracle(seed=3)


# -- too much at once -----------------------------------------------------------------------------


def test_a_full_queue_refuses_and_load_lowers_tiers_first(known: Oracle) -> None:
    hard = next(i for i in range(20) if known.tier_of(i) == 2)

    def tiers(config: dict[str, Any], **params: Any) -> list[tuple[int, str]]:
        engine = make_engine(known.model, max_num_seqs=1, max_queue=4, degrade_from=0.25, **config)
        arrivals = [Arrival(known.prompts[hard], greedy(max_tokens=1, **params)) for _ in range(4)]
        serve(engine, arrivals)
        records = [arrival.last().telemetry for arrival in arrivals]
        return [(record.tier, record.decided_by) for record in records if record is not None]

    falling = [(0, "load"), (1, "load"), (2, "tier_map"), (2, "tier_map")]
    assert tiers({}) == falling
    assert tiers({"allow_degradation": False}) == [(2, "tier_map")] * 4
    assert tiers({}, allow_degradation=False) == [(2, "tier_map")] * 4
    assert tiers({}, min_tier=1) == [(1, "cap"), *falling[1:]]
    assert tiers({}, tier=2) == [(2, "override")] * 4

    engine = make_engine(known.model, max_num_seqs=1, max_queue=4)
    for _ in range(4):
        engine.add([5], greedy())
    with pytest.raises(QueueFull, match="queue: 4 of 4 places are taken"):
        engine.add([5], greedy())
    engine.step()
    with pytest.raises(QueueFull, match="queue: 3 of 4"):
        engine.add([5], greedy(n=2))
    engine.add([5], greedy())
    with pytest.raises(ValueError, match="n: 5 must be at most max_queue = 4"):
        engine.add([5], greedy(n=5))
    assert engine.num_waiting == 4


def test_deadlines_end_running_and_waiting_requests(
    known: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("dvpa.engine.engine.time.monotonic", lambda: now[0])
    engine = make_engine(known.model, max_num_seqs=1)
    running = Arrival(known.prompts[2], greedy(tier=1, timeout_s=5.0))
    waiting = Arrival(known.prompts[3], greedy(tier=1, timeout_s=4.0, n=2))
    for arrival in (running, waiting):
        engine.add(arrival.prompt, arrival.params, listener=arrival.pieces.append)
    for now[0] in (101.0, 102.0, 104.0):
        engine.step()
    assert [waiting.last(i).finish_reason for i in range(2)] == ["timeout"] * 2
    assert waiting.last().error == "the deadline has passed"
    for now[0] in (104.5, 105.0, 106.0):
        engine.step()
    assert running.last().finish_reason == "timeout"
    known.check(2, 1, running.tokens())
    assert len(running.tokens()) == 4
    record = running.last().telemetry
    assert record is not None and record.completion_tokens == 4 and record.total_ms == 5000
    assert engine.pages.num_held == 0 and not engine.has_work


# -- cancelling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["waiting", "running", "in flight"])
@pytest.mark.parametrize("n", [1, 3])
def test_cancelling(known: Oracle, when: str, n: int) -> None:
    engine = make_engine(known.model, 40, page_size=4, max_num_seqs=2)
    others = [Arrival(known.prompts[i], greedy(tier=i % 3)) for i in (0, 1)]
    bad = Arrival(known.prompts[7], greedy(n=n, session_id="own"))
    arrivals = [*others, bad] if when == "waiting" else [bad, *others]
    for arrival in arrivals:
        arrival.request_id = engine.add(
            arrival.prompt, arrival.params, listener=arrival.pieces.append
        )
    cancelled = []
    if when == "in flight":

        def act(step: int) -> None:
            if step == 4:
                cancelled.append(engine.cancel(bad.request_id))
                assert engine.pages.num_held > 0, "its pages are in use until the step is over"

        Between(engine, act)
    for _ in range(4):
        engine.step()
    if when != "in flight":
        cancelled.append(engine.cancel(bad.request_id))
    assert cancelled == [True]
    assert engine.cancel(bad.request_id) is False and engine.cancel("nobody") is False
    held = {page for request in engine.scheduler.running for page in request.pages}
    assert engine.pages.num_held == len(held)
    assert [bad.last(i).finish_reason for i in range(n)] == ["cancelled"] * n
    while engine.has_work:
        engine.step()
    for i, other in enumerate(others):
        known.check(i, i % 3, other.tokens())
        assert other.last().finish_reason == "length"
    assert engine.pages.num_held == 0


def test_an_interrupted_generate_leaves_nothing_behind(known: Oracle) -> None:
    engine = make_engine(known.model)

    def act(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    Between(engine, act)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(known.prompts, greedy(tier=2))
    assert not engine.has_work and engine.pages.num_held == 0
    outputs = engine.generate(known.prompts, greedy(tier=2))
    for i, output in enumerate(outputs):
        known.check(i, 2, output.token_ids)


def test_a_listener_may_cancel(known: Oracle) -> None:
    engine = make_engine(known.model)
    first = Arrival(known.prompts[2], greedy(tier=1, n=2))
    second, other = Arrival([9], greedy()), Arrival(known.prompts[0], greedy(tier=0))

    def listener(piece: Piece) -> None:
        first.pieces.append(piece)
        if piece.finish_reason is None:
            engine.cancel(piece.request_id)
            engine.cancel(second.request_id)

    engine.add(first.prompt, first.params, listener=listener)
    for arrival in (second, other):
        arrival.request_id = engine.add(
            arrival.prompt, arrival.params, listener=arrival.pieces.append
        )
    while engine.has_work:
        engine.step()
    assert [first.last(i).finish_reason for i in range(2)] == ["cancelled"] * 2
    assert second.last().finish_reason == "cancelled" and first.tokens() == known.answer(2, 1)[:1]
    known.check(0, 0, other.tokens())
    assert engine.pages.num_held == 0
