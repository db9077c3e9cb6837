"""The CPU backend of `linear`, `rms_norm` and `swiglu`.

Letters: T tokens, G groups, K inputs, N outputs, D size, F width.
"""

import torch
from torch import Tensor

from dvpa_kernels.cpu.library import FORMATS, ISAS, library_for, raise_fault, status


def kernel_isa(x: Tensor, *others: Tensor | None) -> str | None:
    """The instruction set to run an inference operator with, or None: PyTorch has to do it.

    That is so off the CPU, for other dtypes than the kernels', where a gradient is asked for, while
    a graph is traced, and on a machine without the kernels (announced once).
    """
    if x.device.type != "cpu" or x.dtype not in FORMATS or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and any(
        value is not None and value.requires_grad for value in (x, *others)
    ):
        return None
    return status().isa


def linear_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    isa: str | None = None,
    threads: int | None = None,
) -> Tensor | None:
    """`linear` in C++, or None where `kernel_isa` has none; the operands are sound.

    Args:
        x: [T, K], or [T, G, K].
        weight: [N, K], or [G, N, K]; contiguous.
        bias: [N], or [G, N].
        isa: force an instruction set (one of `status().isas`); for tests.
        threads: at most so many; else PyTorch's number.

    Raises:
        ValueError: this machine cannot run `isa`.
        MemoryError: no room for the rows in fp32.
    """
    isa = isa or kernel_isa(x, weight, bias)
    if isa is None:
        return None
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], weight.shape[-2])
    if y.numel() == 0:
        return y
    fault = library_for(isa).dvpa_cpu_linear(
        ISAS.index(isa),
        FORMATS[x.dtype],
        threads or torch.get_num_threads(),
        x.shape[0],
        x.shape[1] if x.dim() == 3 else 1,
        x.shape[-1],
        weight.shape[-2],
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    raise_fault(fault, len(x))
    return y


def rms_norm_cpu(
    x: Tensor, weight: Tensor, eps: float, isa: str | None = None, threads: int | None = None
) -> Tensor | None:
    """`rms_norm` in C++, or None where `kernel_isa` has none; the operands are sound.

    Args:
        x: [T, D].
        weight: [D].
        eps: added to the mean square.
        isa: as for `linear_cpu`.
        threads: likewise.

    Raises:
        ValueError: this machine cannot run `isa`.
    """
    isa = isa or kernel_isa(x, weight)
    if isa is None:
        return None
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    library_for(isa).dvpa_cpu_rms_norm(
        ISAS.index(isa),
        FORMATS[x.dtype],
        threads or torch.get_num_threads(),
        *x.shape,
        eps,
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
    )
    return y


def swiglu_cpu(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    isa: str | None = None,
    threads: int | None = None,
) -> Tensor | None:
    """`swiglu` in C++, or None where `kernel_isa` has none; the operands are sound.

    Args:
        x: [T, D].
        w_gate_up: [2F, D]; contiguous.
        w_down: [D, F]; contiguous.
        isa: as for `linear_cpu`.
        threads: likewise.

    Raises:
        ValueError: this machine cannot run `isa`.
        MemoryError: no room for the intermediate rows.
    """
    isa = isa or kernel_isa(x, w_gate_up, w_down)
    if isa is None:
        return None
    x = x.contiguous()
    y = torch.empty_like(x)
    fault = library_for(isa).dvpa_cpu_swiglu(
        ISAS.index(isa),
        FORMATS[x.dtype],
        threads or torch.get_num_threads(),
        *x.shape,
        w_down.shape[1],
        x.data_ptr(),
        w_gate_up.data_ptr(),
        w_down.data_ptr(),
        y.data_ptr(),
    )
    raise_fault(fault, len(x))
    return y
