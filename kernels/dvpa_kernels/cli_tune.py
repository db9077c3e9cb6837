"""Offline search for launch settings: `python -m dvpa_kernels.tuning` on the GPU to tune for.

For each shape and each mean number of rows per expert, every kernel is timed on random rows with
every candidate that compiles and fits; the tile height is chosen by the sum over the kernels that
share it. The result is a table for `tuning.py`, to be committed.

Letters: T tokens, D hidden, F expert width, E experts, K slots, R rows.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from dvpa_kernels.grouped_gemm import packed_matmul, up_projection
from dvpa_kernels.grouped_gemm_backward import activation_gradient, weight_gradient
from dvpa_kernels.routing import RowRouting, make_routing
from dvpa_kernels.tiles import build_tiles
from dvpa_kernels.tuning import (
    HOPPER,
    Launch,
    Plan,
    bucket_of,
    default_plan,
    load_table,
    plan_to_json,
    shared_bytes,
    table_path,
)

# name: D, F, E, K
SHAPES = {
    "deepseek-moe-16b": (2048, 1408, 64, 6),
    "dvpa-7b-32b": (4096, 1024, 256, 15),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
}
ROWS_PER_EXPERT = (1, 8, 32, 64, 256, 1024)
TILE_HEIGHTS = {1: (16,), 8: (16,), 32: (16, 32), 64: (32, 64), 256: (64, 128), 1024: (64, 128)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SECONDS_PER_CANDIDATE = 0.02


@dataclass(frozen=True)
class Workload:
    """Random operands of one shape and row count."""

    x_TD: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    act_RF: Tensor
    h_R2F: Tensor
    routing: RowRouting

    @property
    def rows(self) -> int:
        """R."""
        return self.routing.token_index.shape[0]


def make_workload(
    shape: tuple[int, int, int, int], rows_per_expert: int, dtype: torch.dtype, device: str
) -> Workload:
    """Uniform k; experts drawn at random, so that their row counts differ as in real use."""
    hidden, width, experts, slots = shape
    tokens = max(1, rows_per_expert * experts // slots)
    table = torch.rand(tokens, experts, device=device).topk(slots).indices
    routing = make_routing(table, torch.rand(tokens, slots, device=device), experts)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    return Workload(
        random(tokens, hidden),
        random(experts, 2 * width, hidden) * hidden**-0.5,
        random(experts, hidden, width) * width**-0.5,
        random(tokens * slots, width),
        random(tokens * slots, 2 * width),
        routing,
    )


def candidates(height: int, pair: bool) -> Iterator[Launch]:
    """Launches for tiles of `height` rows; `pair`: two accumulators (gate and up)."""
    if height <= 32:
        blocks = ((32, 128), (64, 128), (32, 256), (128, 64))
        for (n, k), stages in ((block, stages) for block in blocks for stages in (4, 6)):
            yield Launch(n, k, warps=4, stages=stages, group=1)
        return
    for n in (64, 128) if pair else (128, 256):
        for stages in (3, 4):
            for warps in (4, 8):
                yield Launch(n, 64, warps=warps, stages=stages)


def weight_candidates() -> Iterator[Launch]:
    """Launches of the weight gradient."""
    for n, k, stages in ((128, 32, 5), (128, 64, 4), (128, 64, 5), (256, 32, 5), (256, 64, 4)):
        yield Launch(n, k, warps=8, stages=stages, block_m=128)


def fastest(
    time_of: Callable[[Launch], float], launches: Iterator[Launch], say: Callable[[str], None]
) -> tuple[float, Launch]:
    """(milliseconds, launch); a candidate that does not compile or fit is reported and left out.

    Raises:
        RuntimeError: if no candidate runs.
    """
    best: tuple[float, Launch] | None = None
    for launch in launches:
        for option in (launch, replace(launch, tma=False)):
            try:
                spent = time_of(option)
            except (TritonError, RuntimeError) as error:
                say(f"    {option}: {type(error).__name__}: {str(error)[:80]}")
                continue
            if best is None or spent < best[0]:
                best = (spent, option)
    if best is None:
        raise RuntimeError("autotune: no candidate runs on this GPU")
    return best


def tune(work: Workload, rows_per_expert: int, say: Callable[[str], None]) -> Plan:
    """The fastest plan for one workload."""
    itemsize, r = work.x_TD.itemsize, work.routing
    plan = default_plan(itemsize, rows_per_expert)

    def timed(call: Callable[[], Any]) -> float:
        call()  # compiles
        limit = int(SECONDS_PER_CANDIDATE * 1000)
        return float(triton.testing.do_bench(call, warmup=5, rep=limit, return_mode="median"))

    def fits(height: int, pair: bool) -> Iterator[Launch]:
        outputs = 2 if pair else 1
        for launch in candidates(height, pair):
            if shared_bytes(launch, height, outputs, itemsize) <= HOPPER.shared:
                yield launch

    forward: list[tuple[float, Plan]] = []
    backward: list[tuple[float, Plan]] = []
    for height in TILE_HEIGHTS[rows_per_expert]:
        tiles = build_tiles(r.expert_offsets, work.rows, height)

        def up(launch: Launch, tiles: Tensor = tiles, height: int = height) -> float:
            arguments = (work.x_TD, work.gate_up_E2FD, r.token_index, tiles, launch, height)
            return timed(lambda: up_projection(*arguments, keep=False))

        def matmul(
            launch: Launch, down: bool, tiles: Tensor = tiles, height: int = height
        ) -> float:
            packed, weight = (
                (work.act_RF, work.down_EDF) if down else (work.h_R2F, work.gate_up_E2FD)
            )
            return timed(lambda: packed_matmul(packed, weight, tiles, launch, height, down))

        def gradient(launch: Launch, tiles: Tensor = tiles, height: int = height) -> float:
            first = (work.x_TD, work.down_EDF, work.h_R2F, r.weight, r.token_index)
            return timed(lambda: activation_gradient(*first, tiles, launch, height))

        times = {
            "up": fastest(up, fits(height, True), say),
            "down": fastest(lambda launch: matmul(launch, True), fits(height, False), say),
            "grad_act": fastest(gradient, fits(height, True), say),
            "grad_x": fastest(lambda launch: matmul(launch, False), fits(height, False), say),
        }
        chosen: dict[str, Any] = {name: launch for name, (_, launch) in times.items()}
        plan = replace(plan, **chosen)
        forward.append((times["up"][0] + times["down"][0], replace(plan, rows=height)))
        backward.append(
            (times["grad_act"][0] + times["grad_x"][0], replace(plan, grad_rows=height))
        )
        say(f"  {height} rows: " + ", ".join(f"{n} {t:.3f} ms" for n, (t, _) in times.items()))
    best, best_back = (min(part, key=lambda entry: entry[0])[1] for part in (forward, backward))

    def weight(launch: Launch) -> float:
        arguments = (work.h_R2F, work.x_TD, r.token_index, r.expert_offsets, launch)
        return timed(lambda: weight_gradient(*arguments, gather_left=False))

    return replace(
        best,
        grad_rows=best_back.grad_rows,
        grad_act=best_back.grad_act,
        grad_x=best_back.grad_x,
        grad_weight=fastest(weight, weight_candidates(), say)[1],
    )


def main(arguments: list[str] | None = None) -> None:
    """Tune the named shapes within a time limit and write the table of this GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m dvpa_kernels.tuning",
        description="Measure launch settings on this GPU and write them for later runs.",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS_PER_EXPERT, default=None)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=540.0, help="start nothing after this")
    parser.add_argument("--out", type=Path, default=None, help="default: the package's table")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("autotune: no CUDA device; run it on the GPU to tune for")
    device = torch.cuda.get_device_name()
    path: Path = options.out or table_path(device)
    plans = list(load_table(path)) if path.is_file() else []
    begun, dtype = time.monotonic(), DTYPES[options.dtype]
    for rows in options.rows or ROWS_PER_EXPERT:
        for name in options.shapes:
            if time.monotonic() - begun > options.seconds:
                print(f"{name}, {rows} rows per expert: no time left, not tuned", flush=True)
                continue
            print(f"{name}, {rows} rows per expert", flush=True)
            hidden, width, experts, _ = SHAPES[name]
            work = make_workload(SHAPES[name], rows, dtype, "cuda")
            key = {
                "itemsize": dtype.itemsize,
                "hidden": hidden,
                "width": width,
                "experts": experts,
                "rows_per_expert": bucket_of(work.rows, experts),
            }
            plan = tune(work, rows, lambda line: print(line, flush=True))
            del work
            plans = [p for p in plans if any(p[n] != v for n, v in key.items())]
            plans.append({**key, "plan": plan_to_json(plan)})
            # After every entry: what was measured survives a run that is cut off.
            path.parent.mkdir(parents=True, exist_ok=True)
            header = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
            path.write_text(json.dumps({**header, "plans": plans}, indent=1) + "\n")
    print(path)
