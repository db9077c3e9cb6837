"""Random arrivals at more than the engine can do, for a long time: is anything lost, or left?

    python scripts/soak_engine.py [--minutes 30] [--overload 1.5]

A random small model on one thread. First its capacity is measured, then requests of every kind
(tiers, lengths, n > 1, stop strings, sampling, speculation, sessions, deadlines, cancellations)
arrive as a Poisson process at `overload` times that rate. Ends with status 1 if a request was lost
or answered twice, pages stayed held, the queue passed its bound, or memory grew.
"""

import argparse
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kernel_timing import describe_machine, describe_versions

from dvpa.config import load_model_config
from dvpa.engine import (
    Engine,
    EscalationParams,
    Piece,
    QueueFull,
    SamplingParams,
    SpeculateParams,
)
from dvpa.model import DvpaForCausalLM
from dvpa.tasks.tokenizer import train_tokenizer
from dvpa.tiers import TierMap

ROOT = Path(__file__).resolve().parent.parent
MAX_QUEUE = 64
MAX_SEQS = 16  # a preempted request waits again, beside a queue that may be full
PAGE_SIZE = 8
WARM_UP_SHARE = 0.25  # memory is judged from then on: caches have filled
MAX_N = 2
GROWTH_MIB = 16.0
SAMPLE_SECONDS = 5.0


@dataclass
class Ledger:
    """Every piece of every request that was let in."""

    requests: int = 0
    expected: int = 0  # completions
    # Times each completion ended, a byte each: the ledger itself must not grow much.
    ended: bytearray = field(default_factory=bytearray)
    tokens: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    tiers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refused: int = 0
    degraded: int = 0
    escalations: int = 0

    def take(self, piece: Piece) -> None:
        """One piece: nothing may come after the last one, and its counts must add up."""
        key = MAX_N * int(piece.request_id) + piece.index
        self.ended.extend(bytes(max(0, key + 1 - len(self.ended))))
        if self.ended[key]:
            self.wrong.append(f"{key}: a piece after the last one")
        self.tokens[key] += len(piece.token_ids)
        if piece.finish_reason is None:
            return
        self.ended[key] += 1
        self.reasons[piece.finish_reason] += 1
        record = piece.telemetry
        if record is None:
            self.wrong.append(f"{key}: ended without telemetry")
            return
        self.tiers[record.tier_name] += 1
        self.escalations += record.escalations
        self.degraded += record.decided_by == "load"
        if not self.tokens[key] == record.completion_tokens == sum(record.tier_tokens):
            self.wrong.append(f"{key}: token counts differ")
        if piece.finish_reason == "error":
            self.wrong.append(f"{key}: {piece.error}")
        del self.tokens[key]

    def lost(self) -> int:
        """Completions that never ended."""
        return self.expected - sum(self.ended)


def make_engine(folder: Path) -> Engine:
    """A small random model with a tokenizer and a tiny cache, so that preemption happens."""
    torch.manual_seed(0)
    config = load_model_config(ROOT / "configs/model/pico.yaml")
    config.initializer_range = 0.2  # lively logits
    model = DvpaForCausalLM(config).eval()
    model.tier_map = TierMap(
        "threshold", tuple(config.tier_names), (1.0, 2.0, 3.0), 2, thresholds=(0.2, 0.3)
    )
    tokenizer = train_tokenizer(["what is 1 + 1 ?", "sort the words"] * 20, 290, folder)
    rows = config.kv_lora_rank + config.qk_rope_head_dim
    return Engine(
        model,
        tokenizer,
        max_queue=MAX_QUEUE,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=64,
        page_size=PAGE_SIZE,
        cache_bytes=4 * rows * config.num_hidden_layers * PAGE_SIZE * 60,
        escalation=EscalationParams(upper=0.9, lower=0.5),
    )


def make_request(draws: random.Random, vocab_size: int) -> tuple[list[int], SamplingParams]:
    """A prompt, a third of them with a shared beginning, and what is asked of it."""
    length = draws.randrange(1, 80)
    prompt = [draws.randrange(4, vocab_size) for _ in range(length)]
    if draws.random() < 0.3:
        prompt[: min(length, 24)] = range(10, 10 + min(length, 24))
    is_greedy = draws.random() < 0.5
    return prompt, SamplingParams(
        n=draws.choice([1, 1, 1, 1, MAX_N]),
        max_tokens=draws.randrange(1, 40),
        temperature=0.0 if is_greedy else 0.8,
        top_p=draws.choice([1.0, 0.9]),
        seed=draws.randrange(1000),
        stop=draws.choice([(), (), ("a",)]),
        logprobs=draws.choice([None, None, 2]),
        tier=draws.choice(["auto", "auto", "base", "top"]),
        session_id=draws.choice([None, *"abcdefgh"]),
        timeout_s=draws.choice([None, None, None, 0.5]),
        speculate=draws.choice([None, None, SpeculateParams(length=2)]),
    )


def capacity(engine: Engine, draws: random.Random) -> float:
    """Requests per second when the queue never runs dry."""
    start = time.perf_counter()
    requests = [make_request(draws, engine.model.config.vocab_size) for _ in range(200)]
    engine.generate([prompt for prompt, _ in requests], [params for _, params in requests])
    return len(requests) / (time.perf_counter() - start)


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def soak(engine: Engine, rate: float, seconds: float, ledger: Ledger) -> dict[str, Any]:
    """Send requests at `rate` for `seconds` from one thread while this one steps."""
    draws = random.Random(1)
    start, is_over = time.perf_counter(), threading.Event()
    alive: deque[str] = deque(maxlen=64)

    def arrive() -> None:
        next_at = start
        while not is_over.is_set():
            next_at += draws.expovariate(rate)
            is_over.wait(max(0.0, next_at - time.perf_counter()))
            prompt, params = make_request(draws, engine.model.config.vocab_size)
            request_id = str(ledger.requests + ledger.refused)
            try:
                engine.add(prompt, params, request_id=request_id, listener=ledger.take)
            except QueueFull:
                ledger.refused += 1
                continue
            ledger.requests += 1
            ledger.expected += params.n
            alive.append(request_id)
            if draws.random() < 0.1:
                engine.cancel(draws.choice(alive))

    sender = threading.Thread(target=arrive)
    sender.start()
    memory: list[tuple[float, float]] = []
    longest_queue, steps = 0, 0
    try:
        while (passed := time.perf_counter() - start) < seconds:
            if not engine.step():
                time.sleep(0.0002)
            steps += 1
            longest_queue = max(longest_queue, engine.num_waiting)
            if passed > len(memory) * SAMPLE_SECONDS:
                memory.append((passed, resident_mib()))
    finally:
        is_over.set()
        sender.join()
    while engine.has_work:
        engine.step()
    gc.collect()
    shown = memory[:: max(1, len(memory) // 60)]
    warm = [mib for at, mib in memory if at > WARM_UP_SHARE * seconds]
    return {
        "steps": steps,
        "longest_queue": longest_queue,
        "memory_mib": [[round(at, 1), round(mib, 1)] for at, mib in shown],
        "growth_mib": warm[-1] - warm[0] if warm else 0.0,
        "held_pages": engine.pages.num_held,
        "preemptions": engine.scheduler.num_preemptions,
        "drafted": engine.progress.num_drafted,
        "accepted": engine.progress.num_accepted,
    }


def main() -> int:
    """Soak, write the JSON, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--overload", type=float, default=1.5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/engine_soak.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ledger = Ledger()
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(Path(folder))
    per_second = capacity(engine, random.Random(0))
    found = soak(engine, arguments.overload * per_second, 60 * arguments.minutes, ledger)
    problems = [*ledger.wrong[:20]]
    if ledger.lost():
        problems.append(f"{ledger.lost()} completions never ended")
    if any(count > 1 for count in ledger.ended):
        problems.append("a completion ended twice")
    if found["held_pages"]:
        problems.append(f"{found['held_pages']} pages are still held")
    if found["longest_queue"] > MAX_QUEUE + MAX_SEQS:
        problems.append(f"the queue reached {found['longest_queue']}: {MAX_QUEUE} may wait")
    if found["growth_mib"] > GROWTH_MIB:
        problems.append(f"memory grew by {found['growth_mib']:.1f} MiB")
    result = {
        "benchmark": "engine_soak",
        "minutes": arguments.minutes,
        "capacity_requests_per_s": per_second,
        "overload": arguments.overload,
        "max_queue": MAX_QUEUE,
        "max_num_seqs": MAX_SEQS,
        "requests": ledger.requests,
        "completions": sum(ledger.ended),
        "refused": ledger.refused,
        "lost": ledger.lost(),
        "finish_reasons": dict(ledger.reasons),
        "tiers": dict(ledger.tiers),
        "lowered_by_load": ledger.degraded,
        "escalations": ledger.escalations,
        **found,
        "problems": problems,
        "machine": describe_machine("cpu"),
        "versions": describe_versions(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    shown = {key: value for key, value in result.items() if key != "memory_mib"}
    print(json.dumps(shown, indent=1))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
