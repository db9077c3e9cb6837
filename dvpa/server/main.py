"""`run`: one server process. Listens first, loads the model behind it, drains on SIGTERM.

SIGTERM, SIGINT   let in nobody, finish what runs (at most `drain_s`), then exit; twice: at once
SIGHUP            read tier_map.json again; a file that is not sound changes nothing
"""

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dvpa.engine import Engine
from dvpa.model.causal_lm import TIER_MAP_FILE
from dvpa.server.app import create_app
from dvpa.server.backend import Backend, LocalBackend
from dvpa.server.config import ServeConfig
from dvpa.server.errors import ApiError
from dvpa.server.lifecycle import FAILED, Server
from dvpa.server.reports import find_report
from dvpa.server.telemetry import access_logger
from dvpa.tiers.tier_map import TierMap

logger = logging.getLogger(__name__)
KEEP_ALIVE_S = 5
# The engine's thread computes in Python between its kernels: with CPython's 5 ms the event loop
# would wait that long for the interpreter each time that it has waited for the network.
SWITCH_S = 0.0005
MAX_HEADER_BYTES = 2**16


def run(
    checkpoint: Path,
    config: ServeConfig,
    on_listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a checkpoint until a signal ends it.

    `on_listening` is told the address once connections are accepted (the model may still load).

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one that is not sound.
        OSError: the address cannot be had.
    """
    report = find_report(checkpoint, config.report)
    tier_map_file = checkpoint / TIER_MAP_FILE
    if tier_map_file.is_file():
        TierMap.load(tier_map_file)  # before anything heavy
    app = create_app(
        config=config,
        tier_map_file=tier_map_file,
        on_startup=lambda server: process.load(
            server, partial(load_backend, checkpoint, config, report)
        ),
    )
    log_to_stderr(config.access_log)
    sys.setswitchinterval(SWITCH_S)
    process = ServerProcess(app, config, on_listening)
    process.run()
    if process.failure is not None:
        raise process.failure


def log_to_stderr(access_log: bool) -> None:
    """The access log's lines as they are, and our own warnings, each on a line."""
    plain = logging.StreamHandler()
    plain.setFormatter(logging.Formatter("%(message)s"))
    access_logger.handlers = [plain] if access_log else []
    access_logger.setLevel(logging.INFO)
    access_logger.propagate = False
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def load_backend(checkpoint: Path, config: ServeConfig, report: Path | None) -> Backend:
    """The engine over the checkpoint; takes as long as the weights take."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    engine = Engine(checkpoint, dtype=config.dtype, config=config.engine)
    return LocalBackend(engine, config.model_name or checkpoint.resolve().name, report)


class ServerProcess(uvicorn.Server):
    """uvicorn, with a drain in front of its shutdown."""

    def __init__(self, app: Any, config: ServeConfig, on_listening: Callable[[str], None]) -> None:
        protocol = type("Protocol", (_Protocol,), {"header_timeout_s": config.header_timeout_s})
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                http=protocol,
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                # Idle connections count here, too; requests are counted, and refused, by `Limits`.
                limit_concurrency=2 * config.max_connections,
                timeout_keep_alive=KEEP_ALIVE_S,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                # Ours has waited already; what is left then is cancelled.
                timeout_graceful_shutdown=KEEP_ALIVE_S,
            )
        )
        self.failure: BaseException | None = None
        self._state: Server = app.state.server
        self._on_listening = on_listening
        self._drain: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def load(self, server: Server, make: Callable[[], Backend]) -> None:
        """Load the model in a thread; if that fails, the process ends with the error."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._loading = asyncio.ensure_future(self._load(server, make))

    async def startup(self, sockets: Any = None) -> None:
        """Bind, then say where."""
        try:
            await super().startup(sockets)
        except SystemExit:  # uvicorn's way of saying that the address cannot be had
            raise OSError(
                f"host, port: cannot listen on {self.config.host}:{self.config.port}"
            ) from None
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._on_listening(f"http://{shown}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: at once."""
        if self._loop is None or self._drain is not None:
            super().handle_exit(sig, frame)
            return
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        logger.warning("draining: %d requests are being answered", self._state.num_active)
        is_clean = await self._state.drain()
        if not is_clean:
            logger.warning("drained for %g s: the rest was cancelled", self._state.config.drain_s)
        self.should_exit = True

    async def _load(self, server: Server, make: Callable[[], Backend]) -> None:
        try:
            backend = await asyncio.to_thread(make)
        except Exception as error:
            self.failure, server.state = error, FAILED
            self.should_exit = True
            return
        server.ready(backend)
        logger.info("ready")

    def _reload(self) -> None:
        asyncio.ensure_future(self._reload_tier_map())  # noqa: RUF006  ends by itself

    async def _reload_tier_map(self) -> None:
        try:
            tier_map = await self._state.reload_tier_map()
        except ApiError as error:
            logger.error("SIGHUP: %s", error.message)
        else:
            logger.warning("SIGHUP: tier map reloaded (%s)", tier_map.kind)


class _Protocol(H11Protocol):
    """Closes a connection whose request line and headers take too long (slow-loris)."""

    header_timeout_s = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting:
            self._header_timer.cancel()
        elif self._header_timer.cancelled():  # the next request of a kept connection has begun
            self._header_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_timer.cancel()
        super().connection_lost(exc)

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
