"""`dvpa serve` and signals, in processes of their own: reload, drain, kill -9."""

import http.client
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_world import (
    ENDLESS,
    EOS,
    TIERS,
    Process,
    Reply,
    checkpoint,
    events,
    finish_reasons,
    make_map,
    until,
)

from dvpa.tiers import TierMap

KEY = "sk-a-key-that-nobody-logs"
CANARY = "what is 8 + 3 ?"
LONG = {"max_tokens": 600, "temperature": 0, "logit_bias": {str(EOS): -100}}
STREAM = {"prompt": CANARY, "stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server with a checkpoint of its own; the last test of this file that uses it ends it."""
    folder = tmp_path_factory.mktemp("running")
    model = Path(shutil.copytree(checkpoint(), folder / "model"))
    process = Process(folder, model, key=KEY)
    try:
        yield process.ready()
    finally:
        process.kill()


def cuts(process: Process) -> list[float]:
    """Thresholds of the tier map in force."""
    found: list[float] = json.loads(process.get("/v1/dvpa/tiers")[1])["tier_map"]["thresholds"]
    return found


def stream(process: Process, **body: object) -> Reply:
    """A stream whose first event has come."""
    reply = process.post("/v1/completions", **{**STREAM, **LONG, **body})
    assert reply.status == 200, reply.rest()
    return reply.first()


def test_sighup_reads_the_tier_map_again(running: Process) -> None:
    assert cuts(running) == [0.2, 0.3]
    make_map(0.1, 0.4).save(running.model / "tier_map.json")
    running.signal(signal.SIGHUP)
    until(lambda: cuts(running) == [0.1, 0.4], "the new map")


@pytest.mark.parametrize("content", ["{", "other tiers", None])
def test_a_map_that_is_not_sound_changes_nothing(running: Process, content: str | None) -> None:
    file, before = running.model / "tier_map.json", cuts(running)
    kept, num_errors = file.read_text(), running.log.count("SIGHUP: the tier map in use stays")
    if content is None:
        file.unlink()
    elif content == "other tiers":
        TierMap("threshold", ("low", "high"), (1.0, 2.0), 1, (0.5,)).save(file)
    else:
        file.write_text(content)
    try:
        running.signal(signal.SIGHUP)
        until(
            lambda: running.log.count("SIGHUP: the tier map in use stays") > num_errors,
            "a line in the log",
        )
    finally:
        file.write_text(kept)
    assert cuts(running) == before
    assert running.ask(max_tokens=4)
    assert str(running.model) not in running.log.split("SIGHUP")[-1]


def test_sigterm_lets_in_nobody_and_answers_everyone_in_full(running: Process) -> None:
    replies = [stream(running, dvpa={"tier": tier}) for tier in (*TIERS, *TIERS)]
    start = time.monotonic()
    running.signal(signal.SIGTERM)
    until(lambda: running.get("/ready")[0] == 503, "draining")
    assert running.get("/health") == (200, b'{"status":"ok"}')
    refused = running.post("/v1/completions", prompt="what is 1 + 1 ?")
    error = json.loads(refused.rest())["error"]
    assert (refused.status, error["code"]) == (503, "draining")
    assert refused.headers["retry-after"] == "1"
    for reply, tier in zip(replies, (*TIERS, *TIERS), strict=True):
        parts = events(reply.rest())
        assert finish_reasons(parts) == ["length"]
        usage = parts[-1]["usage"]
        assert usage["completion_tokens"] == LONG["max_tokens"]
        assert usage["dvpa"]["tier_name"] == tier == reply.headers["x-dvpa-tier"]
    assert running.wait() == 0
    assert time.monotonic() - start < 30, "no longer than the drain time"
    with pytest.raises(OSError):
        running.get("/health")
    # The process's whole log, access log included.
    lines = [line for line in running.log.splitlines() if line.startswith("{")]
    finished = [json.loads(line) for line in lines if '"finish_reason"' in line]
    assert [line["finish_reason"] for line in finished[-6:]] == ["length"] * 6
    for secret in (KEY, CANARY):
        assert secret not in running.log


def test_kill_9_then_ready_again_with_the_same_answers_then_a_short_drain(tmp_path: Path) -> None:
    files = {
        path: path.read_bytes() for path in checkpoint().rglob("*") if path.stat().st_size < 1 << 20
    }
    first = Process(tmp_path)
    try:
        first.ready()
        known = first.ask(max_tokens=20)
        replies = [stream(first) for _ in range(4)]
        first.signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        for reply in replies:
            with pytest.raises((http.client.IncompleteRead, OSError)):
                reply.rest()
    finally:
        first.kill()
    assert {path: path.read_bytes() for path in files} == files
    second = Process(tmp_path, port=first.port, drain_s=0.2)
    try:
        assert second.ready().port == first.port
        assert second.ask(max_tokens=20) == known
        # What has not ended within the drain time is cut short, and says so.
        replies = [stream(second, **ENDLESS) for _ in range(4)]
        second.signal(signal.SIGTERM)
        for reply in replies:
            parts = events(reply.rest())
            assert finish_reasons(parts) == ["cancelled"]
            assert 0 < parts[-1]["usage"]["completion_tokens"] < ENDLESS["max_tokens"]
        assert second.wait() == 0
    finally:
        second.kill()


def test_a_checkpoint_that_is_not_sound_ends_the_server_with_one_line(tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint(), tmp_path / "model"))
    weights = next(model.glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)
    process = Process(tmp_path, model)
    try:
        assert process.wait() == 2
    finally:
        process.kill()
    errors = [line for line in process.log.splitlines() if line.startswith("dvpa: error: ")]
    assert len(errors) == 1 and "Traceback" not in process.log
