"""Where the weights of a stage come from, slice by slice: no process needs the whole model.

Each origin gives, bit for bit, what a single process has: `DvpaForCausalLM(config)`,
`from_pretrained`, and (in `growth.py`) a smaller model grown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dvpa.checkpoint.export import read_config
from dvpa.checkpoint.number_format import WeightReader, fp8_names
from dvpa.config import DvpaConfig
from dvpa.model.loading import find_problem
from dvpa.pricing import price
from dvpa_train.draws import draw
from dvpa_train.slices import Index, Slice
from dvpa_train.stacked import read_expert


class Origin(Protocol):
    """Fills a model's slices, see `slices_of`; all of them."""

    def fill(self, slices: Mapping[str, Slice]) -> None:
        """Fill them in place."""

    def describe(self) -> str:
        """What that is, for those who wait."""


class Source(Protocol):
    """Tensors of a model to copy from; of stacked experts, one by one."""

    def read(self, name: str, index: Index) -> Tensor:
        """That part of a tensor."""

    def read_expert(self, name: str, expert: int, index: Index) -> Tensor:
        """That part of one expert of a stacked tensor."""


@dataclass(frozen=True)
class Drawn:
    """Random weights: those of `DvpaForCausalLM(config)` after `torch.manual_seed(seed)`."""

    config: DvpaConfig
    seed: int

    def fill(self, slices: Mapping[str, Slice]) -> None:
        """Every process draws all the numbers and keeps its own."""
        torch.manual_seed(self.seed)
        written = set()
        for name, first, rows in draw(self.config):
            written.add(name)
            if name in slices:
                slices[name].put(first, rows)
        assert written >= set(slices), sorted(set(slices) - written)

    def describe(self) -> str:
        """See `Origin`."""
        return f"draws {num_weights(self.config) / 1e9:.3g}B random weights"


class Stored:
    """A checkpoint folder; only what a process holds is read, FP8 dequantised.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it is incomplete or corrupt; the message names the tensor or the shard.
    """

    def __init__(self, folder: Path) -> None:
        problem = find_problem(folder, read_config(folder))
        if problem is not None:
            raise ValueError(f"{folder}: {problem}")
        self.folder, self._reader = folder, WeightReader(folder)

    def read(self, name: str, index: Index) -> Tensor:
        """See `Source`."""
        return self._reader.read(name, index)

    def read_expert(self, name: str, expert: int, index: Index) -> Tensor:
        """See `Source`."""
        rows, columns = index
        return read_expert(self._reader, name, expert, (rows, columns))

    def fill(self, slices: Mapping[str, Slice]) -> None:
        """Copy all."""
        for name, part in slices.items():
            copy(self, name, part)

    def describe(self) -> str:
        """See `Origin`."""
        num_fp8 = len(fp8_names(self._reader.tensors))
        return f"reads {self.folder}" + f", {num_fp8} weights from FP8" * (num_fp8 > 0)


@dataclass(frozen=True)
class Held:
    """A model in memory, by its state dict."""

    state: Mapping[str, Tensor]

    def read(self, name: str, index: Index) -> Tensor:
        """See `Source`."""
        return self.state[name][index]

    def read_expert(self, name: str, expert: int, index: Index) -> Tensor:
        """See `Source`."""
        return self.state[name][expert][index]


class Resumed:
    """A checkpoint that Lightning loads once the model is laid out: nothing to do before."""

    def fill(self, slices: Mapping[str, Slice]) -> None:
        """Leave them."""

    def describe(self) -> str:
        """See `Origin`."""
        return "reads its last checkpoint"


def num_weights(config: DvpaConfig) -> int:
    """Weights of a model of `config`."""
    priced = price(config)
    return priced.total_params + priced.mtp_params


def copy(source: Source, name: str, part: Slice, num_experts: int | None = None) -> None:
    """Fill a slice from the tensor of its name; of stacked experts, the first `num_experts`."""
    if part.is_stacked:
        for expert, index, local in part.experts(0, num_experts):
            local.copy_(source.read_expert(name, expert, index))
    elif part.local.numel():
        part.local.copy_(source.read(name, part.index))
