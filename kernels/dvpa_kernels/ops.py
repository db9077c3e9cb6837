"""The public op and its choice of backend.

Letters: T tokens, D hidden, F expert width, E experts, R rows.
"""

from collections.abc import Callable

from torch import Tensor

from dvpa_kernels.reference import moe_mlp_reference
from dvpa_kernels.routing import RowRouting
from dvpa_kernels.torch_grouped import moe_mlp_torch

BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, RowRouting], Tensor]] = {
    "torch": moe_mlp_torch,
    "reference": moe_mlp_reference,
}


def moe_mlp(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, routing: RowRouting, backend: str = "torch"
) -> Tensor:
    """SwiGLU experts over ragged rows, weighted and summed per token.

    Args:
        x: [T, D] floating point.
        w_gate_up: [E, 2F, D], gate rows first.
        w_down: [E, D, F].
        routing: rows from `make_routing`; a token may have any number of them, also none.
        backend: a key of `BACKENDS`.

    Returns:
        [T, D] in the dtype of `x`.

    Raises:
        ValueError: unknown backend, or shapes or dtypes that do not fit together.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} must be one of {', '.join(BACKENDS)}")
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
    return BACKENDS[backend](x, w_gate_up, w_down, routing)
