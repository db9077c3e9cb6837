"""Buffers that stay fp32 whatever the model is cast to.

`model.to(torch.bfloat16)` casts every floating buffer, too. In bf16 the small updates of a
selection bias are lost, and a rotary frequency is off by up to 1 in 256: radians, after some
thousand positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Fp32Buffers(nn.Module):
    """Base of modules whose own buffers move between devices but keep fp32, bit for bit."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp32Buffers":
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(device=buffer.device, dtype=torch.float32)
        return self
