"""What docs/scaling.md promises of nginx in front of several servers, and of the routing script.

Real nginx, real `dvpa serve` processes, all on loopback.
"""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from server_world import (
    ENDLESS,
    ROOT,
    Process,
    Reply,
    events,
    finish_reasons,
    parse_metrics,
    until,
)

from dvpa.server.ray_app import free_port

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
CONFIG = ROOT / "configs/serve/nginx.conf"
GUIDE = ROOT / "docs/scaling.md"
SESSION = "x-dvpa-session-id"


class Nginx:
    """nginx with our file and other ports."""

    def __init__(self, folder: Path, ports: tuple[int, int]) -> None:
        self.port, text = free_port("127.0.0.1"), CONFIG.read_text()
        for there, here in zip((8001, 8002, 8080), (*ports, self.port), strict=True):
            assert f"127.0.0.1:{there}" in text
            text = text.replace(f"127.0.0.1:{there}", f"127.0.0.1:{here}")
        (folder / "dvpa.conf").write_text(text)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        self._main = folder / "nginx.conf"
        self._main.write_text(
            ("user root;\n" if os.geteuid() == 0 else "")
            + f"daemon off; worker_processes 2; pid {folder}/nginx.pid; error_log stderr;\n"
            + "events {}\nhttp {\naccess_log off;\n"
            + "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
            + f"include {folder}/dvpa.conf;\n}}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None

    def check(self) -> subprocess.CompletedProcess[str]:
        """`nginx -t`."""
        command = [str(NGINX), "-t", "-c", str(self._main)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)

    def start(self) -> "Nginx":
        """Until it listens."""
        self._process = subprocess.Popen([str(NGINX), "-c", str(self._main)])
        until(lambda: self.get("/nowhere")[0] == 404, "nginx")
        return self

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; 0 where nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with suppress(ConnectionRefusedError):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        return 0, b""

    def send(self, **body: Any) -> http.client.HTTPConnection:
        """Send a completion's request, whose answer nobody reads."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        text = json.dumps({"prompt": "what", **body})
        connection.request("POST", "/v1/completions", text, {"content-type": "application/json"})
        return connection

    def complete(self, headers: dict[str, str] | None = None, **body: Any) -> Reply:
        """Begin a completion."""
        body = {"prompt": "what is 1 + 1 ?", "temperature": 0, **body}
        return Reply(self.port, "/v1/completions", body, headers or {})


@contextmanager
def pair(folder: Path) -> Iterator[tuple[Nginx, list[Process]]]:
    """Two dvpa servers that requests are let into, and nginx in front of them."""
    servers: list[Process] = []
    nginx: Nginx | None = None
    try:
        for name in ("one", "two", "nginx"):
            (folder / name).mkdir()
        servers += [Process(folder / name, engine={"max_queue": 8}) for name in ("one", "two")]
        for server in servers:
            server.ready()
        nginx = Nginx(folder / "nginx", (servers[0].port, servers[1].port)).start()
        yield nginx, servers
    finally:
        if nginx is not None:
            nginx.stop()
        for server in servers:
            server.kill()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nginx, list[Process]]]:
    """For tests that leave the servers as they found them."""
    with pair(tmp_path_factory.mktemp("kept")) as found:
        yield found


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[Nginx, list[Process]]]:
    """For tests that end a server."""
    with pair(tmp_path) as found:
        yield found


def metrics(server: Process) -> dict[str, float]:
    return parse_metrics(server.get("/metrics")[1].decode())


def num_running(server: Process) -> int:
    return int(metrics(server)["dvpa_num_requests_running"])


def num_requests(server: Process) -> int:
    total: int = json.loads(server.get("/v1/dvpa/telemetry?limit=0")[1])["requests_total"]
    return total


@needs_nginx
def test_nginx_accepts_the_file(tmp_path: Path) -> None:
    done = Nginx(tmp_path, (8001, 8002)).check()
    assert done.returncode == 0, done.stderr


def test_the_guide_names_files_and_settings_that_exist() -> None:
    text = GUIDE.read_text()
    for path in re.findall(r"(?:configs|scripts|docs|tests)/[\w/.-]+\.\w+", text):
        assert (ROOT / path).is_file(), path
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        assert list(yaml.safe_load_all(block))


@pytest.mark.slow
@needs_nginx
def test_streams_pass_through_as_they_come(kept: tuple[Nginx, list[Process]]) -> None:
    nginx, servers = kept
    reply = nginx.complete(stream=True, **ENDLESS).first()
    assert reply.status == 200 and reply.headers["x-dvpa-tier"] in ("base", "middle", "top")
    reply.leave()
    for server in servers:  # leaving nginx leaves the server behind it
        until(lambda server=server: num_running(server) == 0, "an end of the request")
    parts = events(nginx.complete(stream=True, max_tokens=20, min_tokens=20).rest())
    assert finish_reasons(parts) == ["length"] and len(parts) >= 20


@pytest.mark.slow
@needs_nginx
def test_requests_are_spread_and_sessions_are_not(kept: tuple[Nginx, list[Process]]) -> None:
    nginx, servers = kept
    streams = [nginx.complete(stream=True, **ENDLESS).first() for _ in range(6)]
    assert [num_running(server) for server in servers] == [3, 3], "the least busy server is asked"
    for stream in streams:
        stream.leave()
    for server in servers:
        until(lambda server=server: num_running(server) == 0, "an end of the requests")
    before = [num_requests(server) for server in servers]
    for _ in range(8):
        assert nginx.complete({SESSION: "alice"}, max_tokens=1).rest()
    gained = [num_requests(s) - old for s, old in zip(servers, before, strict=True)]
    assert sorted(gained) == [0, 8], "a session has its server"


@pytest.mark.slow
@needs_nginx
def test_only_what_clients_need_is_open(kept: tuple[Nginx, list[Process]]) -> None:
    nginx, _ = kept
    assert nginx.get("/v1/models")[0] == 200 and nginx.get("/ready")[0] == 200
    for path in ("/metrics", "/v1/dvpa/telemetry", "/v1/dvpa/reload", "/", "/openapi.json"):
        status, body = nginx.get(path)
        assert status == 404 and json.loads(body)["error"]["code"] == "not_found"
    too_large = nginx.complete(prompt="x" * (2**20 + 1))
    assert too_large.status == 413
    assert json.loads(too_large.rest())["error"]["code"] == "request_too_large"


@pytest.mark.slow
@needs_nginx
def test_a_server_that_drains_is_not_noticed(own: tuple[Nginx, list[Process]]) -> None:
    """SIGTERM under load: every answer is whole, nobody sees an error."""
    nginx, servers = own
    statuses: list[int] = []
    failures: list[BaseException] = []
    is_over = threading.Event()

    def client() -> None:
        try:
            while not is_over.is_set():
                reply = nginx.complete(stream=True, max_tokens=40, min_tokens=40)
                statuses.append(reply.status)
                assert finish_reasons(events(reply.rest())) == ["length"]
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=client) for _ in range(6)]
    for thread in clients:
        thread.start()
    until(lambda: len(statuses) > 20)
    servers[0].signal(signal.SIGTERM)
    assert servers[0].wait() == 0, servers[0].log
    seen = len(statuses)
    until(lambda: len(statuses) > seen + 20)
    is_over.set()
    for thread in clients:
        thread.join(60)
    assert failures == [] and set(statuses) == {200}


@pytest.mark.slow
@needs_nginx
def test_a_server_that_dies_ends_its_streams_and_nothing_else(
    own: tuple[Nginx, list[Process]],
) -> None:
    nginx, servers = own
    streams = [nginx.complete(stream=True, **ENDLESS).first() for _ in range(4)]
    servers[0].kill()
    broken = 0
    for stream in streams:
        try:
            broken += b"[DONE]" not in stream.rest()
        except (http.client.IncompleteRead, ConnectionError):
            broken += 1
    assert broken == 2, "those of the server that died, and they do not look finished"
    for _ in range(8):
        assert nginx.complete(max_tokens=2).rest()
    servers[1].kill()
    time.sleep(0.2)
    reply = nginx.complete(max_tokens=2)
    assert reply.status == 503 and reply.headers["retry-after"] == "2"
    assert json.loads(reply.rest())["error"]["code"] == "unavailable"


@pytest.mark.slow
@needs_nginx
def test_busy_servers_say_so_themselves(kept: tuple[Nginx, list[Process]]) -> None:
    """429 with Retry-After comes from the servers, and being busy takes none of them out."""
    nginx, servers = kept
    waiting = []
    for _ in range(32):  # 2 x (8 run + 8 wait)
        waiting.append(nginx.send(stream=True, **ENDLESS))
        time.sleep(0.05)
    for _ in range(8):
        reply = nginx.complete(max_tokens=1)
        assert reply.status == 429 and reply.headers["retry-after"] == "1"
        assert json.loads(reply.rest())["error"]["code"] == "queue_full"
    for connection in waiting:
        connection.close()
    for server in servers:
        until(lambda server=server: num_running(server) == 0, "an end of the requests")
    assert [nginx.complete(max_tokens=1).status for _ in range(4)] == [200] * 4


@pytest.mark.slow
@needs_nginx
def test_the_script_lets_one_server_decide_and_another_answer(
    kept: tuple[Nginx, list[Process]], tmp_path: Path
) -> None:
    _, servers = kept
    router, (first, second) = Process(tmp_path).ready(), servers
    try:
        urls = {name: f"http://127.0.0.1:{first.port}" for name in ("base", "middle")}
        urls["top"] = f"http://127.0.0.1:{second.port}"
        command = [sys.executable, str(ROOT / "scripts/route_to_vllm.py"), "--max-tokens", "4"]
        command += ["--router", f"http://127.0.0.1:{router.port}"]
        for name, url in urls.items():
            command += ["--tier", f"{name}={url}"]
        seen = set()
        for text in ("what is 1 + 1 ?", "sort the words", "say something nice", "what", "the"):
            route = httpx.post(
                f"http://127.0.0.1:{router.port}/v1/dvpa/route",
                json={"messages": [{"role": "user", "content": text}]},
                trust_env=False,
            ).json()
            before = [num_requests(server) for server in servers]
            done = subprocess.run([*command, text], capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            gained = [num_requests(s) - old for s, old in zip(servers, before, strict=True)]
            assert gained == ([0, 1] if route["tier_name"] == "top" else [1, 0])
            assert f"[{route['tier_name']}: " in done.stdout
            seen.add(route["tier_name"])
        assert len(seen) > 1 and num_requests(router) == 0
    finally:
        router.kill()
