"""The kernel benchmark's machine: what it is, its clocks and limits, and interleaved rounds."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

WARM_UP = 1  # the result was compared before, so this is at least the second call
MIN_ROUNDS, MAX_ROUNDS = 5, 200
SLOW_ROUNDS = 2
FLUSH_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}


@dataclass
class Samples:
    """Milliseconds of one contender, wall (GPU: device) and process CPU; or the reason why none."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """Medians and the 25th percentile; or the reason why there are none."""
        if self.error is not None:
            return {"error": self.error}
        return {
            "median_ms": statistics.median(self.wall_ms),
            "p25_ms": quartile(self.wall_ms),
            "cpu_ms": statistics.median(self.cpu_ms),
            "rounds": len(self.wall_ms),
        }


def quartile(values: list[float]) -> float:
    """The 25th percentile, interpolated."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=4, method="inclusive")[0]


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._buffer: torch.Tensor | None = None

    def measure(self, call: Callable[[], object]) -> tuple[float, float]:
        """(wall or device ms, process CPU ms) of one call."""
        if self.device != "cuda":
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cpu = time.process_time()
        start.record()
        call()
        end.record()
        cpu = time.process_time() - cpu
        end.synchronize()
        return start.elapsed_time(end), 1e3 * cpu

    def flush(self) -> None:
        """Push the weights out of the caches. On a GPU the fill also hides the first launch."""
        if self._buffer is None:
            size = FLUSH_BYTES["cuda" if self.device == "cuda" else "cpu"]
            self._buffer = torch.zeros(size // 4, dtype=torch.int32, device=self.device)
        self._buffer.add_(1)

    def release(self) -> None:
        """Give back cached GPU memory, so that the next call does not run out of it."""
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """Most GPU memory a call holds beyond what was held before; None without a GPU."""
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


class Probes:
    """Best read bandwidth and matrix rate seen in this run, per thread count."""

    def __init__(self, clock: Clock, dtype: torch.dtype, is_quick: bool) -> None:
        gpu = clock.device == "cuda"
        self.clock = clock
        self.best: dict[str, dict[str, float]] = {}
        size = (1 << 30 if gpu else 256 << 20) >> (4 if is_quick else 0)
        side = (8192 if gpu else 1024) >> (1 if is_quick else 0)
        self._data = torch.ones(size // 4, device=clock.device)
        self._copy = torch.empty_like(self._data) if gpu else None
        # A CPU without bf16 arithmetic multiplies bf16 matrices far slower than a kernel that
        # widens them would: its limit is the fp32 rate.
        self._matrices = [
            torch.randn(2, side, side, device=clock.device).to(kind)
            for kind in ({dtype} if gpu else {dtype, torch.float32})
        ]

    def run(self, threads: int, rounds: int = 3) -> None:
        """Probe again; the best so far stays."""
        best = self.best.setdefault(str(threads), {"bandwidth_gb_s": 0.0, "gemm_gflop_s": 0.0})
        for _ in range(rounds):
            ms = self.clock.measure(self._data.sum)[0]
            gb_s = self._data.nbytes / ms / 1e6
            if self._copy is not None:  # reads and writes; whichever the memory does faster
                ms = self.clock.measure(lambda: self._copy.copy_(self._data))[0]
                gb_s = max(gb_s, 2 * self._data.nbytes / ms / 1e6)
            best["bandwidth_gb_s"] = max(best["bandwidth_gb_s"], gb_s)
            for left, right in self._matrices:
                ms = self.clock.measure(lambda a=left, b=right: a @ b.t())[0]
                gflop_s = 2 * len(left) ** 3 / ms / 1e6
                key = f"gemm_gflop_s_{str(left.dtype).removeprefix('torch.')}"
                best[key] = max(best.get(key, 0.0), gflop_s)
                best["gemm_gflop_s"] = max(best["gemm_gflop_s"], gflop_s)


def describe(error: BaseException) -> str:
    """Class and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def interleave(
    calls: Mapping[str, Callable[[], object]], clock: Clock, seconds: float, flush: bool
) -> dict[str, Samples]:
    """Every contender in every round, the first one changing, until the time is used up.

    At least MIN_ROUNDS, also beyond the budget; SLOW_ROUNDS of a contender that would use up the
    budget alone. One that fails leaves with its reason.
    """
    samples = {name: Samples() for name in calls}
    running = list(calls)
    slow: set[str] = set()

    def attempt(name: str, is_kept: bool) -> None:
        try:
            if flush:
                clock.flush()
            wall, cpu = clock.measure(calls[name])
        except Exception as error:  # whatever a peer may raise is its row's reason
            samples[name] = Samples(error=describe(error))
            running.remove(name)
            clock.release()
            return
        if wall * MIN_ROUNDS > 1e3 * seconds:
            slow.add(name)
        if is_kept:
            samples[name].wall_ms.append(wall)
            samples[name].cpu_ms.append(cpu)
            if name in slow and len(samples[name].wall_ms) >= SLOW_ROUNDS:
                running.remove(name)

    for name in list(running):
        for _ in range(WARM_UP):
            if name in running:
                attempt(name, is_kept=False)
    start = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        if not running:
            break
        turn = number % len(running)
        for name in running[turn:] + running[:turn]:
            attempt(name, is_kept=True)
    return samples


def describe_machine(device: str) -> dict[str, str]:
    """Processor and GPU; no host name, user or path."""
    machine = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
        "device": device,
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        machine["cpu"] = models[0] if models else "unknown"
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    else:
        try:
            from dvpa_kernels.cpu import status

            machine["cpu_kernel"] = str(status().isa)
        except Exception as error:
            machine["cpu_kernel"] = describe(error)
    return machine


def describe_versions() -> dict[str, str]:
    """Versions of what takes part."""
    versions = {"python": platform.python_version()}
    for package in ("dvpa", "torch", "triton", "transformers", "liger-kernel", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
