"""Real servers on loopback: uvicorn in a thread of the test, or `dvpa serve` in its own process.

The model is random and tiny, its tokenizer is trained on a few lines, its tier map uses every tier.
"""

import http.client
import json
import logging
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch

from dvpa.config import load_model_config
from dvpa.engine import Engine, EngineConfig
from dvpa.model import DvpaForCausalLM
from dvpa.server.app import create_app
from dvpa.server.backend import LocalBackend
from dvpa.server.config import ServeConfig
from dvpa.server.main import ServerProcess
from dvpa.tasks.tokenizer import train_tokenizer
from dvpa.tiers import TierMap

ROOT = Path(__file__).resolve().parent.parent
NAME = "tiny"
QUESTION = "what is 1 + 1 ?"
TIERS = ("base", "middle", "top")
CONTEXT = 4096  # long enough for a request that does not end by itself during a test
EOS = 2
BYTES = slice(4, 260)  # ids of the byte tokens
ENGINE = {"max_num_seqs": 8, "page_size": 8}
ENDLESS = {"max_tokens": 3000, "logit_bias": {str(EOS): -100}}
PATIENCE_S = 120.0  # a machine that others use is slow to start a process
T = TypeVar("T")


def make_map(*cuts: float) -> TierMap:
    """A tier map that compares the raw difficulty with cuts, with calibrated success curves."""
    curves = tuple(((0.0, 1.0), (high, 0.1)) for high in (0.7, 0.8, 0.9))
    return TierMap("threshold", TIERS, (1.0, 2.0, 3.0), 2, cuts, calibration=curves)


def write_checkpoint(folder: Path) -> Path:
    """A random checkpoint with tokenizer and tier map; the same one every time."""
    lines = ["what is 1 + 1 ?", "sort the words", "say something nice"] * 20
    tokenizer = train_tokenizer(lines, 300, folder)
    config = load_model_config(ROOT / "configs/model/pico.yaml")
    config.initializer_range = 0.2  # lively logits
    config.max_position_embeddings = CONTEXT
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = DvpaForCausalLM(config).eval()
    with torch.no_grad():  # it says words rather than bytes, most of which are no text
        model.get_input_embeddings().weight[BYTES].mul_(0.1)
    model.tier_map = make_map(0.2, 0.3)
    model.save_pretrained(folder)
    return folder


@cache
def _keep() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="dvpa-server-")


@cache
def checkpoint() -> Path:
    """One checkpoint for all tests of a session; nobody may write to it."""
    return write_checkpoint(Path(_keep().name) / NAME)


def until(done: Callable[[], T], what: str = "it") -> T:
    """The first true result."""
    end = time.monotonic() + PATIENCE_S
    while not (found := done()):
        assert time.monotonic() < end, f"{what} did not happen within {PATIENCE_S:g} seconds"
        time.sleep(0.01)
    return found


class World:
    """A server that listens; `engine` and `app` are within reach."""

    def __init__(self, config: ServeConfig, tier_map_file: Path | None = None) -> None:
        self.config = config
        self.engine = Engine(checkpoint(), config=config.engine)
        self.backend = LocalBackend(self.engine, config.model_name or NAME)
        self.app = create_app(self.backend, config, tier_map_file=tier_map_file)
        listening = queue.Queue[str]()
        self.process = ServerProcess(self.app, config, listening.put)
        self._thread = threading.Thread(target=self.process.run, daemon=True)
        self._thread.start()
        self.url = listening.get(timeout=PATIENCE_S)
        self.port = int(self.url.rsplit(":", 1)[1])

    @property
    def key(self) -> str | None:
        """A key that opens the server."""
        return self.config.api_keys[0] if self.config.api_keys else None

    def http(self, **more: Any) -> httpx.Client:
        """A client with the key, if there is one. No proxy of the environment's."""
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        given = {"timeout": PATIENCE_S, "trust_env": False, "headers": headers, **more}
        return httpx.Client(base_url=self.url, **given)

    def complete(self, **body: Any) -> dict[str, Any]:
        """The answer of /v1/completions, which must be a good one."""
        with self.http() as client:
            answer = client.post("/v1/completions", json={"prompt": QUESTION, **body})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name and labels."""
        with self.http() as client:
            return parse_metrics(client.get("/metrics").text)

    def raw(self, data: bytes, timeout_s: float = PATIENCE_S) -> bytes:
        """Send bytes as they are; what comes until the server closes or nothing comes any more."""
        with self.connect(timeout_s) as connection:
            connection.sendall(data)
            return read_all(connection)

    def begin(self, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
        """Send a request whose answer is not awaited."""
        connection = self.connect()
        connection.sendall(post_bytes(path, json.dumps(body).encode(), self.key))
        return connection

    def connect(self, timeout_s: float = PATIENCE_S) -> socket.socket:
        """A connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)

    @contextmanager
    def slowly(self, seconds: float) -> Iterator[None]:
        """Every pass of the engine takes so much longer."""
        run = self.engine.runner.run

        def slow(segments: Any) -> Any:
            time.sleep(seconds)
            return run(segments)

        self.engine.runner.run = slow  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.engine.runner.run = run  # type: ignore[method-assign]

    def idle(self) -> None:
        """Wait until nothing runs and no page is held."""
        until(
            lambda: not self.engine.has_work and self.engine.pages.num_held == 0, "an idle engine"
        )

    def close(self) -> None:
        """End the server and everything it runs."""
        self.process.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the server did not end"


@contextmanager
def serving(tier_map_file: Path | None = None, **settings: Any) -> Iterator[World]:
    """A server in a thread; `settings` are `ServeConfig`'s, engine settings a mapping."""
    engine = EngineConfig(**{**ENGINE, **settings.pop("engine", {})})
    config = ServeConfig(port=0, engine=engine, **settings)
    world = World(config, tier_map_file)
    try:
        yield world
    finally:
        world.close()


class Process:
    """`dvpa serve` in a process of its own, for signals. `log` is what it has written so far."""

    def __init__(
        self, folder: Path, model: Path | None = None, key: str | None = None, **settings: Any
    ) -> None:
        self.folder, self.model = folder, model or checkpoint()
        self.headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._log = folder / "server.log"
        config = folder / "serve.yaml"
        engine = {**ENGINE, **settings.pop("engine", {})}
        settings = {"port": 0, "threads": 1, "model_name": NAME, **settings, "engine": engine}
        config.write_text(json.dumps(settings))  # JSON is YAML
        command = [sys.executable, "-m", "dvpa", "serve", str(self.model), "--config", str(config)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "train", ROOT / "kernels"))),
            "COLUMNS": "500",  # the line with the address must not be broken
            "DVPA_API_KEYS": key or "",
        }
        with self._log.open("ab") as stream:
            start = len(self.log)
            self.process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=stream, cwd=folder
            )
        self.port = int(until(lambda: self._address(start), "an address").rsplit(":", 1)[1])

    def _address(self, start: int) -> str | None:
        assert self.process.poll() is None, self.log
        found = re.search(r"http://[\d.]+:\d+", self.log[start:])
        return found and found[0]

    @property
    def log(self) -> str:
        """Standard output and error."""
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request("GET", path, headers=self.headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def ready(self) -> "Process":
        """Wait until requests are let in."""

        def is_ready() -> bool:
            with suppress(OSError):
                return self.get("/ready")[0] == 200
            return False

        until(is_ready, "readiness")
        return self

    def post(self, path: str, **body: Any) -> "Reply":
        """Begin a request; the answer is read from the reply."""
        return Reply(self.port, path, body, self.headers)

    def ask(self, **body: Any) -> str:
        """The greedy text of a completion."""
        reply = self.post("/v1/completions", **{"prompt": QUESTION, "temperature": 0, **body})
        answer = json.loads(reply.rest())
        assert reply.status == 200, answer
        text: str = answer["choices"][0]["text"]
        return text

    def signal(self, number: signal.Signals) -> None:
        """Send it."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """kill -9, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Reply:
    """An answer that is read bit by bit."""

    def __init__(self, port: int, path: str, body: Any, headers: dict[str, str]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        headers = {"content-type": "application/json", **headers}
        self._connection.request("POST", path, json.dumps(body), headers)
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = self._response.headers
        self._begun = b""

    def first(self) -> "Reply":
        """Wait for the first line of the body."""
        self._begun = self._response.readline()
        assert self._begun, "the answer is empty"
        return self

    def rest(self) -> bytes:
        """The whole body. http.client.IncompleteRead if its end is missing."""
        try:
            return self._begun + self._response.read()
        finally:
            self._connection.close()

    def leave(self) -> None:
        """Close the connection, whatever is still to come."""
        self._connection.close()
        self._response.close()


def post_bytes(path: str, content: bytes, key: str | None = None, *headers: str) -> bytes:
    """A POST as it goes over the wire; the server closes the connection after it."""
    lines = [
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "connection: close",
        "content-type: application/json",
        f"content-length: {len(content)}",
        *([] if key is None else [f"authorization: Bearer {key}"]),
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def get_bytes(target: str, *headers: str, method: str = "GET") -> bytes:
    """A request without a body as it goes over the wire."""
    lines = [f"{method} {target} HTTP/1.1", "host: localhost", "connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def body_of(**changes: Any) -> bytes:
    """The content of a short request to /v1/completions."""
    return json.dumps({"prompt": QUESTION, "max_tokens": 4, **changes}).encode()


def status(answer: bytes) -> int:
    """Of an answer as it came over the wire; 0: there is none."""
    return int(answer.split(b" ", 2)[1]) if answer else 0


def events(body: bytes) -> list[dict[str, Any]]:
    """Server-sent events of a whole stream, which must end with [DONE]."""
    lines = [line for line in body.replace(b"\r\n", b"\n").split(b"\n") if line[:5] == b"data:"]
    data = [line[5:].strip() for line in lines]
    assert data and data[-1] == b"[DONE]", data[-2:]
    return [json.loads(line) for line in data[:-1]]


def finish_reasons(parts: list[dict[str, Any]]) -> list[str]:
    """One for each completion of a stream that ended."""
    choices = [choice for part in parts for choice in part["choices"]]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def read_all(connection: socket.socket) -> bytes:
    """What comes until the connection is closed; TimeoutError if it is not."""
    parts = []
    with suppress(ConnectionResetError):
        while data := connection.recv(65536):
            parts.append(data)
    return b"".join(parts)


def parse_metrics(text: str) -> dict[str, float]:
    """Samples in Prometheus' text format by name and labels."""
    lines = (line.rpartition(" ") for line in text.splitlines() if line and line[0] != "#")
    return {name: float(value) for name, _, value in lines}


@contextmanager
def all_logs() -> Iterator[list[str]]:
    """Everything that any logger writes meanwhile, formatted, tracebacks included; clients' not."""
    lines: list[str] = []
    formatter = logging.Formatter("%(name)s %(levelname)s %(message)s")

    class Catch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.split(".")[0] not in ("httpx", "httpcore", "httpx2", "httpcore2"):
                lines.append(formatter.format(record))

    handler = Catch(logging.DEBUG)
    loggers = [logging.getLogger(name) for name in (None, "uvicorn", "uvicorn.error", "dvpa")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    # uvicorn's own loggers do not propagate.
    for logger in loggers[:2]:
        logger.addHandler(handler)
    try:
        yield lines
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for logger in loggers[:2]:
            logger.removeHandler(handler)
