"""What the gateway of Ray Serve keeps books of: replicas, places, tier maps, sessions; no Ray."""

import asyncio
import pickle
import subprocess
import sys
from typing import Any

import pytest
from server_world import NAME, checkpoint, make_map

from dvpa.engine import Engine, EngineConfig, Piece, QueueFull, SamplingParams
from dvpa.engine.outputs import TokenLogprob
from dvpa.server import ray_backend
from dvpa.server.backend import EngineStats
from dvpa.server.config import ServeConfig
from dvpa.server.errors import ApiError
from dvpa.server.ray_backend import RayBackend, Report, digest, model_info
from dvpa.tiers.policy import Decision
from dvpa.tiers.record import TelemetryRecord

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's, on its import


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
