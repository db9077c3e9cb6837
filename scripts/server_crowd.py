"""Clients of every kind for the server's overload run, and the books they keep."""

import asyncio
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from server_load import ROOT, STREAMING, Answer, post

from dvpa.config import load_model_config
from dvpa.model import DvpaForCausalLM
from dvpa.tasks.tokenizer import train_tokenizer
from dvpa.tiers import TierMap

MODEL_NAME = "small"
REFUSALS = (429, 503)  # deliberate, with Retry-After
CLIENT_SECONDS = 120.0  # patience
PAUSE_SECONDS = 0.1  # of a client that was refused and has no schedule


def write_checkpoint(folder: Path) -> None:
    """The soak's model: random, lively logits, a tokenizer, thresholds that use every tier."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["what is 1 + 1 ?", "sort the words"] * 20, 290, folder)
    config = load_model_config(ROOT / "configs/model/pico.yaml")
    config.initializer_range = 0.2
    config.vocab_size = len(tokenizer)
    model = DvpaForCausalLM(config).eval()
    model.tier_map = TierMap(
        "threshold", tuple(config.tier_names), (1.0, 2.0, 3.0), 2, thresholds=(0.2, 0.3)
    )
    model.save_pretrained(folder)


def make_request(draws: random.Random, streams: bool | None = None) -> tuple[str, dict[str, Any]]:
    """Path and body of a request like the soak's; whether it streams is drawn unless given."""
    words = ["what", "is", "sort", "the", "words", *"0123456789+-?"]
    prompt = " ".join(draws.choices(words, k=draws.randrange(1, 40)))
    body: dict[str, Any] = {
        "model": draws.choice([MODEL_NAME, "dvpa-auto", "dvpa-base", "dvpa-top"]),
        "max_tokens": draws.randrange(4, 40),
        "temperature": draws.choice([0, 0.8]),
        "seed": draws.randrange(1000),
    }
    if draws.random() < 0.2:
        body["stop"] = ["a"]
    if draws.random() < 0.5 if streams is None else streams:
        body |= STREAMING
    if draws.random() < 0.5:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}
    return "/v1/completions", {**body, "prompt": prompt}


@dataclass
class Ledger:
    """What the clients of one phase saw."""

    sent: int = 0
    answered: int = 0
    left: int = 0  # let in, and left by us
    truncated: int = 0
    unconnected: int = 0  # the connection failed before a byte came
    refused: Counter[int] = field(default_factory=Counter)  # by status
    reasons: Counter[str] = field(default_factory=Counter)
    first_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def let_in(self) -> int:
        """Requests that the server took."""
        return self.answered + self.left + self.truncated

    def take(self, answer: Answer) -> None:
        """One answer, good or bad."""
        self.sent += 1
        if answer.status == 0:
            self.unconnected += 1
        elif answer.status in REFUSALS:
            self.refused[answer.status] += 1
            if not answer.headers.get("retry-after", "").isdigit():
                self.wrong.append(f"{answer.status} without Retry-After")
        elif answer.status != 200:
            self.wrong.append(f"status {answer.status}: {answer.body[:200]!r}")
        elif answer.has_left:
            self.left += 1
        elif answer.is_truncated:
            self.truncated += 1
        else:
            self.answered += 1
            self.reasons.update(answer.finish_reasons)
            self.first_ms.append(1e3 * (answer.times[0] - answer.started))
            self.total_ms.append(1e3 * (answer.times[-1] - answer.started))

    def row(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "sent": self.sent,
            "answered": self.answered,
            "left_by_client": self.left,
            "truncated": self.truncated,
            "unconnected": self.unconnected,
            "refused": {str(status): count for status, count in sorted(self.refused.items())},
            "finish_reasons": dict(self.reasons),
            "first_byte_ms": percentiles(self.first_ms),
            "total_ms": percentiles(self.total_ms),
        }


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile, largest; empty for fewer than two values."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(values)}


async def crowd(
    port: int, clients: int, ledger: Ledger, *, seconds: float, rate: float | None, leavers: int = 0
) -> None:
    """Clients that send `rate` requests per second together; None: the next one after an answer.

    Every `leavers`-th cuts each of its streams (0: none does). Without a rate they go when a
    connection fails: the server has ended.
    """
    start = time.perf_counter()

    async def client(number: int) -> None:
        draws = random.Random(f"client {number}")
        leaves = leavers > 0 and number % leavers == 0
        next_at = start
        while True:
            if rate is not None:
                next_at += draws.expovariate(rate / clients)
                await asyncio.sleep(max(0.0, next_at - time.perf_counter()))
            if time.perf_counter() - start >= seconds:
                return
            path, body = make_request(draws, True if leaves else None)
            after = draws.randrange(1, 6) if leaves else None
            answer = await post(port, path, body, leave_after=after, timeout_s=CLIENT_SECONDS)
            ledger.take(answer)
            if rate is None and ledger.unconnected:
                return
            if rate is None and answer.status in REFUSALS:
                await asyncio.sleep(PAUSE_SECONDS)

    await asyncio.gather(*(client(number) for number in range(clients)))
