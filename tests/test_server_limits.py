"""Bodies that are too large, too slow or no JSON; clients that stall; paths that lead elsewhere."""

import json
import socket
import time
from collections.abc import Iterator

import pytest
from server_world import (
    ENDLESS,
    QUESTION,
    Reply,
    World,
    body_of,
    get_bytes,
    post_bytes,
    read_all,
    serving,
    status,
    until,
)

from dvpa.server import generation

MAX_BODY = 20_000


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with serving(max_body_bytes=MAX_BODY) as world:
        yield world


@pytest.fixture(scope="module")
def tight() -> Iterator[World]:
    """Impatient."""
    with serving(header_timeout_s=0.4, body_timeout_s=0.4) as world:
        yield world


# -- bodies -------------------------------------------------------------------------------------


def test_a_declared_size_is_refused_before_it_is_sent(world: World) -> None:
    request = post_bytes("/v1/completions", b"").replace(
        b"content-length: 0", b"content-length: " + str(MAX_BODY + 1).encode()
    )
    answer = world.raw(request)
    assert status(answer) == 413 and b'"code":"too_large"' in answer
    assert b"connection: close" in answer.lower()


def test_a_chunked_body_is_refused_when_it_grows_too_large(world: World) -> None:
    head = post_bytes("/v1/completions", b"").replace(
        b"content-length: 0", b"transfer-encoding: chunked"
    )
    chunk = b"%x\r\n" % 5000 + b" " * 5000 + b"\r\n"
    with world.connect() as connection:
        connection.sendall(head + chunk * (MAX_BODY // 5000) + chunk)
        assert status(read_all(connection)) == 413
    rejected = world.metrics()['dvpa_requests_rejected_total{reason="too_large"}']
    assert rejected >= 1


def test_the_largest_body_is_taken(world: World) -> None:
    content = body_of()
    content += b" " * (MAX_BODY - len(content))
    assert status(world.raw(post_bytes("/v1/completions", content))) == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}",
        b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}",
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"}",
        b"\x1f\x8b\x08" + b"\x00" * 50,
    ],
)
def test_a_body_that_is_no_request_is_a_bad_request(world: World, content: bytes) -> None:
    answer = world.raw(post_bytes("/v1/completions", content))
    assert status(answer) == 400
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_forms_of_other_sites_are_not_taken(tight: World) -> None:
    """What a page elsewhere can make a browser send without asking first."""
    steps = tight.engine.num_steps
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        request = post_bytes("/v1/completions", body_of()).replace(
            b"application/json", kind.encode()
        )
        assert 400 <= status(tight.raw(request)) < 500
    assert tight.engine.num_steps == steps


# -- slow clients -------------------------------------------------------------------------------


def drip(connection: socket.socket, data: bytes) -> tuple[bytes, float]:
    """Send a byte every 50 ms until the server has enough; what it said, and after how long."""
    start = time.monotonic()
    connection.settimeout(0.05)
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            found = connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            found = b""
        return found, time.monotonic() - start
    raise AssertionError("the server waits on")


def test_slow_heads_are_cut_off_and_hold_nobody_up(tight: World) -> None:
    silent = [tight.connect() for _ in range(50)]
    for request in (get_bytes("/health"), post_bytes("/v1/completions", body_of())):
        with tight.connect() as connection:
            found, took = drip(connection, request)
        assert found == b"" and 0.3 < took < 5
        assert status(tight.raw(get_bytes("/health"))) == 200
    for connection in silent:
        assert read_all(connection) == b"", "not a byte in time"
        connection.close()
    until(lambda: not tight.process.server_state.connections, "all connections closed")


def test_a_slow_body_is_cut_off(tight: World) -> None:
    request = post_bytes("/v1/completions", body_of())
    head, separator, content = request.partition(b"\r\n\r\n")
    with tight.connect() as connection:
        connection.sendall(head + separator)
        found, took = drip(connection, content)
    assert status(found) == 408 and took < 5
    assert b"connection: close" in found.lower()


def test_a_slow_second_request_is_cut_off_too(tight: World) -> None:
    with tight.connect() as connection:
        connection.sendall(get_bytes("/health").replace(b"connection: close\r\n", b""))
        found = connection.recv(65536)
        assert status(found) == 200
        while not found.endswith(b'{"status":"ok"}'):  # the body may come by itself
            found += connection.recv(65536)
        found, took = drip(connection, get_bytes("/health"))
        assert found == b"" and took < 5


def test_connections_are_bounded_and_come_free_again() -> None:
    with serving(max_connections=4, header_timeout_s=1.0) as world:
        silent = [world.connect() for _ in range(10)]  # twice as many as requests may be
        until(lambda: len(world.process.server_state.connections) == 10, "ten connections")
        assert status(world.raw(get_bytes("/health"))) == 503
        for connection in silent:
            assert read_all(connection) == b""
            connection.close()
        assert status(world.raw(get_bytes("/health"))) == 200


def test_requests_are_bounded_but_not_health() -> None:
    with serving(max_connections=2, retry_after_s=3) as world:
        body = {"prompt": QUESTION, **ENDLESS, "stream": True}
        running = [Reply(world.port, "/v1/completions", body, {}).first() for _ in range(2)]
        with world.http() as client:
            refused = client.get("/v1/models")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "3")
            assert refused.json()["error"]["code"] == "too_many"
            assert client.get("/health").status_code == 200
        for reply in running:
            reply.leave()
        world.idle()


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SEND_TIMEOUT_S", 0.5)
    with serving() as world, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", world.port))
        body = {"prompt": QUESTION, **ENDLESS, "n": 4, "logprobs": 20, "stream": True}
        connection.sendall(post_bytes("/v1/completions", json.dumps(body).encode()))
        until(lambda: world.engine.has_work, "a start")
        world.idle()
        assert world.engine.num_steps < ENDLESS["max_tokens"], "cancelled, not finished"


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../config.py",
        "..%2fconfig.py",
        "%2e%2e/config.py",
        "%2e%2e%2fconfig.py",
        "..%252fconfig.py",
        "....//config.py",
        "..\\config.py",
        "..%5cconfig.py",
        "a/../../config.py",
        "/etc/passwd",
        "//etc/passwd",
        "%2fetc%2fpasswd",
        "../" * 12 + "etc/passwd",
        "..%2f" * 12 + "etc/passwd",
        "index.html%00.js",
        "",
        ".",
    ],
)
def test_no_path_leads_out_of_the_static_folder(world: World, path: str) -> None:
    answer = world.raw(get_bytes(f"/static/{path}"))
    assert status(answer) in (400, 401, 404)
    for content in (b"ServeConfig", b"root:", b"Traceback"):
        assert content not in answer


def test_static_files_are_there(world: World) -> None:
    answer = world.raw(get_bytes("/static/dashboard.js"))
    assert status(answer) == 200 and b"javascript" in answer
    assert status(world.raw(get_bytes("/static/dashboard.js", method="POST"))) in (401, 405)
