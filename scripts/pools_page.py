"""The comparison of pools for converted checkpoints: its part of docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t


def pools_part(result: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """(text, head, rows) of `scripts/bench_pools.py`; losses are above the top tier's."""
    seeds = result["seeds"]
    numbers = ", ".join(str(seed["seed"]) for seed in seeds)
    tops = [next(iter(seed["nll"]["default tiers"].values()))[-1] for seed in seeds]
    text = (
        f"`python scripts/bench_pools.py`: a small DeepSeek-V3 ({result['experts']} experts in 8 "
        f"groups, best 4, {result['top_k']} a token) trained for {result['steps']} steps on three "
        "quarters of Python's standard library, then measured as `dvpa convert` does on "
        f"{result['tokens']:,} tokens of the rest; nats per token over "
        f"{result['held_out_tokens']:,} others, before any tuning. Seeds {numbers}; "
        "the top tier, which is the source, has "
        + ", ".join(f"{top:.3f}" for top in tops)
        + ". Cells: loss above the top tier's, mean over seeds (each seed). "
        + _paired(seeds)
    )
    head = ["tiers", "pool", "order of experts"]
    rows = []
    for label, plans in seeds[0]["nll"].items():
        wishes = seeds[0]["tiers"][label]
        for plan in plans:
            pool, order = plan.split(", ")
            row = [label, pool, order]
            for tier in range(len(wishes) - 1):
                above = [
                    seed["nll"][label][plan][tier] - seed["nll"][label][plan][-1] for seed in seeds
                ]
                each = ", ".join(f"{value:.3f}" for value in above)
                _, size, top_k = wishes[tier]
                row.append(f"{size}:{top_k}: **{np.mean(above):.3f}** ({each})")
            rows.append(row)
    head += ["smallest pool", "middle pool"]
    return text, head, rows


def _paired(seeds: Sequence[Mapping[str, Any]]) -> str:
    """What the pools and the ranking change, seed by seed, over all pools below the top."""

    def difference(left: str, right: str) -> str:
        per_seed = []
        for seed in seeds:
            both = [
                np.subtract(plans[left][:-1], plans[right][:-1]) for plans in seed["nll"].values()
            ]
            per_seed.append(np.concatenate(both).mean())
        values = np.array(per_seed)
        half = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
        return f"{values.mean():+.3f} ({values.mean() - half:+.3f} .. {values.mean() + half:+.3f})"

    return (
        "Differences over all four pools, with 95 % t intervals over the seeds: striped less "
        f"prefix, by REAP, {difference('striped, REAP', 'prefix, REAP')}; REAP less random orders, "
        f"striped, {difference('striped, REAP', 'striped, random')}, prefix, "
        f"{difference('prefix, REAP', 'prefix, random')}; REAP times tokens less REAP, striped, "
        f"{difference('striped, REAP x tokens', 'striped, REAP')}."
    )
