"""Two replicas behind a gateway, on Ray in this process."""

import http.client
import json
from pathlib import Path
from typing import Any

import httpx
from server_world import ENGINE, NAME, Reply, until, write_checkpoint

from dvpa.engine import EngineConfig
from dvpa.server.config import ServeConfig
from dvpa.server.ray_app import build, free_port, start_ray
from dvpa.server.ray_backend import Report

KEY = "a key for tests only"


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
        """What those that are alive last said."""
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
