"""The weights of a decoder layer as its kernel takes them: checked once, then pointers.

Letters: D hidden, H heads, N no-rope dims, P rope dims, V value dims, C latent, Q query latent,
F width, E routed experts.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from dvpa_kernels.cpu.router import TableStruct, table_struct
from dvpa_kernels.router import RouterTable


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Multi-head latent attention in the absorbed form; all contiguous and of one dtype.

    `into` is [H * (N + P) + C + P, D], or [Q + C + P, D] with a query latent: then there are
    `query_norm` and `query_up`, too. `eps` is that of the latents' norms.
    """

    into: Tensor
    into_bias: Tensor | None  # one for each row of `into`
    query_norm: Tensor | None  # [Q]
    query_up: Tensor | None  # [H * (N + P), Q]
    latent_norm: Tensor  # [C]
    key_up: Tensor  # [H, C, N]
    value_up: Tensor  # [H, V, C]
    out: Tensor  # [D, H * V]
    out_bias: Tensor | None  # [D]
    eps: float
    scaling: float
    interleaved: bool


@dataclass(frozen=True, kw_only=True)
class RoutedWeights:
    """Router and routed experts; all contiguous, `tier_bias` fp32, the others of one dtype."""

    router: Tensor  # [E, D]
    tier_bias: Tensor  # [tiers, E]
    table: RouterTable
    gate_up: Tensor  # [E, 2F, D]
    down: Tensor  # [E, D, F]


_SIZES = (
    *("hidden", "heads", "nope", "rope", "value", "latent", "query_latent"),
    *("mlp_width", "experts", "expert_width", "interleaved"),
)
_POINTERS = (
    *("attention_norm", "into", "into_bias", "query_norm", "query_up", "latent_norm"),
    *("key_up", "value_up", "out", "out_bias", "mlp_norm", "mlp_gate_up", "mlp_down"),
    *("router", "tier_bias", "experts_gate_up", "experts_down"),
)


class LayerStruct(ctypes.Structure):
    """`Layer` of layer.inc; keeps what it points to alive."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_float) for name in ("epsilon", "latent_epsilon", "scaling")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("table", TableStruct),
    )
    tensors: tuple[Tensor | None, ...]


def layer_struct(
    attention_norm: Tensor,
    attention: AttentionWeights,
    mlp_norm: Tensor,
    eps: float,
    mlp: tuple[Tensor, Tensor] | None,
    routed: RoutedWeights | None,
) -> LayerStruct:
    """See `DecodeLayer` for the arguments.

    Raises:
        ValueError: tensors that do not fit together, are not contiguous or not on the CPU.
    """
    a, r, hidden = attention, routed, len(attention_norm)
    heads, latent, nope = a.key_up.shape
    value = a.value_up.shape[1]
    query_latent = 0 if a.query_norm is None else len(a.query_norm)
    if query_latent:
        rope = len(a.into) - query_latent - latent
    else:
        rope = (len(a.into) - heads * nope - latent) // (heads + 1)
    if rope < 2 or rope % 2:
        raise ValueError(f"into: {len(a.into)} rows leave no even number for the rope")
    if (a.query_norm is None) != (a.query_up is None):
        raise ValueError("query_norm, query_up: must both be there, or neither")
    query = heads * (nope + rope)
    into = (query_latent or query) + latent + rope
    width = 0 if mlp is None else mlp[1].shape[-1]
    experts = 0 if r is None else len(r.router)
    expert_width = 0 if r is None else r.down.shape[-1]
    tiers = 0 if r is None else len(r.table.pool_sizes)
    if r is not None and max(r.table.pool_sizes) > experts:
        raise ValueError(f"table: pools {r.table.pool_sizes} must be within {experts} experts")
    tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "attention_norm": (attention_norm, (hidden,)),
        "into": (a.into, (into, hidden)),
        "into_bias": (a.into_bias, (into,)),
        "query_norm": (a.query_norm, (query_latent,)),
        "query_up": (a.query_up, (query, query_latent)),
        "latent_norm": (a.latent_norm, (latent,)),
        "key_up": (a.key_up, (heads, latent, nope)),
        "value_up": (a.value_up, (heads, value, latent)),
        "out": (a.out, (hidden, heads * value)),
        "out_bias": (a.out_bias, (hidden,)),
        "mlp_norm": (mlp_norm, (hidden,)),
        "mlp_gate_up": (mlp and mlp[0], (2 * width, hidden)),
        "mlp_down": (mlp and mlp[1], (hidden, width)),
        "router": (None if r is None else r.router, (experts, hidden)),
        "tier_bias": (None if r is None else r.tier_bias, (tiers, experts)),
        "experts_gate_up": (None if r is None else r.gate_up, (experts, 2 * expert_width, hidden)),
        "experts_down": (None if r is None else r.down, (experts, hidden, expert_width)),
    }
    for name, (tensor, shape) in tensors.items():
        if tensor is not None:
            _check(name, tensor, shape, attention_norm.dtype)
    struct = LayerStruct(
        *(hidden, heads, nope, rope, value, latent, query_latent, width, experts, expert_width),
        *(a.interleaved, eps, a.eps, a.scaling),
    )
    struct.tensors = tuple(tensor for tensor, _ in tensors.values())
    for name, (tensor, _) in tensors.items():
        setattr(struct, name, None if tensor is None else tensor.data_ptr())
    if r is not None:
        struct.table = table_struct(r.table)
    return struct


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    expected = torch.float32 if name == "tier_bias" else dtype
    if tensor.shape != shape or tensor.dtype != expected:
        raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} must be {expected} {shape}")
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: strides {tensor.stride()} on {tensor.device} must be contiguous on the CPU"
        )
