"""Time of the expert kernels beside their peers and beside what the machine can do at all.

    python scripts/bench_kernels.py [--device auto|cpu|cuda] [--shapes ...] [--tokens ...] [--quick]

The same inputs go through our kernel, an `F.grouped_mm` pipeline, Transformers' grouped_mm and
eager, a loop over experts and Liger; routing table in, y out. Contenders are interleaved in every
round; a contender that cannot or does not compute the same result is a row with its reason. The
limit of a case is the larger of bytes / bandwidth and FLOPs / matrix rate, both the best seen in
the same run. Also: time against mean k at fixed T, and a Transformers model with our experts.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from kernel_cases import SHAPES, Inputs, Mix, Shape, Work, make_inputs, make_weights, work_of
from kernel_linear import linear_cost
from kernel_peers import (
    BASELINE,
    GRAPH,
    TOLERANCE,
    Builder,
    Call,
    builders,
    qwen3_moe,
    reference_of,
    relative_error,
)
from kernel_timing import (
    Clock,
    Probes,
    Samples,
    describe,
    describe_machine,
    describe_versions,
    interleave,
)

Row = dict[str, Any]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DECODE = {"cpu": 1, "cuda": 64}  # up to this many tokens the caches are flushed before each call
COLD_READ = "cold_read"  # not a contender: a sum over as many bytes as the weights touched
FORWARD, BOTH, MODEL = "forward", "forward+backward", "model forward"
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "shapes": ["cpu-1024"],
        "tokens": [1, 8, 16, 64, 512],
        "mixed_tokens": [64, 512],
        "backward_tokens": [64, 512],
        "linear": ("cpu-1024", [64, 256], [1, 2, 4, 8, 16, 32, 48]),
        "model_tokens": [1, 64],
        "seconds": 4.0,
    },
    "cuda": {
        "shapes": ["deepseekmoe-16b", "dvpa-7b-32b", "qwen3-30b-a3b"],
        "tokens": [1, 8, 64, 512, 8192, 32768],
        "mixed_tokens": [8, 64, 512, 8192, 32768],
        "backward_tokens": [512, 8192, 32768],
        "linear": ("dvpa-7b-32b", [8192], [2, 4, 8, 15, 27, 37, 48]),
        "model_tokens": [1, 64, 8192],
        "seconds": 1.5,
    },
}
QUICK: dict[str, Any] = {
    "shapes": ["quick"],
    "tokens": [1, 16],
    "mixed_tokens": [16],
    "backward_tokens": [16],
    "linear": ("quick", [32], [1, 2, 4, 8]),
    "model_tokens": [4],
    "seconds": 0.1,
}


class Bench:
    """One run on one device: its clock, its probes, the rows so far."""

    def __init__(self, arguments: argparse.Namespace, plan: dict[str, Any]) -> None:
        self.device: str = arguments.device
        self.dtype_name: str = arguments.dtype
        self.dtype = DTYPES[self.dtype_name]
        self.only: list[str] | None = arguments.only
        self.seconds: float = arguments.seconds_per_case or plan["seconds"]
        self.plan = plan
        self.clock = Clock(self.device)
        self.probes = Probes(self.clock, self.dtype, arguments.quick)
        self.rows: list[Row] = []

    def case(
        self, shape: Shape, mix: Mix, tokens: int, weights: Any, threads: int, with_backward: bool
    ) -> None:
        """All contenders on one case; appends their rows."""
        is_decode = tokens <= DECODE[self.device] and not with_backward
        known = builders(self.device, with_graphs=self.device == "cuda" and is_decode)
        chosen = {k: v for k, v in known.items() if not self.only or k in self.only}
        row: Row = {
            "shape": shape.name,
            "tokens": tokens,
            "k": mix.label,
            "dtype": self.dtype_name,
            "threads": threads,
            "pass": BOTH if with_backward else FORWARD,
        }
        try:
            self.probes.run(threads)
            inputs = make_inputs(shape, mix, tokens, weights)
            row["work"] = work_of(inputs, with_backward)
            expected = reference_of(inputs)
        except torch.OutOfMemoryError as error:
            self.clock.release()
            reason = f"no reference: {describe(error)}"
            self.rows += [row | {"implementation": name, "error": reason} for name in chosen]
            return
        if with_backward:
            inputs = inputs.trainable()
        calls, extra, failed = self.prepare(chosen, inputs, expected, with_backward)
        names = list(chosen)
        if is_decode and self.device == "cpu" and not self.only:
            # What is left of the bandwidth when this few bytes are read once and cold.
            floats = torch.ones(row["work"].weight_bytes // 4)
            calls[COLD_READ] = floats.sum
            names.append(COLD_READ)
        samples = interleave(calls, self.clock, self.seconds, flush=is_decode)
        for name in names:
            found = samples.get(name) or Samples(error=failed[name])
            self.rows.append(row | {"implementation": name} | extra.get(name, {}) | found.row())
        self.print_case(len(names))
        self.clock.release()

    def prepare(
        self, chosen: dict[str, Builder], inputs: Inputs, expected: torch.Tensor, backward: bool
    ) -> tuple[dict[str, Call], dict[str, Row], dict[str, str]]:
        """(calls to time, error and memory of each, reasons of those that cannot be timed)."""
        calls: dict[str, Call] = {}
        extra: dict[str, Row] = {}
        failed: dict[str, str] = {}
        gradient = torch.randn_like(inputs.x) if backward else None
        for name, build in chosen.items():
            try:
                call = build(inputs)
                error = relative_error(call().detach(), expected)
                if not error <= TOLERANCE[self.dtype]:
                    failed[name] = f"wrong result: relative error {error:.1e}"
                    continue
                extra[name] = {"relative_error": error}
                if gradient is not None:
                    call = backward_of(call, inputs, gradient)
                    call()
                    extra[name]["peak_mib"] = self.clock.peak_mib(call)
                calls[name] = call
            except Exception as error:  # whatever a peer may raise is its row's reason
                failed[name] = describe(error)
                self.clock.release()
        return calls, extra, failed

    def print_case(self, count: int) -> None:
        """One line per case, so that a long run shows where it is."""
        rows = self.rows[-count:]
        times = {row["implementation"]: row.get("median_ms") for row in rows}
        shown = " ".join(f"{k} {v:.3f}" if v else f"{k} -" for k, v in times.items())
        row = rows[0]
        print(
            f"{row['shape']} {row['k']} T={row['tokens']} {row['pass']} threads={row['threads']}"
            f" [ms]: {shown}",
            flush=True,
        )

    def finished_rows(self) -> list[Row]:
        """The rows with limits and ratios, which later cases still move."""
        medians = {case_of(row): row["median_ms"] for row in self.rows if "median_ms" in row}
        finished = []
        for row in self.rows:
            work: Work | None = row.get("work")
            best = self.probes.best[str(row["threads"])]
            limit = work.limit_ms(best["bandwidth_gb_s"], best["gemm_gflop_s"]) if work else None
            ratio = fraction = gb_s = tflop_s = None
            if "median_ms" in row:
                baseline = medians.get(case_of(row, baseline_of(row)))
                ratio = baseline / row["median_ms"] if baseline else None
                if work is not None and limit is not None:
                    # As in the reference measurements: the limit against a quiet quarter's time.
                    fraction = limit / row["p25_ms"]
                    gb_s = work.weight_bytes / row["median_ms"] / 1e6
                    is_matmul = row["implementation"] != COLD_READ
                    tflop_s = work.flops / row["median_ms"] / 1e9 if is_matmul else None
            derived = {
                "limit_ms": limit,
                "ratio_to_grouped_mm": ratio,
                "fraction_of_limit": fraction,
                "gb_s": gb_s,
                "tflop_s": tflop_s,
            }
            finished.append({k: v for k, v in row.items() if k != "work"} | derived)
        return finished

    @torch.no_grad()
    def model(self, shape: Shape, tokens: int, threads: int) -> None:
        """A two-layer Qwen3-MoE of Transformers with each experts implementation."""
        base: Row = {
            "shape": f"Qwen3-MoE model, 2 layers of {shape.name}",
            "tokens": tokens,
            "k": shape.mixes[0].label,
            "dtype": self.dtype_name,
            "threads": threads,
            "pass": MODEL,
        }
        names = {"dvpa": "dvpa_in_transformers"} | {
            name: f"transformers_{name}" for name in ("grouped_mm", "eager")
        }
        try:
            model, ids = qwen3_moe(shape, tokens, self.dtype, self.device)
            expected = model(ids, use_cache=False).logits
        except Exception as error:
            failure = {"implementation": names["dvpa"], "error": describe(error)}
            self.rows.append(base | failure)
            return

        def forward(implementation: str) -> torch.Tensor:
            # What set_experts_implementation writes, without its walk over the modules.
            model.config._experts_implementation = implementation
            return model(ids, use_cache=False).logits

        calls: dict[str, Callable[[], torch.Tensor]] = {}
        errors: dict[str, str] = {}
        for key, name in names.items():
            try:
                model.set_experts_implementation(key)
                error = relative_error(model(ids, use_cache=False).logits, expected)
                if not error <= TOLERANCE[self.dtype]:
                    raise ValueError(f"wrong result: relative error {error:.1e}")
                calls[name] = lambda key=key: forward(key)
            except Exception as error:
                errors[name] = describe(error)
        is_decode = tokens <= DECODE[self.device]
        samples = interleave(calls, self.clock, self.seconds, flush=is_decode)
        for name in names.values():
            found = samples.get(name) or Samples(error=errors[name])
            self.rows.append(base | {"implementation": name} | found.row())
        self.print_case(len(names))


def case_of(row: Row, implementation: str | None = None) -> tuple[Any, ...]:
    """What identifies a row; with another implementation: the one it is compared with."""
    keys = ("shape", "tokens", "k", "dtype", "threads", "pass")
    return (*(row[key] for key in keys), implementation or row["implementation"])


def baseline_of(row: Row) -> str:
    """The `F.grouped_mm` contender under the same conditions."""
    if row["pass"] == MODEL:
        return "transformers_grouped_mm"
    return BASELINE + (GRAPH if row["implementation"].endswith(GRAPH) else "")


def backward_of(call: Call, inputs: Inputs, gradient: torch.Tensor) -> Call:
    """Forward and the gradients of every operand."""

    def forward_backward() -> torch.Tensor:
        out = call()
        torch.autograd.grad(out, inputs.leaves, gradient)
        return out.detach()

    return forward_backward


def finite(value: Any) -> Any:
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every case asked for. The file is written after each: a run cut short keeps what it has."""
    start = time.perf_counter()
    plan = QUICK if arguments.quick else DEFAULTS[arguments.device]
    bench = Bench(arguments, plan)
    shapes = [SHAPES[name] for name in arguments.shapes or plan["shapes"]]
    first = arguments.threads[0]
    result: dict[str, Any] = {
        "benchmark": "kernels",
        "machine": describe_machine(arguments.device),
        "versions": describe_versions(),
        "seconds_per_case": bench.seconds,
        "linear_cost": {},
    }

    def write() -> None:
        best = bench.probes.best
        result["measured"] = {**best.get(str(first), {}), "by_threads": best}
        result["rows"] = bench.finished_rows()
        result["wall_seconds"] = time.perf_counter() - start
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(finite(result), indent=1) + "\n")

    for threads in arguments.threads:
        if arguments.device == "cpu":
            torch.set_num_threads(threads)
        for shape in shapes:
            weights = make_weights(shape, bench.dtype, bench.device)
            for mix, tokens, with_backward in cases(
                shape, arguments, plan, is_first=threads == first
            ):
                with torch.set_grad_enabled(with_backward):
                    bench.case(shape, mix, tokens, weights, threads, with_backward)
                write()
            del weights
        if threads == first and "linear" not in arguments.skip:
            name, token_counts, ks = plan["linear"]
            result["linear_cost"] = linear_cost(
                SHAPES[name], token_counts, ks, bench.clock, bench.dtype, threads, 2 * bench.seconds
            )
        if threads == first and "model" not in arguments.skip:
            for tokens in plan["model_tokens"]:
                bench.model(shapes[-1], tokens, threads)
        write()
    return finite(result)


def cases(
    shape: Shape, arguments: argparse.Namespace, plan: dict[str, Any], is_first: bool
) -> Iterable[tuple[Mix, int, bool]]:
    """(mix, tokens, with backward) of a shape; --tokens replaces every list of tokens.

    Of the second and later thread counts only the forward pass with uniform k, to save minutes.
    """
    forward = arguments.tokens or plan["tokens"]
    for with_backward in (False, True):
        if (BOTH if with_backward else FORWARD) not in arguments.passes:
            continue
        for mix in shape.mixes:
            for tokens in forward:
                fits = tokens >= len(mix.tiers)
                if not arguments.tokens:
                    fits &= mix.is_uniform or tokens in plan["mixed_tokens"]
                    fits &= not with_backward or tokens in plan["backward_tokens"]
                if fits and (is_first or (mix.is_uniform and not with_backward)):
                    yield mix, tokens, with_backward


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Arguments with the defaults of the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--passes", nargs="+", choices=[FORWARD, BOTH], default=[FORWARD, BOTH])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument(
        "--threads", nargs="+", type=int, help="CPU threads (default: 2 1; --quick: 1)"
    )
    parser.add_argument("--seconds-per-case", type=float, help="default: 4 on CPU, 1.5 on a GPU")
    parser.add_argument("--only", nargs="+", help="implementations, as the rows name them")
    parser.add_argument("--skip", nargs="+", choices=["linear", "model"], default=[])
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it works")
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/kernels_DEVICE.json")
    arguments = parser.parse_args(words)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA GPU")
    if arguments.device == "cuda":  # the host's threads are no part of it
        arguments.threads = [torch.get_num_threads()]
    arguments.threads = arguments.threads or ([1] if arguments.quick else [2, 1])
    known = builders(arguments.device, with_graphs=arguments.device == "cuda")
    if unknown := set(arguments.only or ()) - set(known):
        parser.error(f"--only {' '.join(sorted(unknown))}: not one of {', '.join(known)}")
    if arguments.out is None:
        folder = Path("runs") if arguments.quick else Path("docs/benchmarks")
        suffix = "gpu" if arguments.device == "cuda" else "cpu"
        arguments.out = folder / f"kernels_{suffix}.json"
    return arguments


def main() -> None:
    """Measure and write the JSON."""
    arguments = parse()
    result = run(arguments)
    print(f"{len(result['rows'])} rows in {result['wall_seconds']:.0f} s -> {arguments.out}")


if __name__ == "__main__":
    main()
