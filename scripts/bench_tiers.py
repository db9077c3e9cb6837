"""Time of one forward pass per tier, beside Transformers' DeepseekV3 on the exported tier.

    python scripts/bench_tiers.py [--rounds 15] [--threads 1] [--out docs/benchmarks/tiers.json]

Random weights (time does not depend on them), fp32, CPU. All contenders are interleaved in every
round; medians of process CPU time and of wall time. `mixed` is one batch whose sequences are spread
evenly over all tiers.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dvpa.checkpoint.export import export_tier
from dvpa.config import DvpaConfig
from dvpa.evaluate.report import describe_environment
from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price

TIERS = [(1, 2, "base"), (2, 4, "small"), (4, 8, "medium"), (8, 16, "top")]
WORK = {"prefill 8 x 128": (8, 128), "decode 1": (1, 1), "decode 32": (32, 1)}
CONTEXT = 64  # cached tokens of the decode steps


def build() -> DvpaForCausalLM:
    """A model big enough that experts dominate: 4 layers, 64 experts of width 256, hidden 512."""
    tiers = [
        {
            "name": name, "num_groups": groups, "top_k": k, "topk_group": groups,
            "routed_scaling_factor": k**0.5,
        }
        for groups, k, name in TIERS
    ]  # fmt: skip
    config = DvpaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256,
        num_hidden_layers=4, num_attention_heads=8, n_routed_experts=64, n_group=8,
        kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=64, tiers=tiers,
    )  # fmt: skip
    torch.manual_seed(0)
    return DvpaForCausalLM(config).eval()


def step(model: torch.nn.Module, batch: int, length: int, **tiers: object) -> Callable[[], None]:
    """One forward pass: a prompt of `length`, or one token after CONTEXT cached ones."""
    ids = torch.randint(3, 4096, (batch, length))
    if length > 1:
        return lambda: model(ids, use_cache=False, **tiers)
    cache = model(torch.randint(3, 4096, (batch, CONTEXT)), use_cache=True, **tiers).past_key_values

    def decode() -> None:
        model(ids, past_key_values=cache, use_cache=True, **tiers)
        cache.crop(-1)  # the cache stays as it was

    return decode


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/tiers.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = build()
    costs = price(model.config).tiers
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.save_pretrained(Path(folder) / "dvpa")
        peers = []
        for tier, cost in enumerate(costs):
            export_tier(Path(folder) / "dvpa", tier, Path(folder) / cost.name)
            peer = AutoModelForCausalLM.from_pretrained(
                Path(folder) / cost.name, dtype=torch.float32
            )
            peers.append(peer.eval())
        rows = [measure(name, *size, model, peers, arguments.rounds) for name, size in WORK.items()]
    result = {
        "benchmark": "tiers",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "environment": describe_environment(),
        "activated_params": {cost.name: cost.activated_params for cost in costs},
        "work": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(
    name: str,
    batch: int,
    length: int,
    model: torch.nn.Module,
    peers: list[torch.nn.Module],
    rounds: int,
) -> dict[str, object]:
    """Medians in milliseconds of every contender at one batch shape."""
    contenders = {
        f"dvpa {tier}": step(model, batch, length, tiers=i) for i, (_, _, tier) in enumerate(TIERS)
    }
    for peer, (_, _, tier) in zip(peers, TIERS, strict=True):
        contenders[f"transformers {tier}"] = step(peer, batch, length)
    if batch % len(TIERS) == 0:
        contenders["dvpa mixed"] = step(
            model, batch, length, tiers=torch.arange(batch) % len(TIERS)
        )
    seconds: dict[str, list[tuple[float, float]]] = {contender: [] for contender in contenders}
    for number in range(rounds + 2):
        for contender, run in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if number >= 2:  # two rounds to warm up
                seconds[contender].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {
        contender: {
            "wall_ms": 1000 * statistics.median(wall for wall, _ in measured),
            "cpu_ms": 1000 * statistics.median(cpu for _, cpu in measured),
        }
        for contender, measured in seconds.items()
    }
    return {"work": name, "batch": batch, "length": length, "medians": medians}


if __name__ == "__main__":
    main()
