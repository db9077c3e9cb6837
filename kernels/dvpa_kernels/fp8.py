"""FP8 (E4M3) forward pass for inference: block-scaled weights, activations quantised on the fly.

Weights carry one fp32 scale per 128 x 128 block (edges rounded up), activations one per token and
128 columns; a value is code * scale, as in DeepSeek-V3's checkpoints. Every 128 products are summed
by the matrix unit, scaled, and added up in fp32.

Letters: T tokens, D hidden, F expert width, E experts, R rows; d, f, f2 are D, F, 2F in blocks.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import torch
import torch.nn.functional as F
from torch import Tensor

from dvpa_kernels.routing import COLUMNS, RowRouting, check_routing
from dvpa_kernels.triton_moe import HAS_TRITON, require_triton

if HAS_TRITON:
    from dvpa_kernels import fp8_gemm

FP8 = torch.float8_e4m3fn
BLOCK = 128
LARGEST = 448.0  # the largest E4M3 number
SMALLEST = 1e-12  # keeps the scale of an all-zero block above zero
CAPABILITY = (8, 9)  # the first GPUs with FP8 matrix units


def moe_mlp_fp8(
    x: Tensor,
    w_gate_up: Tensor,
    gate_up_scale: Tensor,
    w_down: Tensor,
    down_scale: Tensor,
    routing: RowRouting,
) -> Tensor:
    """`moe_mlp` over FP8 weights; without gradients.

    Args:
        x: [T, D] fp32, bf16 or fp16.
        w_gate_up: E4M3 [E, 2F, D], gate rows first; contiguous.
        gate_up_scale: fp32 [E, ceil(2F / 128), ceil(D / 128)]; contiguous.
        w_down: E4M3 [E, D, F]; contiguous.
        down_scale: fp32 [E, ceil(D / 128), ceil(F / 128)]; contiguous.
        routing: rows from `make_routing`.

    Returns:
        [T, D] in the dtype of x.

    Raises:
        ValueError: operands that do not fit together, naming the argument.
        RuntimeError: Triton or a GPU with FP8 matrix units is missing, or x wants a gradient.
    """
    _check(x, w_gate_up, gate_up_scale, w_down, down_scale, routing)
    if not routing.is_checked:
        check_routing(routing)
    require_triton(x)
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < CAPABILITY:
        raise RuntimeError(
            f"moe_mlp_fp8: compute capability {torch.cuda.get_device_capability(x.device)} has no "
            f"FP8 matrix units, {CAPABILITY} is the first; dequantise and use moe_mlp"
        )
    if torch.is_grad_enabled() and (x.requires_grad or routing.weight.requires_grad):
        raise RuntimeError("moe_mlp_fp8 has no backward pass: call it under torch.no_grad()")
    y: Tensor = moe_mlp_fp8_op(x, w_gate_up, gate_up_scale, w_down, down_scale, *routing.columns)
    return y


def blocks(size: int) -> int:
    """How many scales cover `size` values."""
    return -(-size // BLOCK)


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[E, N, K] -> E4M3 [E, N, K] and fp32 scales [E, ceil(N / 128), ceil(K / 128)]."""
    experts, rows, columns = weight.shape
    high, wide = blocks(rows), blocks(columns)
    padding = (0, wide * BLOCK - columns, 0, high * BLOCK - rows)
    tiled = F.pad(weight.float(), padding).view(experts, high, BLOCK, wide, BLOCK)
    scale = tiled.abs().amax((2, 4)).clamp(min=SMALLEST) / LARGEST
    codes = (tiled / scale[:, :, None, :, None]).to(FP8).view(experts, high * BLOCK, wide * BLOCK)
    return codes[:, :rows, :columns].contiguous(), scale


def dequantise_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """The fp32 [E, N, K] that E4M3 codes and their block scales stand for."""
    spread = scale.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    return weight.float() * spread[:, : weight.shape[1], : weight.shape[2]]


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[R, K] -> E4M3 [R, K] and fp32 scales [R, ceil(K / 128)]."""
    count, columns = rows.shape
    wide = blocks(columns)
    tiled = F.pad(rows.float(), (0, wide * BLOCK - columns)).view(count, wide, BLOCK)
    scale = tiled.abs().amax(2).clamp(min=SMALLEST) / LARGEST
    codes = (tiled / scale[:, :, None]).to(FP8).view(count, wide * BLOCK)
    return codes[:, :columns].contiguous(), scale


def moe_mlp_fp8_reference(
    x: Tensor,
    w_gate_up: Tensor,
    gate_up_scale: Tensor,
    w_down: Tensor,
    down_scale: Tensor,
    routing: RowRouting,
) -> Tensor:
    """The oracle: every operand quantised and dequantised, then multiplied in fp32; fp32 [T, D]."""

    def rounded(rows: Tensor) -> Tensor:
        codes, scale = quantise_rows(rows)
        return dequantise_rows(codes, scale)

    gate_up = dequantise_weight(w_gate_up, gate_up_scale)
    down = dequantise_weight(w_down, down_scale)
    x_TD, y_TD = rounded(x), torch.zeros_like(x, dtype=torch.float32)
    bounds = routing.expert_offsets.tolist()
    for expert in range(routing.num_experts):
        rows = slice(bounds[expert], bounds[expert + 1])
        token = routing.token_index[rows]
        gate, up = F.linear(x_TD[token], gate_up[expert]).chunk(2, dim=-1)
        out = F.linear(rounded(F.silu(gate) * up), down[expert])
        y_TD.index_add_(0, token, out * routing.weight[rows, None].float())
    return y_TD


def dequantise_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """The fp32 [R, K] that E4M3 codes and their row scales stand for."""
    return codes.float() * scale.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]


def _check(
    x: Tensor,
    w_gate_up: Tensor,
    gate_up_scale: Tensor,
    w_down: Tensor,
    down_scale: Tensor,
    routing: RowRouting,
) -> None:
    if x.dim() != 2 or w_gate_up.dim() != 3 or w_gate_up.shape[1] % 2:
        raise ValueError(
            f"x, w_gate_up: shapes {tuple(x.shape)}, {tuple(w_gate_up.shape)} must be "
            "[tokens, hidden] and [experts, 2 * width, hidden]"
        )
    hidden, (experts, width2, _) = x.shape[1], w_gate_up.shape
    width = width2 // 2
    wanted = {
        "w_gate_up": (w_gate_up, (experts, width2, hidden), FP8),
        "gate_up_scale": (gate_up_scale, (experts, blocks(width2), blocks(hidden)), torch.float32),
        "w_down": (w_down, (experts, hidden, width), FP8),
        "down_scale": (down_scale, (experts, blocks(hidden), blocks(width)), torch.float32),
    }
    for name, (value, shape, dtype) in wanted.items():
        if value.shape != shape or value.dtype != dtype:
            raise ValueError(f"{name}: {tuple(value.shape)} {value.dtype} must be {shape} {dtype}")
        if not value.is_contiguous() or value.device != x.device:
            raise ValueError(f"{name}: must be contiguous and on {x.device}")
    if routing.num_experts != experts or routing.num_tokens != x.shape[0]:
        raise ValueError(
            f"routing: made for {routing.num_tokens} tokens and {routing.num_experts} experts, "
            f"x and w_gate_up have {x.shape[0]} and {experts}"
        )


@torch.library.custom_op(
    "dvpa_kernels::triton_moe_mlp_fp8",
    mutates_args=(),
    schema="(Tensor x, Tensor w_gate_up, Tensor gate_up_scale, Tensor w_down, Tensor down_scale, "
    f"{COLUMNS}) -> Tensor",
)
def moe_mlp_fp8_op(
    x: Tensor,
    w_gate_up: Tensor,
    gate_up_scale: Tensor,
    w_down: Tensor,
    down_scale: Tensor,
    *columns: Tensor,
) -> Tensor:
    """`moe_mlp_fp8` with the routing spread out: one node when compiled."""
    routing = RowRouting.of_columns(columns, x.shape[0])
    return fp8_gemm.forward_rows_fp8(x, w_gate_up, gate_up_scale, w_down, down_scale, routing)


@moe_mlp_fp8_op.register_fake
def _(x: Tensor, *_rest: Tensor) -> Tensor:
    return x.new_empty(x.shape)
