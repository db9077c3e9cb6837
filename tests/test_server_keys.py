"""Attacks on a server's keys: guesses, timing, ways around, where they show (docs/security.md)."""

import hmac
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_world import NAME, World, all_logs, body_of, get_bytes, post_bytes, serving, status

from dvpa.server import limits
from dvpa.server.config import ServeConfig, load_serve_config

KEY, SECOND = "sk-First-key-1234", "sk-second-key-98765"
OPEN = {"/", "/health", "/ready", "/openapi.json", "/metrics"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with serving(api_keys=(KEY, SECOND)) as world:
        yield world


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer  {KEY}",
        f"Bearer\t{KEY}",
        f"Bearer{KEY}",
        f"Bearer {KEY.lower()}",
        f"Bearer {KEY.upper()}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Bearer {KEY},{KEY}",
        f"Bearer {KEY} {SECOND}",
        f"Bearer {KEY}{SECOND}",
        f'Bearer "{KEY}"',
        f"Bearer {KEY}\u00e9",
        "Bearer *",
        "Bearer null",
    ],
)
def test_only_the_whole_key_opens(world: World, sent: str | None) -> None:
    steps = world.engine.num_steps
    headers = [] if sent is None else [f"authorization: {sent}"]
    answer = world.raw(post_bytes("/v1/completions", body_of(), None, *headers))
    assert status(answer) == 401
    assert b"www-authenticate: Bearer" in answer
    assert b'"type":"authentication_error"' in answer
    assert world.engine.num_steps == steps


def test_every_key_opens_whatever_the_case_of_the_scheme(world: World) -> None:
    for header in (f"Bearer {KEY}", f"bearer {SECOND}", f"BEARER {KEY}"):
        answer = world.raw(get_bytes("/v1/models", f"Authorization: {header}"))
        assert status(answer) == 200


def test_two_headers_are_none(world: World) -> None:
    good, bad = f"authorization: Bearer {KEY}", "authorization: Bearer nothing-of-ours"
    for pair in ((good, bad), (bad, good), (good, good)):
        assert status(world.raw(get_bytes("/v1/models", *pair))) == 401


def test_a_key_anywhere_else_does_not_count(world: World) -> None:
    for query in (f"key={KEY}", f"api_key={KEY}", f"token={KEY}", f"authorization=Bearer%20{KEY}"):
        assert status(world.raw(get_bytes(f"/v1/models?{query}"))) == 401
    for name in ("x-api-key", "api-key", "cookie", "proxy-authorization", "x-authorization"):
        assert status(world.raw(get_bytes("/v1/models", f"{name}: Bearer {KEY}"))) == 401


def test_every_route_but_the_open_ones_wants_a_key(world: World) -> None:
    with httpx.Client(base_url=world.url, trust_env=False) as client:
        paths = client.get("/openapi.json").json()["paths"]
        assert len(paths) > 10
        for path, methods in paths.items():
            for method in methods:
                got = client.request(method, path.replace("{model}", NAME), json={})
                assert (got.status_code == 401) != (path in OPEN), path
        for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE"):
            headers = {"x-http-method-override": "GET", "x-original-url": "/health"}
            assert client.request(method, "/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        "/static/../v1/models",
        "/static/%2e%2e/v1/models",
        "/static/..%2fv1%2fmodels",
        "/health/../v1/models",
        "/health%2f..%2fv1%2fmodels",
        "/health;/../v1/models",
        "//v1/models",
        "/./v1/models",
        "/v1//models",
        "/v1/models/",
        "/V1/Models",
        "/v1/models%00",
        "/v1/models%20",
        "/v1/models#/health",
        "/v1/models?/static/",
        "/%76%31/models",
        "http://localhost/v1/models",
        "http://localhost/static/../v1/models",
    ],
)
def test_no_spelling_of_a_path_gets_around_the_key(world: World, target: str) -> None:
    answer = world.raw(get_bytes(target))
    assert status(answer) in (400, 401, 404)
    assert NAME.encode() not in answer


def test_metrics_can_be_behind_the_key() -> None:
    with serving(api_keys=(KEY,), metrics_need_key=True) as world:
        assert status(world.raw(get_bytes("/metrics"))) == 401
        assert status(world.raw(get_bytes("/metrics", f"authorization: Bearer {KEY}"))) == 200


def test_comparing_takes_the_same_steps_for_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    same = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return same(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = limits.Keys((KEY, SECOND))
    for token, is_good in ((KEY, True), (SECOND, True), ("", False), ("x" * 9000, False)):
        compared.clear()
        assert keys.allow([(b"authorization", b"Bearer " + token.encode())]) == is_good
        assert compared == [(32, 32)] * 2, "digests of one length, all of them"


def test_keys_are_shown_nowhere(world: World) -> None:
    with all_logs() as lines:
        for sent in (f"Bearer {KEY}", f"Bearer {KEY}x", KEY):
            for target in ("/v1/models", "/v1/dvpa/telemetry", "/nothing", "/metrics"):
                answer = world.raw(get_bytes(target, f"authorization: {sent}"))
                assert KEY.encode() not in answer
        world.raw(get_bytes("/v1/models", f"authorization: Bearer {KEY}\x00"))
        world.raw(b"NONSENSE " + KEY.encode() + b"\r\n\r\n")
    assert KEY not in "\n".join(lines) + repr(world.config) + str(world.metrics())


def test_keys_that_are_none_are_refused_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# nothing but a comment\n\n")
    with pytest.raises(ValueError, match="api_key_file"):
        load_serve_config(None, api_key_file=str(file))  # or the server would be open to all
    for key in ("short", "with\nline-end", "p\u00e4ssword-long"):
        with pytest.raises(ValueError, match="api_keys") as caught:
            ServeConfig(api_keys=(key,))
        assert key not in str(caught.value)
    config = tmp_path / "serve.yaml"
    config.write_text(f"api_keys: [{KEY}]\n")
    with pytest.raises(ValueError, match="unknown key api_keys") as caught:
        load_serve_config(config)
    assert KEY not in str(caught.value)
