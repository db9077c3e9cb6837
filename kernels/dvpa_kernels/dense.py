"""Dense layers, RMS norms and SwiGLU for inference: C++ on CPUs, PyTorch's operators elsewhere.

Letters: T tokens, G groups, K inputs, N outputs, D size, F width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dvpa_kernels.cpu.dense import linear_cpu, rms_norm_cpu, swiglu_cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias, or for each of G groups its own such product.

    On CPUs (fp32, bf16, fp16) C++ for every number of tokens, fp32 too: a row of y is bitwise the
    same whatever the other rows, their number and the number of threads, which `F.linear` does not
    promise. `F.linear` and `torch.matmul` do it on other devices, for other dtypes, where a
    gradient is asked for, under `torch.compile`, and without the C++ library (announced once).

    Args:
        x: [T, K], or [T, G, K].
        weight: [N, K], or [G, N, K]; contiguous, in the dtype of x.
        bias: [N], or [G, N].

    Returns:
        [T, N], or [T, G, N], contiguous, in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or weights that are not
            contiguous.
    """
    _check_linear(x, weight, bias)
    y = linear_cpu(x, weight, bias)
    return linear_torch(x, weight, bias) if y is None else y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square in fp32, rounded to the dtype of x, then times `weight`.

    On CPUs (fp32, bf16, fp16) one pass in C++, where a row does not depend on the others; PyTorch
    does it in the cases that `linear` names.

    Args:
        x: [T, D].
        weight: [D], in the dtype of x.
        eps: added to the mean square.

    Returns:
        [T, D], contiguous, in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(
            f"x, weight: shapes {tuple(x.shape)}, {tuple(weight.shape)} must be [T, D] and [D]"
        )
    _check_alike(x, weight=weight)
    y = rms_norm_cpu(x, weight, eps)
    return rms_norm_torch(x, weight, eps) if y is None else y


def swiglu(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)); every intermediate is rounded to the dtype of x.

    On CPUs (fp32, bf16, fp16) one call in C++, where a row does not depend on the others; PyTorch
    does it in the cases that `linear` names.

    Args:
        x: [T, D].
        w_gate_up: [2F, D], gate rows first; contiguous, in the dtype of x.
        w_down: [D, F]; likewise.

    Returns:
        [T, D], contiguous, in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or weights that are not
            contiguous.
    """
    hidden, width = w_down.shape if w_down.dim() == 2 else (0, 0)
    if x.dim() != 2 or w_down.dim() != 2 or w_gate_up.shape != (2 * width, hidden):
        raise ValueError(
            f"w_gate_up, w_down: shapes {tuple(w_gate_up.shape)}, {tuple(w_down.shape)} must be "
            "[2F, D] and [D, F]"
        )
    _check_linear(x, w_gate_up, None)
    if not w_down.is_contiguous():
        raise ValueError(f"w_down: strides {w_down.stride()} must be contiguous")
    _check_alike(x, w_down=w_down)
    y = swiglu_cpu(x, w_gate_up, w_down)
    return swiglu_torch(x, w_gate_up, w_down) if y is None else y


def linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` in PyTorch's operators, on any device."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    y_TGN = torch.matmul(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    return (y_TGN if bias is None else y_TGN + bias).contiguous()


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in PyTorch's operators, on any device."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def swiglu_torch(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """`swiglu` in PyTorch's operators, on any device."""
    gate, up = F.linear(x, w_gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w_down)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    grouped = weight.dim() == 3
    if weight.dim() not in (2, 3):
        raise ValueError(f"weight: shape {tuple(weight.shape)} must be [N, K] or [G, N, K]")
    if x.dim() != weight.dim() or (*x.shape[1:-1], x.shape[-1]) != (
        *weight.shape[:-2],
        weight.shape[-1],
    ):
        raise ValueError(
            f"x: shape {tuple(x.shape)} must be {'[T, G, K]' if grouped else '[T, K]'} "
            f"for a weight of shape {tuple(weight.shape)}"
        )
    if not weight.is_contiguous():
        raise ValueError(f"weight: strides {weight.stride()} must be contiguous")
    _check_alike(x, weight=weight)
    if bias is not None:
        if bias.shape != weight.shape[:-1]:
            raise ValueError(f"bias: shape {tuple(bias.shape)} must be {tuple(weight.shape[:-1])}")
        _check_alike(x, bias=bias)


def _check_alike(x: Tensor, **others: Tensor) -> None:
    for name, value in others.items():
        if value.dtype != x.dtype or value.device != x.device:
            raise ValueError(
                f"{name}: {value.dtype} on {value.device} must be as x, {x.dtype} on {x.device}"
            )
