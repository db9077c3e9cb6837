"""Many clients at once: streams, `generate`, threads that add and cancel, the end of it all."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from engine_oracle import Arrival, greedy, make_engine, oracle

from dvpa.engine import Engine, Piece, QueueFull, SamplingParams


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = make_engine(oracle().model, 80, page_size=4, max_num_seqs=6)
    yield engine
    engine.close()


async def collect(engine: Engine, prompt: Any, params: SamplingParams) -> list[Piece]:
    return [piece async for piece in engine.stream(prompt, params)]


def tokens_of(pieces: list[Piece], index: int = 0) -> list[int]:
    return [token for piece in pieces if piece.index == index for token in piece.token_ids]


def until(done: Any) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline, "nothing happened for 30 seconds"
        time.sleep(0.002)


def test_streams_share_the_steps(engine: Engine) -> None:
    known = oracle()

    async def main() -> list[list[Piece]]:
        own = [greedy(tier=i % 3, n=1 + i % 2) for i in range(20)]
        pairs = zip(known.prompts, own, strict=True)
        return await asyncio.gather(*(collect(engine, prompt, params) for prompt, params in pairs))

    streams = asyncio.run(main())
    for i, pieces in enumerate(streams):
        for index in range(1 + i % 2):
            known.check(i, i % 3, tokens_of(pieces, index))
        assert len([piece for piece in pieces if piece.finish_reason]) == 1 + i % 2
        assert all(piece.telemetry for piece in pieces if piece.finish_reason)
        assert len(pieces) > 5, "tokens come as they are made"
    assert engine.num_steps < 150, "together, not one after the other"
    assert engine.pages.num_held == 0


def test_leaving_a_stream_early_cancels_it(engine: Engine) -> None:
    known = oracle()

    async def leave() -> list[int]:
        stream = engine.stream(known.prompts[7], greedy(tier=2, n=2, max_tokens=100))
        async for piece in stream:
            await stream.aclose()
            return list(piece.token_ids)
        return []

    async def main() -> tuple[list[int], list[Piece]]:
        return await asyncio.gather(leave(), collect(engine, known.prompts[0], greedy(tier=1)))

    first, other = asyncio.run(main())
    known.check(7, 2, first)
    known.check(0, 1, tokens_of(other))
    until(lambda: not engine.has_work or engine.step() is None)
    assert engine.pages.num_held == 0


def test_a_cancelled_task_cancels_its_request(engine: Engine) -> None:
    async def main() -> None:
        params = greedy(tier=2, max_tokens=200)
        task = asyncio.create_task(collect(engine, [5, 6, 7], params))
        while engine.num_steps < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while engine.has_work:
            await asyncio.sleep(0.001)

    asyncio.run(main())
    assert engine.num_steps < 190 and engine.pages.num_held == 0


def test_one_engine_serves_one_event_loop_after_another(engine: Engine) -> None:
    known = oracle()
    for tier in (0, 1, 2):
        known.check(
            3, tier, tokens_of(asyncio.run(collect(engine, known.prompts[3], greedy(tier=tier))))
        )


def test_bad_input_and_a_full_queue_are_raised_where_the_stream_begins() -> None:
    engine = make_engine(oracle().model, max_queue=1)

    async def main() -> None:
        with pytest.raises(ValueError, match="prompt: must not be empty"):
            await collect(engine, [], greedy())
        engine.add([5], greedy())
        with pytest.raises(QueueFull):
            await collect(engine, [5], greedy())

    asyncio.run(main())
    engine.close()


def test_an_error_of_the_driver_reaches_every_stream(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise RuntimeError("a defect of the scheduler")

    async def main() -> list[Any]:
        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler, "schedule", broken)
            streams = [collect(engine, [5, 6], greedy()) for _ in range(3)]
            return await asyncio.gather(*streams, return_exceptions=True)

    assert [str(error) for error in asyncio.run(main())] == ["a defect of the scheduler"] * 3
    assert not engine.has_work and engine.pages.num_held == 0
    assert len(asyncio.run(collect(engine, [5], greedy()))) > 0


def test_generate_and_streams_at_the_same_time(engine: Engine) -> None:
    known = oracle()
    outputs: list[Any] = []

    def generate() -> None:
        outputs.extend(engine.generate(known.prompts[:10], greedy(tier=0)))

    async def main() -> list[list[Piece]]:
        thread = threading.Thread(target=generate)
        thread.start()
        streams = await asyncio.gather(
            *(collect(engine, prompt, greedy(tier=2)) for prompt in known.prompts[10:])
        )
        await asyncio.to_thread(thread.join, 30)
        assert not thread.is_alive()
        return streams

    streams = asyncio.run(main())
    for i, output in enumerate(outputs):
        known.check(i, 0, output.token_ids)
    for i, pieces in enumerate(streams, 10):
        known.check(i, 2, tokens_of(pieces))
    assert len(outputs) == 10 and engine.pages.num_held == 0


def test_adding_and_cancelling_from_other_threads(engine: Engine) -> None:
    known, arrivals = oracle(), list[Arrival]()
    stop, failures = threading.Event(), list[BaseException]()

    def client(seed: int) -> None:
        try:
            for i in range(8):
                prompt = (seed * 7 + i) % 20
                arrival = Arrival(known.prompts[prompt], greedy(tier=prompt % 3, max_tokens=6))
                arrivals.append(arrival)
                arrival.request_id = engine.add(
                    arrival.prompt, arrival.params, listener=arrival.pieces.append
                )
                time.sleep(0.002)
                if i % 3 == 0:
                    engine.cancel(arrival.request_id)
        except BaseException as error:
            failures.append(error)

    def stepper() -> None:
        try:
            while not stop.is_set():
                engine.step()
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    steppers = [threading.Thread(target=stepper) for _ in range(2)]
    for thread in (*clients, *steppers):
        thread.start()
    for thread in clients:
        thread.join(30)
    until(lambda: not engine.has_work or failures)
    stop.set()
    for thread in steppers:
        thread.join(30)
    assert failures == [] and len(arrivals) == 32
    for arrival in arrivals:
        last, prompt = arrival.last(), known.prompts.index(list(arrival.prompt))
        assert last.finish_reason in ("length", "cancelled")
        known.check(prompt, prompt % 3, arrival.tokens())
    assert engine.pages.num_held == 0 and not engine._listeners and not engine.progress.live


def test_a_cancellation_between_the_pass_and_its_bookkeeping_is_not_lost(engine: Engine) -> None:
    known, run = oracle(), engine.runner.run
    arrival = Arrival(known.prompts[3], greedy(tier=1))
    ran, cancelled = threading.Event(), threading.Event()

    def slow(segments: Any) -> Any:
        result = run(segments)
        ran.set()
        assert cancelled.wait(30)
        return result

    engine.runner.run = slow  # type: ignore[method-assign]
    request_id = engine.add(arrival.prompt, arrival.params, listener=arrival.pieces.append)
    stepping = threading.Thread(target=engine.step)
    stepping.start()
    assert ran.wait(30)
    assert engine.cancel(request_id)
    assert engine.cancel(request_id), "not over yet"
    assert arrival.pieces == []
    cancelled.set()
    stepping.join(30)
    assert arrival.last().finish_reason == "cancelled" and not engine.has_work


def test_close_ends_what_runs_and_waits(engine: Engine) -> None:
    async def main() -> list[list[Piece]]:
        streams = [
            asyncio.create_task(collect(engine, [5 + i], greedy(max_tokens=200))) for i in range(9)
        ]
        while engine.num_steps < 4:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.close)
        return await asyncio.wait_for(asyncio.gather(*streams), 30)

    for pieces in asyncio.run(main()):
        assert pieces[-1].finish_reason == "cancelled"
    assert engine.pages.num_held == 0 and not engine.has_work
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.add([5])
    engine.close()
