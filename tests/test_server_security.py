"""Attacks on a real server: headers, what leaks, browsers, reloads (docs/security.md).

Keys are in test_server_keys.py; sizes, speeds and paths in test_server_limits.py.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_world import (
    World,
    all_logs,
    body_of,
    get_bytes,
    make_map,
    post_bytes,
    read_all,
    serving,
    status,
)

from dvpa.server.config import ServeConfig

KEY, SECOND = "sk-First-key-1234", "sk-second-key-98765"
CANARY = "zanzibar"  # in no file and no message of ours
MAX_BODY = 20_000


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with serving(api_keys=(KEY, SECOND), max_body_bytes=MAX_BODY) as world:
        yield world


@pytest.fixture(scope="module")
def plain() -> Iterator[World]:
    """Without keys."""
    with serving() as world:
        yield world


# -- headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [b"a\nset-cookie: injected=1", b"a\rinjected", b"a\x00injected"])
@pytest.mark.parametrize("name", [b"x-request-id", b"x-dvpa-session-id", b"x-forwarded-host"])
def test_line_ends_in_a_header_are_not_passed_on(plain: World, name: bytes, bad: bytes) -> None:
    request = post_bytes("/v1/completions", body_of()).replace(
        b"\r\n\r\n", b"\r\n" + name + b": " + bad + b"\r\n\r\n", 1
    )
    answer = plain.raw(request)
    assert status(answer) in (200, 400)
    assert b"injected" not in answer


def test_what_a_client_sends_never_becomes_a_header(plain: World) -> None:
    sent = "x\r\nset-cookie: injected=1"
    for changes in ({"model": sent}, {"user": sent}, {"dvpa": {"tier": sent}}, {sent: 1}):
        answer = plain.raw(post_bytes("/v1/completions", body_of(**changes)))
        head, _, content = answer.partition(b"\r\n\r\n")
        assert b"injected" not in head and status(answer) in (200, 400, 404)
        json.loads(content)
    answer = plain.raw(post_bytes("/v1/completions", body_of(), None, "x-request-id: mine"))
    head = answer.partition(b"\r\n\r\n")[0].decode()
    assert "mine" not in head
    ours = dict(re.findall(r"^(x-[a-z-]+): (.*)$", head, re.MULTILINE))
    assert {"x-dvpa-tier", "x-dvpa-decided-by", "x-request-id"} <= ours.keys()
    assert all(re.fullmatch(r"[\w.-]*", value.strip()) for value in ours.values())


def test_a_session_id_is_a_short_word(plain: World) -> None:
    for session, code in (("a" * 128, 200), ("a" * 129, 400), ("a b", 400), ("\u00e9", 400)):
        header = f"x-dvpa-session-id: {session}"
        answer = plain.raw(post_bytes("/v1/completions", body_of(), None, header))
        assert status(answer) == code, session


def test_huge_heads_are_refused(plain: World) -> None:
    for request in (
        get_bytes("/health", f"x-long: {'a' * 200_000}"),
        get_bytes("/health", *(f"x-{i}: {'a' * 100}" for i in range(2000))),
        get_bytes("/health?" + "a" * 200_000),
    ):
        with plain.connect() as connection:
            try:
                connection.sendall(request)
            except OSError:  # closed while we send
                continue
            assert status(read_all(connection)) in (0, 400, 414, 431)
    assert status(plain.raw(get_bytes("/health"))) == 200


@pytest.mark.parametrize(
    "headers",
    [
        ("content-length: 10", "content-length: 60"),
        ("content-length: -1",),
        ("content-length: 1e3",),
        ("transfer-encoding: gzip",),
        ("transfer-encoding: chunked, identity",),
    ],
)
def test_a_body_of_doubtful_length_is_refused(plain: World, headers: tuple[str, ...]) -> None:
    head = get_bytes("/v1/completions", "content-type: application/json", *headers, method="POST")
    hidden = b"0\r\n\r\n" + get_bytes("/v1/models")
    answer = plain.raw(head + hidden)
    assert status(answer) in (400, 501) and answer.count(b"HTTP/1.1") == 1


# -- what gets out ------------------------------------------------------------------------------


def test_no_prompt_and_no_answer_gets_into_logs_metrics_or_telemetry(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = f"what is {CANARY} ?"
    turns = [{"role": "user", "content": prompt}]
    said: list[str] = []
    with all_logs() as lines, world.http() as client:

        def post(path: str, **body: Any) -> httpx.Response:
            return client.post(path, json=body, headers={"x-dvpa-session-id": CANARY})

        for more in ({}, {"stream": True, "echo": True}, {"echo": True, "logprobs": 2}, {"n": 2}):
            length = {"max_tokens": 24, "min_tokens": 24, "seed": 1}
            answer = post("/v1/completions", prompt=prompt, **length, **more)
            assert answer.status_code == 200
            said += [c["text"] for c in answer.json()["choices"]] if "stream" not in more else []
        fields = {"user": CANARY, "metadata": {"about": CANARY}, "stop": [CANARY]}
        assert post("/v1/chat/completions", messages=turns, max_tokens=4, **fields).is_success
        assert post("/v1/dvpa/route", prompt=prompt, dvpa={"explain": True}).is_success
        tokens = post("/tokenize", prompt=prompt).json()["tokens"]
        assert CANARY in post("/detokenize", tokens=tokens).text
        # Whatever is refused is not repeated anywhere but to the one who sent it.
        for wrong in (
            {"prompt": prompt, "temperature": CANARY},
            {"prompt": prompt, CANARY: 1},
            {"prompt": prompt, "model": CANARY},
            {"prompt": prompt, "dvpa": {"tier": CANARY}},
            {"prompt": {"text": prompt}},
            {"prompt": f"{prompt} " * 900},
        ):
            assert 400 <= post("/v1/completions", **wrong).status_code < 500
        assert client.post("/v1/completions", content=f'{{"{prompt}').status_code == 400
        assert client.get(f"/{CANARY}?q={CANARY}").status_code == 404
        assert world.raw(b"GET /" + CANARY.encode() + b" NONSENSE\r\n\r\n")

        def broken(*_: Any) -> Any:
            raise LookupError(prompt)  # as libraries do, which quote what they choke on

        with monkeypatch.context() as patch:
            patch.setattr(world.backend, "stream", broken)
            answer = post("/v1/completions", prompt=prompt)
            assert answer.status_code == 500 and CANARY not in answer.text
            assert answer.headers["x-content-type-options"] == "nosniff"
        shown = [client.get("/metrics").text, client.get("/v1/dvpa/telemetry?limit=1000").text]
    everything = "\n".join([*lines, *shown])
    assert "/v1/completions" in everything, "something was logged"
    assert CANARY not in everything
    for text in said:
        assert len(text) > 8
        assert text not in everything and json.dumps(text)[1:-1] not in everything


def test_an_engine_that_fails_quotes_nothing_either(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise LookupError(f"cannot decode {CANARY}")

    monkeypatch.setattr(world.engine.runner, "run", broken)
    with all_logs() as lines:
        answer = world.raw(post_bytes("/v1/completions", body_of(), KEY))
    assert status(answer) == 500 and CANARY.encode() not in answer
    assert "LookupError" in "\n".join(lines)
    assert CANARY not in "\n".join(lines)


def test_errors_tell_nothing_of_the_inside(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a secret of /some/folder")

    monkeypatch.setattr(world.backend, "stream", broken)
    answer = world.raw(post_bytes("/v1/completions", body_of(), KEY))
    assert status(answer) == 500
    for word in (b"Traceback", b"/some/folder", b".py", b"secret"):
        assert word not in answer


# -- browsers -----------------------------------------------------------------------------------


def test_every_answer_has_the_security_headers(world: World) -> None:
    key = f"authorization: Bearer {KEY}"
    answers = {
        200: [
            get_bytes("/"),
            get_bytes("/health"),
            get_bytes("/static/dashboard.css"),
            get_bytes("/v1/models", key),
            post_bytes("/v1/completions", body_of(), KEY),
            post_bytes("/v1/completions", body_of(stream=True), KEY),
        ],
        400: [post_bytes("/v1/completions", b"{}", KEY)],
        401: [get_bytes("/v1/models")],
        404: [get_bytes("/nothing", key)],
        405: [get_bytes("/v1/completions", key)],
        413: [post_bytes("/v1/completions", b"a" * (MAX_BODY + 1), KEY)],
    }
    for code, requests in answers.items():
        for request in requests:
            answer = world.raw(request)
            head = answer.partition(b"\r\n\r\n")[0].decode("latin-1").lower()
            assert status(answer) == code, answer
            found = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
            policy = found["content-security-policy"]
            assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy and "*" not in policy
            assert found["x-content-type-options"] == "nosniff"
            assert found["x-frame-options"] == "deny"
            assert found["referrer-policy"] == "no-referrer"
            assert "server" not in found and "access-control-allow-origin" not in found


def test_other_origins_may_not_ask_unless_they_are_named() -> None:
    origin, other = "https://app.example.org", "https://evil.example.org"
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    for allowed in ((), (origin,)):
        with serving(cors_origins=allowed) as world, world.http() as client:
            for asking in (origin, other, "null"):
                headers = {"origin": asking}
                answers = [
                    client.options("/v1/completions", headers={**headers, **preflight}),
                    client.post("/v1/completions", content=body_of(), headers=headers),
                    client.get("/health", headers=headers),
                ]
                for answer in answers:
                    found = answer.headers.get("access-control-allow-origin")
                    assert found == (asking if asking in allowed else None)
                    assert "access-control-allow-credentials" not in answer.headers
    for wrong in ("*", "null", "example.org"):
        with pytest.raises(ValueError, match="cors_origins"):
            ServeConfig(cors_origins=(wrong,))


# -- reload -------------------------------------------------------------------------------------


def test_a_reload_wants_a_key_and_tells_no_path(tmp_path: Path) -> None:
    file = tmp_path / "tier_map.json"
    make_map(0.1, 0.4).save(file)
    with serving(tier_map_file=file) as world:
        assert status(world.raw(post_bytes("/v1/dvpa/reload", b""))) == 403, "no keys at all"
    with serving(tier_map_file=file, api_keys=(KEY,)) as world:
        assert status(world.raw(post_bytes("/v1/dvpa/reload", b""))) == 401
        assert world.engine.policy.tier_map.thresholds == (0.2, 0.3)
        assert status(world.raw(post_bytes("/v1/dvpa/reload", b"", KEY))) == 200
        assert world.engine.policy.tier_map.thresholds == (0.1, 0.4)
        for broken in ("{", '{"version": 99}', None):
            file.unlink(missing_ok=True)
            if broken is not None:
                file.write_text(broken)
            answer = world.raw(post_bytes("/v1/dvpa/reload", b"", KEY))
            assert status(answer) == 409 and str(tmp_path).encode() not in answer
        assert world.engine.policy.tier_map.thresholds == (0.1, 0.4)
        assert world.complete(max_tokens=2)["usage"]["dvpa"]["thresholds"] == [0.1, 0.4]
