"""What MFU is a share of: the FLOP/s that a run's processors could reach at most.

The data sheet's number for GPUs it is known for, in bf16; anything else (CPUs, other GPUs, fp32
products) is measured with one large matrix product. Such a measured peak is what this machine gave
at that moment, no more: MFU then says how much of a plain product's speed a step reaches.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch

from dvpa.plan.machine import MACHINES, Machine
from dvpa_train.processes import Processes

# SXM boards only: PCIe and NVL boards of the same name are slower.
DATA_SHEETS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
}
MEASURE_SECONDS = 0.2

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Peak:
    """FLOP/s of all processes together, and where the number is from."""

    flops: float
    source: str


def find_peak(precision: Precision, among: Processes) -> Peak:
    """The peak of the run's processes; each of them must call it, for they measure together."""
    has_gpu = torch.cuda.is_available()
    machine = data_sheet(torch.cuda.get_device_name(), precision) if has_gpu else None
    if machine is not None:
        own, source = machine.peak_flops, f"the data sheet of {machine.name}"
    else:
        among.barrier()  # processes that share a machine slow each other down
        device, size = ("cuda", 8192) if has_gpu else ("cpu", 1024)
        own = measure_peak(size, precision, torch.device(device))
        source = f"measured: a {size} x {size} product in {precision}"
    total = float(among.sum(torch.tensor([own], dtype=torch.float64)))
    return Peak(total, source)


def data_sheet(gpu: str, precision: Precision) -> Machine | None:
    """What is known of a GPU by the name its driver gives it; its peak is that of bf16 products."""
    name = DATA_SHEETS.get(gpu)
    return MACHINES[name] if name is not None and precision == "bf16" else None


def measure_peak(size: int, precision: Precision, device: torch.device) -> float:
    """FLOP/s of the fastest of several square products."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    own = torch.Generator().manual_seed(0)  # the run's own numbers must not depend on its log
    matrix = torch.rand(size, size, generator=own).to(device, dtype)
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < MEASURE_SECONDS or fastest == float("inf"):
        _wait(device)
        start = time.perf_counter()
        matrix @ matrix
        _wait(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
