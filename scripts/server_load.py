"""What the server's benchmarks share: a server in a process of its own, and a thin client.

Standard library only: the client shares the machine with the server it loads, so it keeps the bytes
as they come and reads them when the clock has stopped.
"""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
START_SECONDS = 180.0  # until a server must be ready
STREAMING = {"stream": True, "stream_options": {"include_usage": True}}
CHUNK = 1 << 16


@dataclass
class Answer:
    """What came back for one request."""

    status: int = 0  # 0: no status line arrived
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False  # everything that the server meant to send is here
    has_left: bool = False  # the client closed the connection first
    error: str | None = None  # of the connection
    started: float = 0.0
    times: list[float] = field(default_factory=list)  # of each read, the first one's included

    def take(self, raw: bytes) -> None:
        """Read the bytes of a whole connection, as far as they came."""
        head, separator, body = raw.partition(b"\r\n\r\n")
        if not separator:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split(" ", 2)[1])
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if self.headers.get("transfer-encoding") == "chunked":
            self.body, self.is_whole = dechunk(body)
        else:
            self.body = body
            self.is_whole = len(body) == int(self.headers.get("content-length", -1))

    @property
    def is_stream(self) -> bool:
        """Whether the body is server-sent events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    def json(self) -> Any:
        """The body of an answer that is no stream."""
        return json.loads(self.body)

    @property
    def data(self) -> list[str]:
        """Whole events of a stream, in order, the closing `[DONE]` too."""
        blocks = self.body.replace(b"\r\n", b"\n").split(b"\n\n")[:-1]
        lines = (line for block in blocks for line in block.decode().split("\n"))
        return [line[5:].strip() for line in lines if line.startswith("data:")]

    @property
    def events(self) -> list[dict[str, Any]]:
        """The stream's events without `[DONE]`."""
        return [json.loads(line) for line in self.data if line != "[DONE]"]

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Events of a stream, or the one answer."""
        return self.events if self.is_stream else [self.json()]

    @property
    def choices(self) -> list[dict[str, Any]]:
        """All choices of all parts."""
        return [choice for part in self.parts for choice in part.get("choices", ())]

    @property
    def finish_reasons(self) -> list[str]:
        """One for each completion that ended."""
        return [c["finish_reason"] for c in self.choices if c.get("finish_reason")]

    @property
    def text(self) -> str:
        """The text of /v1/completions, all choices together."""
        return "".join(choice.get("text") or "" for choice in self.choices)

    @property
    def completion_tokens(self) -> int:
        """As the server counted them; 0 if it did not say."""
        usages = [part["usage"] for part in self.parts if part.get("usage")]
        return int(usages[-1]["completion_tokens"]) if usages else 0

    @property
    def is_truncated(self) -> bool:
        """Whether it began well, and stopped before its end without our doing."""
        if self.status != 200 or self.has_left:
            return False
        is_done = not self.is_stream or self.data[-1:] == ["[DONE]"]
        return not (self.is_whole and is_done and self.finish_reasons)


def dechunk(body: bytes) -> tuple[bytes, bool]:
    """The content of a chunked body, and whether its last chunk is there."""
    content, at = bytearray(), 0
    while (end := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:end].split(b";")[0], 16)
        if size == 0:
            return bytes(content), True
        content += body[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
    return bytes(content), False


async def post(
    port: int,
    path: str,
    body: Mapping[str, Any],
    *,
    leave_after: int | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> Answer:
    """Send one request on a connection of its own and read until the server closes it.

    `leave_after`: cut the connection once so many events have come.
    """
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {HOST}:{port}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    message = "\r\n".join([*lines, "", ""]).encode("latin-1") + content
    answer = Answer(started=time.perf_counter())
    raw, num_events = bytearray(), 0
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(message)
            while data := await reader.read(CHUNK):
                answer.times.append(time.perf_counter())
                raw += data
                if leave_after is not None:
                    num_events += data.count(b"data:")
                    if num_events >= leave_after:
                        answer.has_left = True
                        writer.transport.abort()
                        break
    except (OSError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        if writer is not None:
            writer.close()
    answer.take(bytes(raw))
    return answer


def fetch(
    port: int, path: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 10.0
) -> tuple[int, bytes]:
    """Status and body of a GET.

    Raises:
        OSError, http.client.HTTPException: no answer.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


class Server:
    """`dvpa serve` on loopback, in a process of its own; its log is `log`.

    Args:
        checkpoint: the folder it serves.
        folder: where its settings and its log go.
        threads: OpenMP threads.
        settings: of `ServeConfig`.
    """

    def __init__(self, checkpoint: Path, folder: Path, threads: int = 1, **settings: Any) -> None:
        self.port = int(settings.pop("port", 0) or free_port())
        self.log = folder / "server.log"
        settings = {"host": HOST, "port": self.port, "threads": threads, **settings}
        config = folder / "serve.yaml"
        config.write_text(json.dumps(settings))  # JSON is YAML
        command = ["-m", "dvpa", "serve", str(checkpoint), "--config", str(config)]
        self._command = [sys.executable, *command]
        roots = map(str, (ROOT, ROOT / "train", ROOT / "kernels"))
        self._environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(roots),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Seconds from the start of the process until it is ready.

        Raises:
            RuntimeError: it ended or took too long; the message is the end of its log.
        """
        start = time.perf_counter()
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=stream, stderr=stream
            )
        while time.perf_counter() - start < START_SECONDS:
            if self.process.poll() is not None:
                raise RuntimeError(f"exit code {self.process.returncode}: {self.last_line()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if fetch(self.port, "/ready")[0] == 200:
                    return time.perf_counter() - start
            time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"not ready after {START_SECONDS:g} seconds: {self.last_line()}")

    def last_line(self) -> str:
        """The end of the log."""
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return lines[-1][:300]

    @property
    def pid(self) -> int:
        """The running process's id."""
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 120.0) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: it has none yet.
        """
        assert self.process is not None
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """kill -9, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """End it as an operator would; the exit code."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait()
        finally:
            self.kill()

    def cpu_seconds(self) -> float:
        """CPU time that the process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self) -> float:
        """Memory of the process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name, labels as they are written."""
        status, body = fetch(self.port, "/metrics")
        if status != 200:
            raise RuntimeError(f"/metrics: status {status}")
        lines = (line for line in body.decode().splitlines() if line and line[0] != "#")
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def total(metrics: Mapping[str, float], name: str, label: str = "") -> float:
    """Sum of a metric's samples whose labels hold `label`, as `reason="queue_full"`."""
    return sum(
        value
        for sample, value in metrics.items()
        if sample.partition("{")[0] == name and label in sample
    )
