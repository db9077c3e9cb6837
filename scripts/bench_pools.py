"""Which pool a converted DeepSeek-V3's lower tiers should have: `prefix` or `striped`.

    python scripts/bench_pools.py [--seeds 3] [--steps 2000] [--work DIR]
        [--out docs/benchmarks/pools.json]

Per seed: trains a small DeepSeek-V3 (32 experts in 8 groups, best 4 groups, 4 experts a token) on
three quarters of Python's standard library with `dvpa train`, exports it as a plain `deepseek_v3`
checkpoint, and measures it as `dvpa convert` does, on the other quarter: experts by REAP, then nats
per token at every tier for both kinds of pools, before any tuning. The same with experts ranked by
REAP times their tokens (what they add in all, not per token), and in random orders (the mean of
eight), shows what the ranking is worth. About a quarter of an hour a seed on one CPU core; with 500
steps the experts matter too little to tell the kinds apart.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dvpa.architecture import TOP_TIER_FIELDS
from dvpa.checkpoint.calibration_text import CalibrationText, read_calibration
from dvpa.checkpoint.importance import measure_importance, super_experts, tier_losses
from dvpa.checkpoint.pools import TierWish, default_tiers, order_experts, tier_fields
from dvpa.checkpoint.source import Source, open_source
from dvpa.config import DvpaConfig
from dvpa.evaluate.report import describe_environment

POOLS = ("prefix", "striped")
EXPERTS, TOP_K = 32, 4
RANDOM_ORDERS = 8  # whose losses are averaged
SMALLER = (TierWish("half", 16, TOP_K), TierWish("three quarters", 24, TOP_K))
MODEL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "n_shared_experts": 1,
    "n_routed_experts": EXPERTS,
    "n_group": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tiers": [
        {
            "name": "top",
            "num_groups": 8,
            "top_k": TOP_K,
            "topk_group": 4,
            "routed_scaling_factor": 2.0,
        }
    ],
}


def main() -> None:
    """Train, measure, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=32_768, help="of the measured text")
    parser.add_argument("--work", type=Path, help="keeps the trained models (default: none kept)")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/pools.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        seeds = []
        for seed in range(arguments.seeds):
            source = train(work, seed, arguments.steps)
            text = read_calibration(source, [work / "measured.txt"], arguments.tokens)
            seeds.append({"seed": seed, **compare(open_source(source), text, seed)})
            print(json.dumps(seeds[-1]), flush=True)
    result = {
        "benchmark": "pools",
        "steps": arguments.steps,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "text": text.origin,
        "tokens": text.measuring.numel(),
        "held_out_tokens": text.held_out.numel(),
        "seeds": seeds,
        "environment": describe_environment(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def train(work: Path, seed: int, steps: int) -> Path:
    """A trained source of `deepseek_v3`; one that is there already is taken as it is."""
    source = work / f"source-{seed}"
    if source.exists():
        return source
    write_texts(work)
    (work / "model.yaml").write_text(yaml.safe_dump(MODEL, sort_keys=False))
    recipe = {
        "name": f"pools-{seed}",
        "model": str(work / "model.yaml"),
        "seed": seed,
        "threads": 1,
        "loggers": [],
        "calibration": None,  # no difficulty head
        "data": {
            "files": [{"path": str(work / "trained.txt"), "format": "text"}],
            "validation_fraction": 0.04,
            "max_length": 256,
            "prompt_loss": True,
        },
        "optimizer": {"learning_rate": 3.0e-3},
        "stages": [
            {"name": "only", "kind": "foundation", "num_tiers": 1, "steps": steps, "batch_size": 8}
        ],
    }
    (work / f"recipe-{seed}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run = work / f"run-{seed}"
    dvpa("train", str(work / f"recipe-{seed}.yaml"), "--out", str(run))
    dvpa("export", str(run / "checkpoint"), "--tier", "top", str(source))
    return source


def write_texts(work: Path) -> None:
    """Every fourth module of the standard library is measured on, the others are trained on."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    for name, rest in (("measured", (0,)), ("trained", (1, 2, 3))):
        chosen = [path for i, path in enumerate(modules) if i % 4 in rest]
        text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in chosen)
        (work / f"{name}.txt").write_text(text, encoding="utf-8")


def dvpa(*arguments: str) -> None:
    """Run a command of the product.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([sys.executable, "-m", "dvpa", *arguments], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"dvpa {arguments[0]}: exit code {done.returncode}")


def compare(source: Source, text: CalibrationText, seed: int) -> dict[str, Any]:
    """Nats per token by tier, kind of pool and order: default tiers, and smaller pools alone."""
    measured = measure_importance(source, text.measuring)
    pinned = super_experts(measured.peaks)
    generator = torch.Generator().manual_seed(seed)
    orders = {"REAP": measured.scores}
    orders["REAP x tokens"] = {
        layer: scores * measured.counts[layer] for layer, scores in measured.scores.items()
    }
    for draw in range(RANDOM_ORDERS):
        orders[f"random {draw}"] = {
            layer: torch.rand(EXPERTS, generator=generator) for layer in measured.scores
        }
    wished = {
        "default tiers": default_tiers(source.config),
        "smaller pools, same top_k": [*SMALLER, TierWish("top", EXPERTS, TOP_K)],
    }
    found: dict[str, Any] = {"super_experts": len(pinned), "tiers": {}, "nll": {}}
    for label, wishes in wished.items():
        found["tiers"][label] = [[wish.name, wish.pool, wish.top_k] for wish in wishes]
        plans: dict[str, tuple[DvpaConfig, dict[int, Tensor]]] = {}
        for pool in POOLS:
            config = configured(source.config, wishes, pool)
            for order, scores in orders.items():
                plans[f"{pool}, {order}"] = (config, ordered(source, scores, pinned, pool))
        losses = tier_losses(source, plans, text.held_out)
        found["nll"][label] = {
            name: values for name, values in losses.items() if "random" not in name
        }
        for pool in POOLS:
            draws = [losses[name] for name in losses if name.startswith(f"{pool}, random")]
            found["nll"][label][f"{pool}, random"] = torch.tensor(draws).mean(dim=0).tolist()
    return found


def configured(source: DvpaConfig, wishes: list[TierWish], pool: str) -> DvpaConfig:
    """The source's config with these tiers."""
    data = {key: value for key, value in source.to_dict().items() if key not in TOP_TIER_FIELDS}
    data.update(tier_fields(source, wishes, pool))
    return DvpaConfig.from_dict(data)


def ordered(
    source: Source, scores: dict[int, Tensor], pinned: list[tuple[int, int]], pool: str
) -> dict[int, Tensor]:
    """By layer, the experts in their order; super experts come first in every one."""
    orders = {}
    for layer, score in scores.items():
        is_pinned = torch.zeros(EXPERTS, dtype=torch.bool)
        is_pinned[[expert for of_layer, expert in pinned if of_layer == layer]] = True
        orders[layer] = order_experts(source.config, score, is_pinned, pool)
    return orders


if __name__ == "__main__":
    main()
