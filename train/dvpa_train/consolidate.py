"""The model of a stage as a plain checkpoint, from wherever its parts lie, one tensor at a time.

No process ever holds more than its own part and one whole tensor (of sharded experts: one layer's
group); the first one writes. The names are DeepSeek-V3's (design: section 6): stacked experts are
parted again.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dvpa.checkpoint.shards import DTYPES, ShardWriter, TensorInfo
from dvpa.model import DvpaForCausalLM
from dvpa.model.causal_lm import TIER_MAP_FILE
from dvpa.model.standalone import AUTO_MAP, write_standalone
from dvpa_train.processes import Processes
from dvpa_train.sharding import whole
from dvpa_train.stacked import stored_parts, stored_shapes

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@torch.no_grad()
def write_model(model: DvpaForCausalLM, folder: Path, among: Processes) -> None:
    """Write `model` into the new `folder`; every process must call it."""
    tensors = dict(_tensors(model))
    if not among.is_first:
        for tensor in tensors.values():
            with _gathered(tensor):
                for _ in _wholes(tensor):
                    pass
        return
    plan = {
        name: TensorInfo(NAMES[torch.float32 if _is_rounded(tensor) else tensor.dtype], shape)
        for stacked, tensor in tensors.items()
        for name, shape in stored_shapes(stacked, tuple(getattr(tensor, "ds_shape", tensor.shape)))
    }
    folder.mkdir()
    with ShardWriter(folder, plan) as writer:
        for stacked, tensor in tensors.items():
            with _gathered(tensor):
                for first, values in _wholes(tensor):
                    for name, part in stored_parts(stacked, values, first):
                        writer.write(name, part)
    config = model.config
    config.auto_map = dict(AUTO_MAP)
    config.architectures = [type(model).__name__]
    dtype = DTYPES[next(iter(plan.values())).dtype]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    model.tier_map.save(folder / TIER_MAP_FILE)
    write_standalone(folder)


def _tensors(model: DvpaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, shared ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _wholes(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """All values on every process, with the number of the first expert among them."""
    if _is_rounded(tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        yield 0, safe_get_full_fp32_param(tensor)
        return
    if not isinstance(tensor, DTensor) or tensor.dim() < 4:
        yield 0, whole(tensor)
        return
    for group in range(len(tensor)):  # [G, P, ...]
        yield group * tensor.shape[1], whole(tensor[group])


def _is_rounded(tensor: Tensor) -> bool:
    """Whether DeepSpeed has the fp32 weights, and this is a copy of them to compute with."""
    is_zero = hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")
    return is_zero and tensor.dtype != torch.float32


def _gathered(tensor: Tensor) -> AbstractContextManager[Any]:
    """ZeRO-3 keeps parameters in parts; the others need nothing."""
    is_cut = hasattr(tensor, "ds_id") and isinstance(tensor, nn.Parameter)
    if not is_cut or _is_rounded(tensor):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([tensor])
    return gathered
