"""Ray Serve: what the gateway keeps books of, then two replicas, one of them killed.

The slow tests start Ray on loopback, with `dvpa[ray]` installed.
"""

import asyncio
import http.client
import json
import os
import pickle
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
from typing import Any

import httpx
import pytest
import server_world
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
    write_checkpoint,
)

from dvpa.engine import Engine, EngineConfig, Piece, QueueFull, SamplingParams
from dvpa.engine.outputs import TokenLogprob
from dvpa.server import ray_backend
from dvpa.server.backend import EngineStats
from dvpa.server.config import ServeConfig
from dvpa.server.errors import ApiError
from dvpa.server.ray_app import build, free_port, start_ray
from dvpa.server.ray_backend import RayBackend, Report, digest, model_info
from dvpa.tiers.policy import Decision
from dvpa.tiers.record import TelemetryRecord

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's, on its import
KEY = "a key for tests only"
needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: pip install 'dvpa[ray]'"
)

# -- the books: no Ray ----------------------------------------------------------------------------


@pytest.fixture
def backend() -> RayBackend:
    config = ServeConfig(model_name=NAME, engine=EngineConfig(max_num_seqs=2, max_queue=3))
    return RayBackend(None, model_info(checkpoint(), config), config)


def report(backend: RayBackend, name: str, **stats: Any) -> Report:
    stats = {"kv_pages": 100, **stats}
    return Report(name, 1, EngineStats(**stats), digest(backend.info.tier_map))


def test_what_crosses_between_processes_survives_pickling(backend: RayBackend) -> None:
    decision = Decision(1, "middle", "tier_map", 0.25, (0.1, 0.2, 0.3), (0.2, 0.3))
    record = TelemetryRecord(
        "r", 1, "middle", 0.25, (0.1, 0.2), "tier_map", (0.2,), 7, 1e9, 3, 2, (0, 2, 0), 0,
        *(1.0, 2.0, 3.0, 4.0),
    )  # fmt: skip
    logprob = TokenLogprob(5, -1.5, {5: -1.5, 6: -2.0})
    piece = Piece("r", 1, "text", (5,), (logprob,), "stop", None, decision, record, (None, logprob))
    params = SamplingParams(logit_bias={3: 1.0}, stop=["x"], quality=0.5, session_id="s")
    tier_map = make_map(0.1, 0.2)
    assert tier_map.tier(0.15) == 1  # computed values are kept on it
    config = ServeConfig(engine=EngineConfig(max_queue=7), api_keys=("12345678",))
    orders = backend.hear(report(backend, "a", decisions={"cap": 1}))
    for value in (piece, params, tier_map, config, orders, report(backend, "a")):
        assert pickle.loads(pickle.dumps(value)) == value


def test_the_gateway_knows_the_model_without_its_weights(backend: RayBackend) -> None:
    engine = Engine(checkpoint())
    known = engine.model.config.to_dict()
    assert backend.info.config.to_dict() | {"_name_or_path": ""} == known | {"_name_or_path": ""}
    assert backend.info.tier_map == engine.policy.tier_map
    assert backend.info.tokenizer is not None and engine.tokenizer is not None
    text = "what is 1 + 1 ? <s>"
    assert backend.info.tokenizer.encode(text) == engine.tokenizer.encode(text)
    engine.close()


def test_nothing_is_let_in_before_a_replica_has_reported(backend: RayBackend) -> None:
    with pytest.raises(ApiError, match="no engine replica has started") as caught:
        backend.check([5], SamplingParams())
    assert caught.value.status == 503 and caught.value.headers["Retry-After"] == "1"
    backend.hear(report(backend, "a"))
    backend.check([5], SamplingParams())
    with pytest.raises(ValueError, match="prompt: token id 9999 must be in"):
        backend.check([9999], SamplingParams())
    with pytest.raises(ValueError, match="must fit the cache"):
        backend.check([5] * 300, SamplingParams(max_tokens=3000))


def test_places_follow_the_replicas_that_are_alive(
    backend: RayBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ApiError, match="no engine replica is alive"), backend._admitted(1):
        pass
    backend.hear(report(backend, "a"))
    with backend._admitted(4), pytest.raises(QueueFull, match="4 of 5"), backend._admitted(2):
        pass
    backend.hear(report(backend, "b"))
    with backend._admitted(4), backend._admitted(6), pytest.raises(QueueFull):
        backend._admitted(1).__enter__()
    monkeypatch.setattr(ray_backend, "ABSENT_S", 0.0)
    assert backend.capacity == 0


def test_counts_of_dead_replicas_stay_and_their_gauges_go(
    backend: RayBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(ray_backend.time, "monotonic", lambda: clock[0])
    numbers = {"running": 1, "steps": 10, "decisions": {"cap": 2}, "resident_bytes": 5}
    backend.hear(report(backend, "a", **numbers))
    backend.hear(report(backend, "b", **numbers))
    before = asyncio.run(backend.stats())
    assert (before.running, before.steps, before.kv_pages) == (2, 20, 200)
    assert before.decisions == {"cap": 4} and before.resident_bytes == 10
    clock[0] += 60
    backend.hear(report(backend, "b", **{**numbers, "steps": 11}))
    after = asyncio.run(backend.stats())
    assert (after.running, after.steps, after.kv_pages) == (1, 21, 100)
    assert after.decisions == {"cap": 4} and after.resident_bytes == 5
    assert [one.replica for one in backend.live()] == ["b"]


def test_a_new_tier_map_reaches_every_replica_and_late_ones(backend: RayBackend) -> None:
    old, new = backend.info.tier_map, make_map(0.6, 0.7)
    assert backend.hear(report(backend, "a")).tier_map is None

    async def main() -> None:
        change = asyncio.create_task(backend.set_tier_map(new))
        await asyncio.sleep(0)
        assert not change.done()
        late = Report("a", 1, EngineStats(), digest(old))
        assert backend.hear(late).tier_map == new
        assert backend.hear(report(backend, "a")).tier_map is None
        await asyncio.wait_for(change, 5)

    asyncio.run(main())
    assert backend.info.tier_map == new
    assert backend.hear(Report("b", 2, EngineStats(), digest(old))).tier_map == new
    other = type(new)("threshold", ("x", "y"), (1.0, 2.0), 1, (0.5,))
    with pytest.raises(ValueError, match="are not the model's"):
        asyncio.run(backend.set_tier_map(other))
    assert backend.info.tier_map == new


def test_all_is_cancelled_once_by_each_replica(backend: RayBackend) -> None:
    for name in ("a", "b"):
        backend.hear(report(backend, name))
    asyncio.run(backend.cancel_all())
    assert [backend.hear(report(backend, name)).cancels for name in "aabb"] == [
        True, False, True, False,
    ]  # fmt: skip


def test_a_session_keeps_its_tier_whichever_replica_answers(backend: RayBackend) -> None:
    params = SamplingParams(session_id="alice")
    assert backend._keep_session(params).min_tier is None
    record = TelemetryRecord(
        "r", 1, "middle", None, (), "fallback", (), 7, 1e9, 3, 2, (0, 2, 0), 0, *(1.0,) * 4
    )
    backend._remember(params, record)
    assert backend._keep_session(params).min_tier == 1
    capped = SamplingParams(session_id="alice", max_tier="base")
    assert backend._keep_session(capped).min_tier in (0, None)
    assert backend._keep_session(SamplingParams(session_id="alice", tier="base")).min_tier is None
    assert backend._keep_session(SamplingParams(session_id="bob")).min_tier is None


def test_a_command_without_ray_says_what_to_install() -> None:
    program = (
        "import sys\nsys.modules['ray'] = None\nfrom dvpa.cli import main\n"
        f"raise SystemExit(main(['serve', {str(checkpoint())!r}, '--ray', '2']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and "dvpa[ray]" in done.stderr, done.stderr


# -- two replicas ---------------------------------------------------------------------------------


class Cluster:
    """Two replicas behind a gateway, on Ray in this process; one folder, one port."""

    def __init__(self, folder: Path) -> None:
        start_ray()
        from ray import serve

        self.model = write_checkpoint(folder / NAME)
        self.port = free_port("127.0.0.1")
        config = ServeConfig(
            port=self.port,
            model_name=NAME,
            threads=1,
            api_keys=(KEY,),
            engine=EngineConfig(**{**ENGINE, "max_num_seqs": 6, "max_queue": 4}),
        )
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})
        app = build(self.model, config, 2, cpus=0.5)
        self.gateway = serve.run(app, name="dvpa", route_prefix="/")
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"authorization": f"Bearer {KEY}"},
            timeout=60,
            trust_env=False,
        )
        until(lambda: self.http.get("/ready").status_code == 200, "readiness")
        self.settle()

    def replicas(self) -> list[Report]:
        found: list[Report] = self.gateway.replicas.remote().result(timeout_s=30)
        return found

    def settle(self) -> list[Report]:
        """Wait for two replicas that run nothing."""

        def quiet() -> list[Report]:
            found = self.replicas()
            is_quiet = len(found) == 2 and not any(r.stats.running + r.stats.waiting for r in found)
            return found if is_quiet else []

        return until(quiet, "two idle replicas")

    def begin(self, **body: Any) -> Reply:
        """Begin a completion."""
        body = {"prompt": "what is 1 + 1 ?", "temperature": 0, **body}
        headers = {"authorization": f"Bearer {KEY}"}
        return Reply(self.port, "/v1/completions", body, headers)

    def send(self, **body: Any) -> http.client.HTTPConnection:
        """Send a completion's request, whose answer nobody reads."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        connection.request(
            "POST", "/v1/completions", json.dumps({"prompt": "what", **body}), headers
        )
        return connection

    def num_requests(self) -> int:
        """Completions that the telemetry has seen."""
        return int(self.http.get("/v1/dvpa/telemetry?limit=0").json()["requests_total"])


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
