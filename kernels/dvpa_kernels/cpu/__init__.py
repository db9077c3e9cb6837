"""The kernels for CPUs, in C++, built at their first use."""

from dvpa_kernels.cpu.library import CpuKernel, status
from dvpa_kernels.cpu.op import moe_mlp_cpu

__all__ = ["CpuKernel", "moe_mlp_cpu", "status"]
