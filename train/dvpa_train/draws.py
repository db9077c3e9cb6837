"""A model's random initial weights, drawn a piece at a time, without ever holding the model.

`DvpaForCausalLM(config)` writes every weight from PyTorch's generator, linear layers twice: their
own default, then Transformers'. Here it is built without memory, what it would have written is
noted, and the notes are played: the same numbers, from the same generator, in the same order.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM

PIECE = 1 << 22  # numbers of a piece, if one row (one expert) has no more
BLOCK = 16  # PyTorch's normal numbers on CPUs come in blocks: whole ones do not depend on the cut


class _Notes(TorchDispatchMode):
    """Gives new tensors no memory, and takes note of what is written into which."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[tuple[Tensor, Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        if any(argument.name == "device" for argument in func._schema.arguments):
            options["device"] = torch.device("meta")
        if func._schema.is_mutable:
            self.writes.append((args[0], func, args[1:]))
        return func(*args, **options)


def draw(config: DvpaConfig) -> Iterator[tuple[str, int, Tensor]]:
    """All that building a model of `config` writes into its state dict, in that order.

    Yields:
        Name, first row, rows [n, ...] of the tensor, to be copied before the next; later ones
        replace earlier ones. Shared tensors come under their first name.

    The global generator ends where building the model would leave it, if all is taken.
    """
    notes = _Notes()
    with notes:
        model = DvpaForCausalLM(config)
    named: list[tuple[UntypedStorage, str, Tensor]] = [
        (tensor.untyped_storage(), name, tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]
    names = {id(storage): (name, tensor) for storage, name, tensor in reversed(named)}
    for target, write, values in notes.writes:
        name, tensor = names.get(id(target.untyped_storage()), (None, target))
        if name is None and torch.Tag.nondeterministic_seeded not in write.tags:
            continue
        row = tensor[0].numel()
        first, beyond = divmod(target.storage_offset(), row)
        assert target.is_contiguous() and not beyond and not target.numel() % row, name
        shape = (target.numel() // row, *tensor.shape[1:])
        for start, rows in _play(write, values, shape, tensor.dtype):
            if name is not None:
                yield name, first + start, rows


def _play(
    write: Any, values: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """What one write puts into a tensor of this shape, a few rows at a time."""
    count, row = shape[0], torch.Size(shape[1:]).numel()
    step = count if row % BLOCK else min(count, max(1, PIECE // row))
    piece = torch.empty(step, *shape[1:], dtype=dtype)
    for start in range(0, count, step):
        rows = piece[: count - start]
        write(rows, *values)
        yield start, rows
