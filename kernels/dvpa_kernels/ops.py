"""The public op and its choice of backend.

Letters: T tokens, D hidden, F expert width, E experts, R rows.
"""

from collections.abc import Callable

from torch import Tensor

from dvpa_kernels.reference import moe_mlp_reference
from dvpa_kernels.routing import IS_PACKAGE, RowRouting, check_routing
from dvpa_kernels.torch_grouped import moe_mlp_torch


def _cpu(x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: RowRouting) -> Tensor:
    if IS_PACKAGE:
        from dvpa_kernels.cpu import moe_mlp_cpu

        return moe_mlp_cpu(x, w_gate_up, w_down, routing)
    raise RuntimeError("backend 'cpu': comes with the package dvpa; use 'torch'")


def _triton(x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: RowRouting) -> Tensor:
    if IS_PACKAGE:
        from dvpa_kernels.triton_moe import moe_mlp_triton

        return moe_mlp_triton(x, w_gate_up, w_down, routing)
    raise RuntimeError("backend 'triton': comes with the package dvpa; use 'torch'")


# triton and cpu are imported at their first call: they compile.
BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, RowRouting], Tensor]] = {
    "triton": _triton,
    "cpu": _cpu,
    "torch": moe_mlp_torch,
    "reference": moe_mlp_reference,
}


def moe_mlp(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: RowRouting, backend: str = "torch"
) -> Tensor:
    """SwiGLU experts over ragged rows, weighted and summed per token.

    Differentiable in `x`, `w_gate_up`, `w_down` and `routing.weight`; works under `torch.compile`.

    Args:
        x: [T, D] floating point.
        w_gate_up: [E, 2F, D], gate rows first; contiguous.
        w_down: [E, D, F]; contiguous.
        routing: rows from `make_routing`; a token may have any number of them, also none.
        backend: a key of `BACKENDS`: `triton` (CUDA), `cpu` (C++), `torch` (`F.grouped_mm`,
            anywhere), `reference` (the oracle).

    Returns:
        [T, D] in the dtype of `x`.

    Raises:
        ValueError: unknown backend, shapes, dtypes or devices that do not fit together, weights
            that are not contiguous, or a routing not made by `make_routing` that is not sound.
        RuntimeError: the backend cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} must be one of {', '.join(BACKENDS)}")
    _check_operands(x, w_gate_up, w_down, routing)
    if not routing.is_checked:
        check_routing(routing)
    return BACKENDS[backend](x, w_gate_up, w_down, routing)


def _check_operands(x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: RowRouting) -> None:
    for name, value, dims in (("x", x, 2), ("w_gate_up", w_gate_up, 3), ("w_down", w_down, 3)):
        if value.dim() != dims:
            raise ValueError(f"{name}: shape {tuple(value.shape)} must have {dims} dimensions")
    hidden, (experts, width2, _) = x.shape[-1], w_gate_up.shape
    if w_gate_up.shape != (experts, width2, hidden) or width2 % 2:
        raise ValueError(
            f"w_gate_up: shape {tuple(w_gate_up.shape)} must be [experts, 2 * width, {hidden}]"
        )
    if w_down.shape != (experts, hidden, width2 // 2):
        raise ValueError(
            f"w_down: shape {tuple(w_down.shape)} must be {(experts, hidden, width2 // 2)}"
        )
    if routing.num_experts != experts or routing.num_tokens != x.shape[0]:
        raise ValueError(
            f"routing: made for {routing.num_tokens} tokens and {routing.num_experts} experts, "
            f"x and w_gate_up have {x.shape[0]} and {experts}"
        )
    if not x.dtype == w_gate_up.dtype == w_down.dtype:
        raise ValueError(
            f"x, w_gate_up, w_down: dtypes {x.dtype}, {w_gate_up.dtype}, {w_down.dtype} differ"
        )
    for name, weight in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        if not weight.is_contiguous():
            raise ValueError(f"{name}: strides {weight.stride()} must be contiguous")
    if not x.device == w_gate_up.device == w_down.device == routing.token_index.device:
        raise ValueError(
            f"x, w_gate_up, w_down, routing: devices {x.device}, {w_gate_up.device}, "
            f"{w_down.device}, {routing.token_index.device} differ"
        )
