"""The one door to the kernels: every model file that multiplies experts comes through here.

`dvpa_kernels` decides nothing by itself; the backend is an argument, resolved once per model by
`resolve_backend` and reported by it, never read from the environment inside a forward pass.
"""

import logging

from torch import Tensor

from dvpa_kernels import BACKENDS, make_routing, moe_mlp

logger = logging.getLogger(__name__)


def resolve_backend(name: str = "auto") -> str:
    """The kernel backend to use; `auto` is `torch` (grouped GEMM) until a faster one is installed.

    Raises:
        ValueError: unknown name.
    """
    chosen = "torch" if name == "auto" else name
    if chosen not in BACKENDS:
        raise ValueError(f"backend: {name!r} must be 'auto' or one of {', '.join(BACKENDS)}")
    logger.debug("expert backend: %s (asked for: %s)", chosen, name)
    return chosen


def expert_mlp(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    backend: str,
) -> Tensor:
    """Routed SwiGLU experts: x [T, D], routing table [T, K] (index E: empty slot) -> [T, D]."""
    routing = make_routing(topk_index, topk_weight, w_gate_up.shape[0])
    return moe_mlp(x, w_gate_up, w_down, routing, backend=backend)
