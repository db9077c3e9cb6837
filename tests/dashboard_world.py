"""What the dashboard's tests show: a tiny server with requests behind it; contrast of colours."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import uvicorn
from helpers import thresholds, tiny_config, tiny_model

from dvpa.engine import Engine, SamplingParams
from dvpa.server.app import create_app
from dvpa.server.backend import LocalBackend
from dvpa.server.config import ServeConfig
from dvpa.tasks.tokenizer import train_tokenizer

TIERS = ("base", "middle", "top")
KEY = "a-key-of-the-tests"
REPORT = {
    "tiers": [
        {"name": name, "activated_params": 1e4 * (tier + 1), "quality": 0.3 + 0.2 * tier}
        for tier, name in enumerate(TIERS)
    ],
    "routers": {},
    "frontier": {"adaptive": {"cost": [1e4, 2e4, 3e4], "quality": [0.3, 0.6, 0.7]}},
}


def served_backend() -> LocalBackend:
    """A tiny model whose own difficulties fall into all three tiers, with a calibration."""
    texts = ["one and two", "two and three", "sort 312 -> 123", "four"]
    tokenizer = train_tokenizer(texts * 4, 300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    model = tiny_model(tiny_config(vocab_size=len(tokenizer), eos_token_id=None, **ids), seed=1)
    engine = Engine(model, tokenizer, max_queue=64)
    asked = SamplingParams(max_tokens=1, temperature=0.0)
    found = sorted(out.telemetry.difficulty or 0.0 for out in engine.generate(PROMPTS, asked))
    cuts = [found[len(found) // 3], found[2 * len(found) // 3]]
    curves = tuple(((0.0, 1.0), (0.6 + 0.1 * tier, 0.1 + 0.2 * tier)) for tier in range(3))
    engine.set_tier_map(
        replace(
            thresholds(model, *cuts),
            calibration=curves,
            statistics={"difficulty_histogram": [1] * 20},
        )
    )
    backend = LocalBackend(engine, "tiny")
    backend.info = replace(backend.info, report=REPORT)
    return backend


PROMPTS = [
    f"{'one two three four '[: 4 + 3 * length]}{digit}" for length in range(5) for digit in range(6)
]


@contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """The address of a running server with some requests behind it."""
    app = create_app(served_backend(), config)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.05)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        address = f"http://{host}:{port}"
        headers = {"authorization": f"Bearer {KEY}"} if config.api_keys else {}
        with httpx.Client(base_url=address, headers=headers, timeout=60) as client:
            for number, prompt in enumerate(PROMPTS):
                body = {"prompt": prompt, "max_tokens": 4}
                if number % 10 == 0:
                    body["dvpa"] = {"tier": "top"}
                client.post("/v1/completions", json=body).raise_for_status()
            assert client.post("/v1/completions", json={"prompt": ""}).status_code == 400
        yield address
    finally:
        server.should_exit = True
        thread.join(30)


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours, "#rrggbb" or "rgb(r, g, b)"."""
    levels = sorted(luminance(color) for color in (one, other))
    return (levels[1] + 0.05) / (levels[0] + 0.05)


def luminance(color: str) -> float:
    """WCAG's relative luminance."""
    if color.startswith("#"):
        parts = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    else:
        parts = [int(part) for part in re.findall(r"\d+", color)]
    linear = [
        part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4
        for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
