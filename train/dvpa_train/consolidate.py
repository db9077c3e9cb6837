"""The model of a stage as a plain checkpoint, from wherever its parts lie, one tensor at a time.

No process ever holds more than its own part and one whole tensor; the first one writes. The names
are DeepSeek-V3's (design: section 6): stacked experts are parted again.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvpa.checkpoint.shards import DTYPES, ShardWriter, TensorInfo
from dvpa.model import DvpaForCausalLM
from dvpa.model.causal_lm import TIER_MAP_FILE
from dvpa.model.standalone import AUTO_MAP, write_standalone
from dvpa_train.processes import Processes
from dvpa_train.sharding import whole

NAMES = {dtype: name for name, dtype in DTYPES.items()}
GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


@torch.no_grad()
def write_model(model: DvpaForCausalLM, folder: Path, among: Processes) -> None:
    """Write `model` into the new `folder`; every process must call it."""
    tensors = dict(_tensors(model))
    if not among.is_first:
        for tensor in tensors.values():
            with _gathered(tensor):
                whole(tensor)
        return
    plan = {
        name: TensorInfo(NAMES[tensor.dtype], shape)
        for stacked, tensor in tensors.items()
        for name, shape in _shapes(stacked, tuple(getattr(tensor, "ds_shape", tensor.shape)))
    }
    folder.mkdir()
    with ShardWriter(folder, plan) as writer:
        for stacked, tensor in tensors.items():
            with _gathered(tensor):
                for name, part in _parts(stacked, whole(tensor)):
                    writer.write(name, part)
    config = model.config
    config.auto_map = dict(AUTO_MAP)
    config.architectures = [type(model).__name__]
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
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


def _gathered(tensor: Tensor) -> AbstractContextManager[Any]:
    """ZeRO-3 keeps parameters in parts; the others need nothing."""
    if not hasattr(tensor, "ds_id") or not isinstance(tensor, nn.Parameter):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([tensor])
    return gathered


def _shapes(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the checkpoint of a tensor of the model."""
    if not name.endswith((GATE_UP, DOWN)):
        yield name, shape
        return
    *experts, rows, columns = shape
    for i in range(prod(experts)):
        if name.endswith(GATE_UP):
            for part in ("gate_proj", "up_proj"):
                yield _expert(name, i, part), (rows // 2, columns)
        else:
            yield _expert(name, i, "down_proj"), (rows, columns)


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same of its data."""
    if not name.endswith((GATE_UP, DOWN)):
        yield name, tensor
        return
    for i, expert in enumerate(tensor.flatten(0, -3)):
        if name.endswith(GATE_UP):
            gate, up = expert.chunk(2)
            yield _expert(name, i, "gate_proj"), gate
            yield _expert(name, i, "up_proj"), up
        else:
            yield _expert(name, i, "down_proj"), expert


def _expert(name: str, number: int, part: str) -> str:
    return f"{name.rpartition('.')[0]}.{number}.{part}.weight"
