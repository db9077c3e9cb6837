"""Time against mean k at fixed T: the cost of routed rows, for uniform and mixed k."""

from typing import Any

import numpy as np
import torch
from kernel_cases import Mix, Shape, make_inputs, make_weights, mixed, uniform
from kernel_peers import BASELINE, Call, builders
from kernel_timing import Clock, Samples, describe, interleave


def mixes_of(ks: list[int], pool: int) -> list[Mix]:
    """Every k for itself, and batches that mix two of them in equal parts.

    All experts in every pool, so that only the number of rows changes.
    """
    pairs = [*zip(ks, ks[2:], strict=False), (ks[0], ks[-1])]
    return [uniform(k, pool) for k in ks] + [mixed((a, pool), (b, pool)) for a, b in pairs]


@torch.no_grad()
def linear_cost(
    shape: Shape,
    token_counts: list[int],
    ks: list[int],
    clock: Clock,
    dtype: torch.dtype,
    threads: int,
    seconds: float,
) -> dict[str, Any]:
    """Ours and the pipeline over all mixes; every point in every round, so drift hits all alike.

    Returns `experiments`: per tokens and implementation the points (mean_k, times) and their line.
    """
    mixes = mixes_of(ks, shape.experts)
    ours = f"dvpa_{'triton' if clock.device == 'cuda' else 'cpu'}"
    known = builders(clock.device, with_graphs=False)
    weights = make_weights(shape, dtype, clock.device)
    experiments = []
    for tokens in token_counts:
        calls: dict[str, Call] = {}
        failed: dict[str, Samples] = {}
        for name in (ours, BASELINE):
            for mix in mixes:
                label = f"{name} {mix.label}"
                try:
                    call = known[name](make_inputs(shape, mix, tokens, weights))
                    call()
                    calls[label] = call
                except Exception as error:  # the point's reason
                    failed[label] = Samples(error=describe(error))
        samples = interleave(calls, clock, seconds, flush=False) | failed
        for name in (ours, BASELINE):
            points = [
                {
                    "mean_k": float(np.mean(mix.slots(tokens))),
                    "mix": mix.label,
                    "is_uniform": mix.is_uniform,
                    **samples[f"{name} {mix.label}"].row(),
                }
                for mix in mixes
            ]
            found = {
                "shape": shape.name,
                "tokens": tokens,
                "threads": threads,
                "implementation": name,
                "points": points,
                "fit": line_fit(points),
            }
            experiments.append(found)
            print(
                f"{shape.name} time against mean k, T={tokens}, {name}: {found['fit']}", flush=True
            )
    return {"experiments": experiments}


def line_fit(points: list[dict[str, Any]]) -> dict[str, float] | None:
    """Least squares of the medians over mean k: slope, intercept, R^2, and how far the mixed points
    are from the line through the uniform ones.
    """
    good = [point for point in points if "median_ms" in point]
    if len(good) < 3:
        return None
    k = np.array([point["mean_k"] for point in good])
    ms = np.array([point["median_ms"] for point in good])
    slope, intercept = np.polyfit(k, ms, 1)
    residual = float(((ms - slope * k - intercept) ** 2).sum())
    is_uniform = np.array([point["is_uniform"] for point in good])
    line = np.poly1d(np.polyfit(k[is_uniform], ms[is_uniform], 1))
    mixed_off = np.abs(ms / line(k) - 1)[~is_uniform]
    return {
        "slope_ms_per_k": float(slope),
        "intercept_ms": float(intercept),
        "r2": 1 - residual / float(((ms - ms.mean()) ** 2).sum()),
        "mixed_off_uniform_line": float(mixed_off.max()) if mixed_off.size else 0.0,
    }
