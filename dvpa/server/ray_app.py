"""Ray Serve: one gateway without weights, any number of engine replicas.

    Gateway        the FastAPI app of every server, over a `RayBackend`: tokenizes, checks, admits
    EngineReplica  one engine; once a second it tells the gateway how it is and hears its orders

Every request passes the gateway, so its telemetry is that of all replicas. Only public parts of
Ray are used, and Ray is imported where it is used: it is an extra (`dvpa[ray]`).
"""

import asyncio
import logging
import os
import queue
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from fastapi import FastAPI

from dvpa.checkpoint.export import read_config
from dvpa.engine import Piece, SamplingParams
from dvpa.model.causal_lm import TIER_MAP_FILE
from dvpa.server.app import create_app
from dvpa.server.backend import LocalBackend
from dvpa.server.config import ServeConfig
from dvpa.server.errors import ApiError
from dvpa.server.lifecycle import LOADING, Server
from dvpa.server.main import load_backend, log_to_stderr
from dvpa.server.ray_backend import (
    REPORT_S,
    Orders,
    RayBackend,
    Report,
    batches,
    digest,
    model_info,
)
from dvpa.server.ray_proxy import CALLBACK
from dvpa.server.reports import find_report
from dvpa.tiers.record import TelemetryRecord

logger = logging.getLogger(__name__)
APP, GATEWAY, ENGINE = "dvpa", "Gateway", "EngineReplica"
STUCK_S = 300.0  # a step that takes so long is taken for hung, and the replica is replaced
UPSCALE_S, DOWNSCALE_S = 10.0, 300.0  # how long load has to last before replicas come or go
OBJECT_STORE_BYTES = 200_000_000  # pieces are small; Ray's default is a third of the memory
QUIET = {"enable_access_log": False}  # the gateway writes one of its own


class EngineReplica:
    """One engine in a process of its own."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, checkpoint: str, config: ServeConfig
    ) -> None:
        from ray import serve

        log_to_stderr(access_log=False)
        backend = await asyncio.to_thread(load_backend, Path(checkpoint), config, None)
        assert isinstance(backend, LocalBackend)
        self._backend = backend
        self._name: str = serve.get_replica_context().replica_tag
        self._steps, self._moved = 0, time.monotonic()
        self._gateways: dict[str, str] = {}  # whose request it is
        self._reporting = asyncio.ensure_future(self._keep_reporting())

    async def stream(
        self, token_ids: Sequence[int], params: SamplingParams, request_id: str, gateway: str
    ) -> AsyncGenerator[list[Piece], None]:
        """As `Backend.stream`, whatever has come by now at a time."""
        self._gateways[request_id] = gateway
        try:
            pieces = self._backend.stream(token_ids, params, request_id)
            async with aclosing(batches(pieces)) as found:
                async for batch in found:
                    yield batch
        finally:
            self._gateways.pop(request_id, None)

    async def route(
        self, token_ids: Sequence[int], params: SamplingParams, request_id: str
    ) -> TelemetryRecord:
        """As `Backend.route`."""
        return await self._backend.route(token_ids, params, request_id)

    def check_health(self) -> None:
        """Called by Ray Serve; RuntimeError if there is work and no step gets done."""
        engine, now = self._backend.engine, time.monotonic()
        if engine.num_steps != self._steps or not engine.has_work:
            self._steps, self._moved = engine.num_steps, now
        if now - self._moved > STUCK_S:
            raise RuntimeError(f"no step has ended for {STUCK_S:g} s")

    async def _keep_reporting(self) -> None:
        from ray import serve

        gateway: Any = None
        while True:
            try:
                gateway = gateway or serve.get_deployment_handle(GATEWAY)
                orders: Orders = await gateway.report.remote(await self._report())
                if orders.tier_map is not None:
                    await self._backend.set_tier_map(orders.tier_map)
                if orders.cancels:
                    await self._backend.cancel_all()
                for request_id, owner in list(self._gateways.items()):
                    if owner != orders.gateway:  # nobody reads it any more
                        self._backend.engine.cancel(request_id)
            except Exception as error:  # the gateway is being restarted: the next one will listen
                logger.warning("report: %s", type(error).__name__)
            await asyncio.sleep(REPORT_S)

    async def _report(self) -> Report:
        stats = await self._backend.stats()
        return Report(self._name, os.getpid(), stats, digest(self._backend.info.tier_map))


class Gateway:
    """Requests in, answers out; no weights."""

    current: ClassVar["Gateway"]  # of this process: `gateway_app` is called without arguments

    def __init__(self, engines: Any, checkpoint: str, config: ServeConfig) -> None:
        log_to_stderr(config.access_log)
        self.config = config
        self.tier_map_file = Path(checkpoint) / TIER_MAP_FILE
        self.backend = RayBackend(engines, model_info(Path(checkpoint), config), config)
        self.server: Server | None = None
        Gateway.current = self

    async def report(self, report: Report) -> Orders:
        """A replica says how it is; with the first one requests are let in."""
        orders = self.backend.hear(report)
        if self.server is not None and self.server.state == LOADING:
            self.server.ready(self.backend)
        return orders

    async def replicas(self) -> list[Report]:
        """The replicas that are alive, as they last said."""
        return self.backend.live()

    async def drain(self) -> bool:
        """Let in nobody, wait for whoever is in; see `Server.drain`."""
        return self.server is None or await self.server.drain()

    async def reload(self) -> str:
        """Decide by tier_map.json as it is now; what came of it."""
        assert self.server is not None
        try:
            return f"tier map reloaded ({(await self.server.reload_tier_map()).kind})"
        except ApiError as error:
            return error.message


def gateway_app() -> FastAPI:
    """The gateway's application: Ray Serve calls this in the gateway's process."""
    gateway = Gateway.current
    app = create_app(config=gateway.config, tier_map_file=gateway.tier_map_file)
    gateway.server = app.state.server
    return app


def build(
    checkpoint: Path,
    config: ServeConfig,
    replicas: int = 1,
    max_replicas: int | None = None,
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Any:
    """The Ray Serve application.

    Args:
        max_replicas: above `replicas` the number follows the load; None: it stays.
        cpus, gpus: what a replica takes of the cluster's; fractions let replicas share.
    """
    from ray import serve

    engine, folder = config.engine, str(checkpoint.resolve())
    scaling: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas,
                "max_replicas": max_replicas,
                "target_ongoing_requests": engine.max_num_seqs,  # as many as run at a time
                "upscale_delay_s": UPSCALE_S,
                "downscale_delay_s": DOWNSCALE_S,
            }
        }
    engines = serve.deployment(EngineReplica).options(
        name=ENGINE,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # Requests wait in the engines' queues, where load lowers tiers and sessions take turns.
        max_ongoing_requests=engine.max_num_seqs + engine.max_queue,
        # One that is taken away finishes what it has.
        graceful_shutdown_timeout_s=config.request_timeout_s or 3600.0,
        health_check_period_s=5.0,
        logging_config=QUIET,
        **scaling,
    )
    gateway = serve.deployment(serve.ingress(gateway_app)(Gateway)).options(
        name=GATEWAY,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=config.max_connections,
        max_queued_requests=config.max_connections,
        graceful_shutdown_timeout_s=config.drain_s,
        health_check_period_s=5.0,
        logging_config=QUIET,
    )
    # Only the gateway has to know the keys.
    return gateway.bind(engines.bind(folder, replace(config, api_keys=())), folder, config)


def run(
    checkpoint: Path,
    config: ServeConfig,
    replicas: int = 1,
    max_replicas: int | None = None,
    on_listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a checkpoint until SIGTERM or SIGINT, then drain; SIGHUP reads tier_map.json again.

    On the cluster of `RAY_ADDRESS`, else on one that is started on this machine and ends with it.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, Ray is not installed, more replicas than
            the cluster has CPUs for.
        RuntimeError: the replicas do not start.
    """
    set_environment()
    try:
        import ray
        from ray import serve
    except ModuleNotFoundError:
        raise ValueError("--ray: Ray is not installed, see `pip install 'dvpa[ray]'`") from None
    read_config(checkpoint)
    find_report(checkpoint, config.report)
    if config.port == 0:
        config = replace(config, port=free_port(config.host))
    start_ray()
    try:
        cpus = float(config.threads or 1)
        found = ray.cluster_resources().get("CPU", 0.0)
        if (max_replicas or replicas) * cpus > found:
            raise ValueError(
                f"--ray: {max_replicas or replicas} replicas of {cpus:g} threads must fit the "
                f"cluster's {found:g} CPUs"
            )
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        serve.start(http_options={"host": config.host, "port": config.port})
        app = build(checkpoint, config, replicas, max_replicas, cpus=cpus, gpus=gpus)
        gateway = serve.run(app, name=APP, route_prefix="/")
        signals = _take_signals()  # before anybody is told where to send one
        try:
            on_listening(f"http://{config.host}:{config.port}")
            _until_signal(signals, gateway)
            if not gateway.drain.remote().result(timeout_s=config.drain_s + 10):
                logger.warning("drained for %g s: the rest was cancelled", config.drain_s)
        finally:
            serve.delete(APP)
    finally:
        ray.shutdown()


def set_environment() -> None:
    """What Ray reads when it is imported, and its processes on this machine when they start."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # lines of the access log are all alike
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", CALLBACK)
    if not os.environ.get("RAY_ADDRESS"):
        # Ray's word for "only this machine": everything then listens on the loopback address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def start_ray() -> None:
    """Join the cluster of `RAY_ADDRESS`, or start a small one on this machine."""
    set_environment()
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
        return
    ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES)


def _take_signals() -> "queue.SimpleQueue[int]":
    """From now on signals come out of the queue."""
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: signals.put(number))
    return signals


def _until_signal(signals: "queue.SimpleQueue[int]", gateway: Any) -> None:
    """Wait for SIGTERM or SIGINT; a second one then ends the process at once."""
    while signals.get() == signal.SIGHUP:
        logger.warning("SIGHUP: %s", gateway.reload.remote().result())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def free_port(host: str) -> int:
    """A port that nobody listens on: Ray Serve cannot choose one."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
