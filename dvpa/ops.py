"""The one door to the kernels: every model file that multiplies experts comes through here.

`dvpa_kernels` decides nothing by itself: the backend is an argument (`auto`: by the device the
tensors are on), never read from the environment inside a forward pass, and said once in the log.
"""

import logging
from importlib.util import find_spec

import torch
from torch import Tensor

from dvpa_kernels import BACKENDS, IS_PACKAGE, make_routing, moe_mlp

if IS_PACKAGE:
    # The engine's forward needs these; a checkpoint's own code does not.
    from dvpa_kernels import DECODE_ROWS as DECODE_ROWS
    from dvpa_kernels import AttentionWeights as AttentionWeights
    from dvpa_kernels import DecodeLayer as DecodeLayer
    from dvpa_kernels import DecodeLayers as DecodeLayers
    from dvpa_kernels import DecodeRows as DecodeRows
    from dvpa_kernels import RoutedWeights as RoutedWeights
    from dvpa_kernels import RouterTable as RouterTable
    from dvpa_kernels import latent_attention as latent_attention
    from dvpa_kernels import latent_rows as latent_rows
    from dvpa_kernels import linear as linear
    from dvpa_kernels import rms_norm as rms_norm
    from dvpa_kernels import route as route
    from dvpa_kernels import swiglu as swiglu

logger = logging.getLogger(__name__)

# Anywhere else (MPS, XPU, meta) PyTorch's own grouped GEMM.
BACKEND_BY_DEVICE = {"cuda": "triton", "cpu": "cpu"}

# It comes with PyTorch for CUDA on Linux, not on Windows.
HAS_TRITON = find_spec("triton") is not None

_announced: set[tuple[str, str]] = set()


def resolve_backend(name: str = "auto", device_type: str = "cpu") -> str:
    """The kernel backend to use: `name` itself, or for `auto` the device's.

    Raises:
        ValueError: unknown name.
    """
    if name == "auto":
        if IS_PACKAGE:
            return _of_device(device_type)
        return "torch"
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} must be 'auto' or one of {', '.join(BACKENDS)}")
    return name


def expert_mlp(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_index: Tensor,
    topk_weight: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Routed SwiGLU experts: x [T, D], routing table [T, K] (index E: empty slot) -> [T, D]."""
    chosen = resolve_backend(backend, x.device.type)
    if not torch.compiler.is_compiling():
        _announce(chosen, x.device.type)
    routing = make_routing(topk_index, topk_weight, w_gate_up.shape[0])
    return moe_mlp(x, w_gate_up, w_down, routing, backend=chosen)


def _of_device(device_type: str) -> str:
    if device_type == "cuda" and not HAS_TRITON:
        return "torch"
    return BACKEND_BY_DEVICE.get(device_type, "torch")


def _announce(backend: str, device_type: str) -> None:
    if (backend, device_type) not in _announced:
        _announced.add((backend, device_type))
        level = logging.WARNING if (backend, device_type) == ("torch", "cuda") else logging.INFO
        logger.log(level, "expert backend on %s: %s", device_type, backend)
