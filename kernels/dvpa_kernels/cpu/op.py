"""The CPU backend of `moe_mlp`: the C++ kernel where it wins, `F.grouped_mm` elsewhere.

Training takes one expert after the other (`per_expert.py`).

Letters: T tokens, D hidden, F expert width, E experts, R rows.
"""

import torch
from torch import Tensor

from dvpa_kernels.cpu.library import FORMATS, run_kernel, status
from dvpa_kernels.cpu.train import row_ops
from dvpa_kernels.per_expert import MoeMlpPerExpert
from dvpa_kernels.routing import COLUMNS, RowRouting
from dvpa_kernels.torch_grouped import moe_mlp_torch

# Mean rows of the experts that have any, above which F.grouped_mm takes over: for fp32, and for
# bf16 and fp16. Measured with D 1024, F 512, E 64, K 8 on one core of a busy AVX-512 machine that
# has no bf16 instructions (CPU time; times faster than F.grouped_mm, by rows per expert):
#   avx512 bf16: 2.4 at 1, 2.8 at 8, 3.4 at 64, 3.4 at 256;  fp16: 4.1 at 8, 6.9 at 64, 6.4 at 256
#   avx512 fp32: 1.2 at 1, 1.8 at 8, 0.9 to 1.4 at 64, 0.8 to 1.1 at 256
# Forced there, so against an AVX-512 grouped_mm:
#   avx2 bf16: 2.1 at 8, 2.1 at 64, 2.2 at 256;  fp32: 1.3 at 8, 0.8 at 32
#   plain bf16: 1.7 at 1, 1.2 at 1.6, 0.7 at 8;  fp32: 1.2 at 1, 0.8 at 1.6
# Rows come in blocks of 64, so what holds at 256 holds beyond. avx512_bf16 is not measured;
# grouped_mm has those instructions too, hence the caution.
MAX_ROWS_PER_EXPERT = {
    "plain": (1, 2),
    "avx2": (8, 4096),
    "avx512": (64, 4096),
    "avx512_bf16": (64, 16),
}


def max_rows_per_expert(isa: str, dtype: torch.dtype) -> int:
    """The entry of MAX_ROWS_PER_EXPERT."""
    return MAX_ROWS_PER_EXPERT[isa][0 if dtype == torch.float32 else 1]


def moe_mlp_cpu(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: RowRouting, isa: str | None = None
) -> Tensor:
    """As `moe_mlp_torch`; sums in fp32 throughout, and bitwise the same for any number of threads.

    `MoeMlpPerExpert` does it instead where a gradient is asked for (under `torch.compile`,
    `moe_mlp_torch`); `moe_mlp_torch` does where experts have many rows each, for fp64, and on a
    machine without the kernel (announced once). Without gradients, compiled, this is one operator,
    `dvpa_kernels::cpu_moe_mlp`.

    Args:
        x: [T, D] on the CPU.
        w_gate_up: [E, 2F, D].
        w_down: [E, D, F].
        routing: from `make_routing`.
        isa: force the kernel, with this instruction set (one of `status().isas`); for tests.

    Raises:
        RuntimeError: the operands are not on the CPU.
        ValueError: this machine cannot run `isa`.
    """
    if x.device.type != "cpu":
        raise RuntimeError(f"backend 'cpu': x is on {x.device}; use 'triton' or 'torch' there")
    floating = (x, w_gate_up, w_down, routing.weight)
    wants_grad = torch.is_grad_enabled() and any(value.requires_grad for value in floating)
    is_traced = torch.compiler.is_compiling() or type(x) is not Tensor
    y: Tensor
    if wants_grad and not is_traced:
        columns = routing.without_padding().columns
        ops = row_ops(x.dtype)
        y = MoeMlpPerExpert.apply(ops, x, w_gate_up, w_down, *columns)  # type: ignore[no-untyped-call]
        return y
    if wants_grad or x.dtype not in FORMATS:
        return moe_mlp_torch(x, w_gate_up, w_down, routing)
    if is_traced:
        y = cpu_moe_mlp(x, w_gate_up, w_down, *routing.columns)
        return y
    return _run(x, w_gate_up, w_down, routing, isa)


def _run(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: RowRouting, isa: str | None
) -> Tensor:
    """Kernel or grouped GEMM, by what is loaded and the rows an expert has; eager only."""
    if isa is None:
        isa = status().isa
        if isa is None or _is_large(routing, max_rows_per_expert(isa, x.dtype)):
            return moe_mlp_torch(x, w_gate_up, w_down, routing)
    return run_kernel(x, w_gate_up, w_down, routing, isa, torch.get_num_threads())


def _is_large(routing: RowRouting, max_rows: int) -> bool:
    rows = routing.token_index.shape[0]
    if rows <= max_rows:  # decode: not worth counting
        return False
    used = int(torch.count_nonzero(routing.expert_offsets.diff()))
    return rows > max_rows * used


@torch.library.custom_op(
    "dvpa_kernels::cpu_moe_mlp",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor w_gate_up, Tensor w_down, {COLUMNS}) -> Tensor",
)
def cpu_moe_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor, *columns: Tensor) -> Tensor:
    """`moe_mlp_cpu` for a graph: the rows come with their padding, which is cut off here."""
    routing = RowRouting.of_columns(columns, x.shape[0]).without_padding()
    return _run(x, w_gate_up, w_down, routing, None)


@cpu_moe_mlp.register_fake
def _(x: Tensor, *_rest: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
