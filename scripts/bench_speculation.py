"""Tier self-speculation against plain decoding: acceptance and wall time at batch 1, 8 and 32.

    python scripts/bench_speculation.py CKPT [--rounds 5]

A trained checkpoint (`dvpa train train/words.yaml`): the base tier drafts, the top tier verifies.
Prompts are passages of a text (which training may have seen); greedy, so both ways must give the
same tokens. One thread; rounds are interleaved and their order alternates; medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from kernel_timing import describe_machine, describe_versions

from dvpa.engine import Engine, SamplingParams, SpeculateParams

ROOT = Path(__file__).resolve().parent.parent
PROMPT_TOKENS = 32
Row = dict[str, Any]


def read_prompts(engine: Engine, path: Path, count: int) -> list[list[int]]:
    """Token ids of the beginnings of `count` passages."""
    assert engine.tokenizer is not None
    text = path.read_text(encoding="utf-8")
    starts = range(0, len(text), len(text) // count)
    passages = (text[start : start + 12 * PROMPT_TOKENS] for start in starts)
    ids = [engine.tokenizer.encode(p, add_special_tokens=False) for p in passages]
    return [[engine.tokenizer.bos_token_id, *one][:PROMPT_TOKENS] for one in ids][:count]


def run(engine: Engine, prompts: list[list[int]], length: int, tokens: int) -> Row:
    """One pass: seconds, drafted and accepted tokens, steps, outputs."""
    speculate = SpeculateParams(length=length) if length else None
    params = SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=True, tier="top", speculate=speculate
    )
    progress = engine.progress
    before = (progress.num_drafted, progress.num_accepted, engine.num_steps)
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = engine.generate(prompts, params)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = (progress.num_drafted, progress.num_accepted, engine.num_steps)
    drafted, accepted, steps = (b - a for a, b in zip(before, after, strict=True))
    flops = sum(output.telemetry.flops for output in outputs)
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "drafted": drafted,
        "accepted": accepted,
        "steps": steps,
        "flops": flops,
        "outputs": [output.token_ids for output in outputs],
    }


def measure(
    engine: Engine, prompts: list[list[int]], lengths: list[int], rounds: int, tokens: int
) -> list[Row]:
    """Plain decoding and every draft length, interleaved."""
    ways = [0, *lengths]
    samples: dict[int, list[Row]] = {way: [] for way in ways}
    run(engine, prompts, lengths[0], tokens)
    for number in range(rounds):
        for way in ways if number % 2 == 0 else ways[::-1]:
            samples[way].append(run(engine, prompts, way, tokens))
    plain = samples[0]
    rows = []
    for way in ways:
        found = samples[way]
        same = sum(a == b for a, b in zip(found[0]["outputs"], plain[0]["outputs"], strict=True))
        drafted = found[0]["drafted"]
        rows.append(
            {
                "batch": len(prompts),
                "length": way,
                "acceptance": found[0]["accepted"] / drafted if drafted else None,
                "same_outputs": same,
                "wall_s": statistics.median(s["wall_s"] for s in found),
                "cpu_s": statistics.median(s["cpu_s"] for s in found),
                "wall_ratio": statistics.median(
                    s["wall_s"] / p["wall_s"] for s, p in zip(found, plain, strict=True)
                ),
                "flops_ratio": found[0]["flops"] / plain[0]["flops"],
                "steps_ratio": found[0]["steps"] / plain[0]["steps"],
            }
        )
    return rows


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="prompts come from it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/speculation.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine(arguments.checkpoint, prefix_caching=False)
    prompts = read_prompts(engine, arguments.text, max(arguments.batches))
    rows = [
        row
        for batch in arguments.batches
        for row in measure(
            engine, prompts[:batch], arguments.lengths, arguments.rounds, arguments.tokens
        )
    ]
    result = {
        "benchmark": "speculation",
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "prompt_tokens": PROMPT_TOKENS,
        "rows": rows,
        "machine": describe_machine("cpu"),
        "versions": describe_versions(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
