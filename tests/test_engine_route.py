"""Decisions without generation, the quality dial, and a tier map replaced while running."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from engine_oracle import greedy, make_engine, oracle

from dvpa.engine import Engine, Piece, SamplingParams
from dvpa.tiers import TierMap

PROMPT = [5, 9, 14, 3, 8, 20, 31]


@pytest.fixture(params=["tier", "base"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = make_engine(oracle().model, 80, page_size=4, max_num_seqs=6, read_prompt=request.param)
    tier_map = engine.policy.tier_map
    yield engine
    engine.set_tier_map(tier_map)  # the model is shared with other tests
    engine.close()


def route(engine: Engine, params: SamplingParams | None = None) -> Piece:
    async def main() -> list[Piece]:
        return [piece async for piece in engine.stream(PROMPT, params, only_routes=True)]

    [piece] = asyncio.run(main())
    return piece


def calibrated(engine: Engine, *cuts: float) -> TierMap:
    """A map by cuts whose success falls from 1 to .2, .5, .8 with the difficulty."""
    curves = tuple(((0.0, 1.0), (1.0, low)) for low in (0.2, 0.5, 0.8))
    known = engine.policy.tier_map
    return TierMap("threshold", known.tier_names, known.costs, 2, cuts, calibration=curves)


def test_a_route_is_the_decision_that_generation_would_get(engine: Engine) -> None:
    piece = route(engine, greedy())
    assert (piece.finish_reason, piece.token_ids, piece.text) == ("stop", (), "")
    [output] = engine.generate([PROMPT], greedy())
    asked, had = piece.telemetry, output.telemetry
    assert asked is not None
    for name in ("tier", "difficulty", "decided_by", "thresholds", "success_by_tier"):
        assert getattr(asked, name) == getattr(had, name), name
    assert 0 < asked.flops < had.flops
    assert asked.completion_tokens == 0
    assert engine.pages.num_held == 0
    assert not engine.has_work


def test_a_named_tier_is_answered_without_a_step(engine: Engine) -> None:
    piece = route(engine, greedy(tier="top", n=3))
    assert piece.telemetry is not None
    assert (piece.telemetry.tier, piece.telemetry.decided_by) == (2, "override")
    assert engine.num_steps == 0


def test_asking_leaves_the_session_as_it_was(engine: Engine) -> None:
    engine.set_tier_map(calibrated(engine, 0.0, 0.0))  # always top
    assert route(engine, greedy(session_id="a")).telemetry.tier == 2  # type: ignore[union-attr]
    engine.set_tier_map(calibrated(engine, 1.0, 1.0))  # always base
    [output] = engine.generate([PROMPT], greedy(session_id="a"))
    assert output.telemetry.tier == 0


def test_quality_is_a_dial(engine: Engine) -> None:
    engine.set_tier_map(calibrated(engine, 1.0, 1.0))
    tiers = []
    for quality in (0.0, 0.5, 0.9, 1.0):
        record = route(engine, greedy(quality=quality)).telemetry
        assert record is not None
        good = [p >= quality * record.success_by_tier[-1] for p in record.success_by_tier]
        assert record.tier == good.index(True)
        tiers.append(record.tier)
    assert tiers == sorted(tiers)
    assert (tiers[0], tiers[-1]) == (0, 2)


def test_quality_without_calibration_is_refused(engine: Engine) -> None:
    engine.set_tier_map(replace(calibrated(engine, 0.2, 0.3), calibration=()))
    with pytest.raises(ValueError, match="quality"):
        engine.add(PROMPT, greedy(quality=0.5))
    assert not engine.has_work
    engine.cancel(engine.add(PROMPT, greedy(quality=0.5, tier="base")))  # it names a tier anyway


def test_another_models_tier_map_is_refused(engine: Engine) -> None:
    known = engine.policy.tier_map
    with pytest.raises(ValueError, match="tier_map"):
        engine.set_tier_map(TierMap.untrained(("a", "b", "c"), known.costs))
    assert engine.policy.tier_map is known


def test_the_first_piece_carries_the_decision(engine: Engine) -> None:
    async def main() -> list[Piece]:
        return [piece async for piece in engine.stream(PROMPT, greedy(n=2, max_tokens=5))]

    pieces = asyncio.run(main())
    for index in range(2):
        own = [piece for piece in pieces if piece.index == index]
        assert own[0].decision is not None
        assert all(piece.decision is None for piece in own[1:])
        assert own[-1].telemetry is not None
        assert own[0].decision.tier_name == own[-1].telemetry.tier_name
