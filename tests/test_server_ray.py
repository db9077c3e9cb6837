"""Ray Serve: two replicas of an engine, one of them killed, and the command.

The tests start Ray on loopback, with `dvpa[ray]` installed.
"""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import server_world
from ray_world import KEY, Cluster
from server_world import (
    ENDLESS,
    ENGINE,
    NAME,
    Reply,
    checkpoint,
    events,
    finish_reasons,
    make_map,
    parse_metrics,
    until,
)

from dvpa.engine import Engine, SamplingParams
from dvpa.server.ray_app import free_port

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's, on its import
needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: pip install 'dvpa[ray]'"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("ray"))
    import ray
    from ray import serve

    try:
        yield found
    finally:
        found.http.close()
        serve.shutdown()
        ray.shutdown()


@pytest.mark.slow
@needs_ray
def test_answers_are_those_of_one_engine(cluster: Cluster) -> None:
    from openai import OpenAI

    prompts = ["what is 1 + 1 ?", "sort the words", "say something nice"]
    engine = Engine(cluster.model)
    alone = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0))
    engine.close()
    client = OpenAI(base_url=f"http://127.0.0.1:{cluster.port}/v1", api_key=KEY)
    for prompt, known in zip(prompts, alone, strict=True):
        whole = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=12, temperature=0, logprobs=1
        )
        assert whole.choices[0].text == known.text
        stream = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=12, temperature=0, stream=True, logprobs=0
        )
        chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == known.text
        assert len(chunks) >= len(known.token_ids), "a chunk for each token"
        raw = client.completions.with_raw_response.create(model=NAME, prompt=prompt, max_tokens=1)
        assert raw.headers["x-dvpa-tier"] == known.telemetry.tier_name
        assert raw.headers["x-request-id"] == raw.parse().id, "the proxy adds no id of its own"
        route = cluster.http.post("/v1/dvpa/route", json={"prompt": prompt}).json()
        assert route["tier_name"] == known.telemetry.tier_name
        assert route["difficulty"] == pytest.approx(known.telemetry.difficulty, abs=1e-3)


@pytest.mark.slow
@needs_ray
def test_telemetry_is_that_of_both_replicas(cluster: Cluster) -> None:
    before, total = cluster.settle(), cluster.num_requests()
    replies = [cluster.begin(max_tokens=30, min_tokens=30, n=2) for _ in range(4)]
    for reply in replies:
        assert json.loads(reply.rest())["usage"]["completion_tokens"] == 60
    assert cluster.num_requests() == total + 8
    until(
        lambda: all(
            new.stats.steps > old.stats.steps
            for old, new in zip(before, cluster.settle(), strict=True)
        ),
        "work on both replicas",
    )
    metrics = parse_metrics(cluster.http.get("/metrics").text)
    steps = sum(one.stats.steps for one in cluster.settle())
    assert metrics["dvpa_engine_steps_total"] == steps
    tiers = sum(v for name, v in metrics.items() if name.startswith("dvpa_requests_total{"))
    assert tiers == cluster.num_requests()


@pytest.mark.slow
@needs_ray
def test_a_client_that_leaves_frees_its_replica(cluster: Cluster) -> None:
    streams = [cluster.begin(stream=True, **ENDLESS).first() for _ in range(4)]
    until(lambda: sum(one.stats.running for one in cluster.replicas()) == 4, "four streams")
    for stream in streams:
        stream.leave()
    cluster.settle()
    with suppress(httpx.TimeoutException):  # not streamed: the client gives up waiting
        cluster.http.post("/v1/completions", json={"prompt": "what", **ENDLESS}, timeout=0.5)
    cluster.settle()


@pytest.mark.slow
@needs_ray
def test_errors_come_as_from_one_server(cluster: Cluster) -> None:
    bad = cluster.http.post("/v1/completions", json={"prompt": "what", "dvpa": {"tier": "huge"}})
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "dvpa.tier"
    missing = cluster.http.get("/v1/models", headers={"authorization": "Bearer no"})
    assert missing.status_code == 401
    waiting = []
    for _ in range(20):  # 2 x (6 run + 4 wait); one by one, or they would all have to wait at first
        waiting.append(cluster.send(stream=True, **ENDLESS))
        time.sleep(0.1)
    full = cluster.begin(max_tokens=1)
    assert full.status == 429
    assert full.headers["retry-after"] == "1"
    assert json.loads(full.rest())["error"]["code"] == "queue_full"
    for connection in waiting:
        connection.close()
    cluster.settle()
    assert cluster.begin(max_tokens=1).status == 200


@pytest.mark.slow
@needs_ray
def test_a_reload_reaches_both_replicas(cluster: Cluster) -> None:
    make_map(0.97, 0.98).save(cluster.model / "tier_map.json")
    done = cluster.http.post("/v1/dvpa/reload")
    assert done.status_code == 200, done.text
    assert len({one.tier_map for one in cluster.replicas()}) == 1
    tiers = [cluster.begin(max_tokens=1, prompt=text) for text in ("what", "sort", "say", "nice")]
    assert {reply.headers["x-dvpa-tier"] for reply in tiers} == {"base"}
    (cluster.model / "tier_map.json").write_text("{}")
    assert cluster.http.post("/v1/dvpa/reload").status_code == 409
    assert cluster.gateway.reload.remote().result(timeout_s=30).startswith("the tier map in use")
    make_map(0.2, 0.3).save(cluster.model / "tier_map.json")
    assert cluster.http.post("/v1/dvpa/reload").status_code == 200


@pytest.mark.slow
@needs_ray
def test_a_replica_is_killed_and_requests_go_on(cluster: Cluster) -> None:
    """Its streams end with an error, the other's go on, new requests are answered throughout."""
    victim = cluster.settle()[0]
    total = cluster.num_requests()
    long = {**ENDLESS, "max_tokens": 1500}
    streams = [cluster.begin(stream=True, **long).first() for _ in range(8)]
    until(lambda: sum(one.stats.running for one in cluster.replicas()) == 8, "eight streams")
    on_victim = next(r for r in cluster.replicas() if r.pid == victim.pid).stats.running
    assert 0 < on_victim < 8
    statuses: list[int] = []
    is_over = threading.Event()

    def client() -> None:
        while not is_over.is_set():
            reply = cluster.begin(max_tokens=4)
            reply.rest()
            statuses.append(reply.status)

    other = threading.Thread(target=client)
    other.start()
    until(lambda: len(statuses) > 3)
    os.kill(victim.pid, signal.SIGKILL)
    parts = [events(stream.rest()) for stream in streams]
    lost = [part for part in parts if "error" in part[-1]]
    assert len(lost) == on_victim
    for part in lost:
        assert "engine replica" in part[-1]["error"]["message"] and len(part) > 1
    whole = [finish_reasons(part) for part in parts if "error" not in part[-1]]
    assert whole == [["length"]] * (8 - on_victim)
    until(lambda: victim.pid not in [r.pid for r in cluster.settle()], "a new replica")
    is_over.set()
    other.join(60)
    assert len(statuses) > 10 and set(statuses) == {200}
    assert cluster.num_requests() == total + 8 + len(statuses), "those that were lost count, too"
    metrics = parse_metrics(cluster.http.get("/metrics").text)
    assert metrics["dvpa_requests_failed_total"] == on_victim


def child_named(name: str) -> int:
    """The process of this one's family with `name` in its title."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if name.encode() in (folder / "cmdline").read_bytes() and is_ours(int(folder.name)):
                return int(folder.name)
    raise AssertionError(f"no process {name}")


def is_ours(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return False


@pytest.mark.slow
@needs_ray
def test_a_gateway_is_killed_and_another_one_takes_over(cluster: Cluster) -> None:
    """Answers under way break off, visibly; nothing goes on running for nobody."""
    cluster.settle()
    streams = [cluster.begin(stream=True, **ENDLESS).first() for _ in range(4)]
    until(lambda: sum(one.stats.running for one in cluster.replicas()) == 4, "four streams")
    os.kill(child_named("ServeReplica:dvpa:Gateway"), signal.SIGKILL)
    for stream in streams:
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            stream.rest()

    def is_ready() -> bool:
        with suppress(httpx.HTTPError):
            return cluster.http.get("/ready").status_code == 200
        return False

    until(is_ready, "another gateway")
    cluster.settle()
    assert cluster.begin(max_tokens=2).status == 200


@pytest.mark.slow
@needs_ray
def test_the_command_drains_on_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dvpa serve --ray 1`: SIGHUP reloads, SIGTERM finishes what runs."""
    monkeypatch.setattr(server_world, "PATIENCE_S", 240.0)  # a dozen processes have to start
    model, port = tmp_path / NAME, free_port("127.0.0.1")
    shutil.copytree(checkpoint(), model)
    (tmp_path / "serve.yaml").write_text(
        json.dumps({"port": port, "engine": ENGINE, "model_name": NAME, "threads": 1})
    )
    command = [sys.executable, "-m", "dvpa", "serve", str(model), "--ray", "1"]
    command += ["--config", str(tmp_path / "serve.yaml")]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=tmp_path)
    try:
        until(
            lambda: "is ready at http" in log.read_text() or process.poll() is not None,
            "an address",
        )
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGHUP)
        until(lambda: "tier map reloaded" in log.read_text(), "a reload")
        body = {"prompt": "what", "stream": True, "max_tokens": 800, "min_tokens": 800}
        reply = Reply(port, "/v1/completions", body, {}).first()
        process.send_signal(signal.SIGTERM)
        until(lambda: Reply(port, "/v1/completions", body, {}).status == 503, "a refusal")
        assert finish_reasons(events(reply.rest())) == ["length"]
        assert process.wait(90) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    with pytest.raises((ConnectionRefusedError, http.client.HTTPException)):
        Reply(port, "/v1/completions", {}, {})
