"""`dvpa bench engine`: what a checkpoint gives on this machine, tier by tier and mixed.

Random prompts, greedy, every answer of full length; nothing is compared with other engines here
(`scripts/bench_engine.py` does that).
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dvpa.engine.engine import Engine
from dvpa.engine.sampling_params import SamplingParams
from dvpa.pricing import price

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class BenchRow:
    """One measurement. `traffic` is a tier's name or "mixed".

    `tokens_per_s` counts output tokens over wall time, prompts included; `activated_params` is the
    mean over requests.
    """

    traffic: str
    concurrency: int
    tokens_per_s: float
    tokens_per_cpu_s: float
    activated_params: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def bench_engine(
    engine: Engine,
    concurrency: Sequence[int],
    tokens_in: int,
    tokens_out: int,
    mix: Sequence[float] = (),
    seed: int = 0,
) -> Iterator[BenchRow]:
    """Measure each tier alone, then a mix (share of requests per tier, base first), lazily.

    Prompts and answers must fit the model's context together; `mix` is empty or sums to 1.

    Raises:
        ValueError: one of the two does not hold.
    """
    config = engine.model.config
    names = list(config.tier_names)
    if tokens_in + tokens_out > config.max_position_embeddings:
        raise ValueError(
            f"input, output: {tokens_in} and {tokens_out} tokens must fit the context of "
            f"{config.max_position_embeddings}"
        )
    if mix and (len(mix) != len(names) or min(mix) < 0 or abs(sum(mix) - 1) > 1e-6):
        raise ValueError(
            f"mix: {list(mix)} must be {len(names)} shares of {', '.join(names)}, with sum 1"
        )
    return _measure(engine, concurrency, tokens_in, tokens_out, mix, random.Random(seed))


def _measure(
    engine: Engine,
    concurrency: Sequence[int],
    tokens_in: int,
    tokens_out: int,
    mix: Sequence[float],
    draws: random.Random,
) -> Iterator[BenchRow]:
    config = engine.model.config
    activated = [tier.activated_params for tier in price(config).tiers]
    for count in concurrency:
        prompts = [
            [draws.randrange(config.vocab_size) for _ in range(tokens_in)] for _ in range(count)
        ]
        traffic = {name: [tier] * count for tier, name in enumerate(config.tier_names)}
        if mix:
            traffic["mixed"] = _spread(mix, count)
        for name, tiers in traffic.items():
            _complete(engine, prompts, tiers, min(WARM_UP_TOKENS, tokens_out))
            wall, cpu = time.perf_counter(), time.process_time()
            _complete(engine, prompts, tiers, tokens_out)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            tokens = count * tokens_out
            mean = sum(activated[tier] for tier in tiers) / count
            yield BenchRow(name, count, tokens / wall, tokens / cpu, mean)


def _spread(mix: Sequence[float], count: int) -> list[int]:
    """A tier for each request: the middle of its share of 0 .. 1 says which, so counts are near."""
    ends = [sum(mix[: tier + 1]) for tier in range(len(mix))]
    at = [(i + 0.5) / count for i in range(count)]
    return [next((t for t, end in enumerate(ends) if x < end), len(mix) - 1) for x in at]


def _complete(
    engine: Engine, prompts: Sequence[list[int]], tiers: Sequence[int], tokens_out: int
) -> None:
    params = [
        SamplingParams(max_tokens=tokens_out, temperature=0, ignore_eos=True, tier=tier)
        for tier in tiers
    ]
    for output in engine.generate(prompts, params):
        if output.finish_reason != "length":
            raise RuntimeError(f"a request ended early: {output.finish_reason}: {output.error}")
