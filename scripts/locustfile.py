"""Users of every kind at a running server, for locust (`pip install locust`).

    locust -f scripts/locustfile.py --host http://127.0.0.1:8000 --headless -u 32 -r 8 -t 2m

Each user asks, reads the whole answer, thinks for a moment and asks again: short and long prompts,
streams and whole answers, the tier left to the server or named. The time to the first token of a
stream is a row of its own. An answer without `usage.dvpa` counts as a failure.
"""

import json
import os
import random
import time
from typing import Any

from locust import HttpUser, between, task

QUESTIONS = ["what is 3 + 4 ?", "sort the words zebra apple mango", "reverse abcdef", "7 * 8"]
KEY = os.environ.get("DVPA_API_KEY")


class Client(HttpUser):
    """One user."""

    wait_time = between(0.05, 0.5)

    def on_start(self) -> None:
        """Its own draws, its own session."""
        self._draws = random.Random()
        self.client.headers["x-dvpa-session-id"] = f"user-{self._draws.getrandbits(64):x}"
        if KEY:
            self.client.headers["authorization"] = f"Bearer {KEY}"

    @task(4)
    def stream(self) -> None:
        """A streamed answer, tier by the policy."""
        start, first = time.perf_counter(), None
        body = {**self._body(), "stream": True, "stream_options": {"include_usage": True}}
        with self.client.post(
            "/v1/completions", json=body, stream=True, catch_response=True, name="stream"
        ) as answer:
            last: dict[str, Any] = {}
            for line in answer.iter_lines():
                if line.startswith(b"data: {"):
                    first = time.perf_counter() if first is None else first
                    last = json.loads(line[6:])
            if answer.status_code != 200 or "dvpa" not in last.get("usage", {}):
                answer.failure(f"status {answer.status_code}, no telemetry at the end")
                return
        self.environment.events.request.fire(
            request_type="POST",
            name="stream: first token",
            response_time=1000 * ((first or start) - start),
            response_length=0,
            exception=None,
            context={},
        )

    @task(3)
    def whole(self) -> None:
        """An answer in one piece, sometimes at a named tier."""
        body = self._body()
        if self._draws.random() < 0.3:
            body["dvpa"] = {"tier": self._draws.choice([0, 1])}
        self._check("/v1/completions", body, "whole")

    @task(2)
    def chat(self) -> None:
        """A conversation."""
        body = self._body()
        message = {"role": "user", "content": body.pop("prompt")}
        self._check("/v1/chat/completions", {**body, "messages": [message]}, "chat")

    @task(1)
    def route(self) -> None:
        """A decision without an answer."""
        body = {"prompt": self._body()["prompt"]}
        self.client.post("/v1/dvpa/route", json=body, name="route")

    def _body(self) -> dict[str, Any]:
        prompt = " ".join(self._draws.choices(QUESTIONS, k=self._draws.choice([1, 1, 1, 4])))
        return {"prompt": prompt, "max_tokens": self._draws.randrange(4, 48)}

    def _check(self, path: str, body: dict[str, Any], name: str) -> None:
        with self.client.post(path, json=body, catch_response=True, name=name) as answer:
            if answer.status_code == 200 and "dvpa" not in answer.json().get("usage", {}):
                answer.failure("no telemetry")
