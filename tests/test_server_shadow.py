"""Shadow outcomes: what a real server logs about requests it has answered, and that it is right."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import pytest
from server_events import finished, model_info
from server_world import QUESTION, World, all_logs, checkpoint, serving, until

from dvpa.engine import Engine, Piece, QueueFull, SamplingParams
from dvpa.server.config import ServeConfig
from dvpa.server.shadow import Shadows
from dvpa.server.telemetry import Telemetry

ASKED = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with serving(shadow_share=1.0) as found:
        yield found


def shadow_lines(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Those of the access log."""
    rows = [json.loads(line[line.index("{") :]) for line in lines if '"event": "shadow"' in line]
    return rows


def counts(world: World) -> dict[str, int]:
    with world.http() as client:
        found: dict[str, int] = client.get("/v1/dvpa/telemetry").json()["shadow"]
    return found


def test_every_tier_is_compared_with_the_top_tiers_answer(world: World) -> None:
    before = counts(world)["done"]
    with all_logs() as lines:
        answer = world.complete(**ASKED)
        until(lambda: counts(world)["done"] > before, "a shadow outcome")
    (row,) = shadow_lines(lines)
    record = answer["usage"]["dvpa"]
    assert (row["request_id"], row["difficulty"]) == (record["request_id"], record["difficulty"])
    assert row["prompt_tokens"] == record["prompt_tokens"]
    engine = Engine(checkpoint())
    greedy = [
        engine.generate(QUESTION, SamplingParams(temperature=0, max_tokens=6, tier=tier))[0]
        for tier in range(3)
    ]
    assert row["completion_tokens"] == len(greedy[2].token_ids)
    agreement = [float(output.token_ids == greedy[2].token_ids) for output in greedy]
    assert row["agreement"] == agreement and agreement[2] == 1.0
    logprobs = engine.generate(
        QUESTION, SamplingParams(temperature=0, max_tokens=6, tier="top", logprobs=0)
    )[0].logprobs
    nll = -sum(token.logprob for token in logprobs) / len(logprobs)
    assert row["nll"][2] == pytest.approx(nll, abs=1e-3)
    assert QUESTION not in "".join(lines) and "text" not in row


def test_shadows_are_no_requests_of_clients(world: World) -> None:
    with world.http() as client:
        total = client.get("/v1/dvpa/telemetry").json()["requests_total"]
        before = counts(world)["done"]
        world.complete(**ASKED)
        until(lambda: counts(world)["done"] > before, "a shadow outcome")
        snapshot = client.get("/v1/dvpa/telemetry").json()
    assert snapshot["requests_total"] == total + 1
    assert (
        world.metrics()['dvpa_shadow_requests_total{outcome="done"}'] == snapshot["shadow"]["done"]
    )


@pytest.mark.parametrize("dvpa", [{"tier": "base"}, {"tier": 2}], ids=str)
def test_requests_that_name_a_tier_have_no_shadow(world: World, dvpa: dict[str, Any]) -> None:
    before = counts(world)
    world.complete(**ASKED, dvpa=dvpa)
    world.idle()
    assert counts(world) == before


def test_none_by_default() -> None:
    assert ServeConfig().shadow_share == 0.0
    with serving() as world:
        world.complete(**ASKED)
        world.idle()
        assert counts(world) == {"done": 0, "skipped": 0, "failed": 0}


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), True, "half"])
def test_a_share_that_is_none_is_named(share: Any) -> None:
    with pytest.raises(ValueError, match="shadow_share"):
        ServeConfig(shadow_share=share)


class Refusing:
    """A backend that has no room, or breaks, or never ends."""

    def __init__(self, error: Exception | None) -> None:
        self.info, self.error = model_info(), error
        self.started = 0

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Anything goes."""

    async def stream(self, *_: Any) -> AsyncGenerator[Piece, None]:
        self.started += 1
        if self.error is not None:
            raise self.error
        await asyncio.sleep(600)
        yield Piece("never")


def offered(error: Exception | None, times: int, share: float = 1.0) -> dict[str, int]:
    """What became of requests offered one after the other, without waiting."""

    async def run() -> dict[str, int]:
        telemetry = Telemetry(model_info())
        backend: Any = Refusing(error)
        shadows = Shadows(backend, telemetry, share, seed=0)
        last = Piece("r", finish_reason="stop", telemetry=finished().record)
        for _ in range(times):
            shadows.offer([1, 2], SamplingParams(), last)
            await asyncio.sleep(0.01 if error else 0)
        await shadows.close()
        return dict(telemetry.snapshot()["shadow"], started=backend.started)

    return asyncio.run(run())


def test_no_room_and_failures_are_counted() -> None:
    assert offered(QueueFull("full"), 2) == {"done": 0, "skipped": 2, "failed": 0, "started": 2}
    assert offered(RuntimeError("broken"), 2)["failed"] == 2


def test_one_at_a_time_and_none_is_left_behind() -> None:
    found = offered(None, 3)
    assert found == {"done": 0, "skipped": 3, "failed": 0, "started": 1}  # the last one given up


def test_a_share_of_the_requests() -> None:
    found = offered(RuntimeError("broken"), 100, share=0.2)
    assert 8 <= found["failed"] <= 35
