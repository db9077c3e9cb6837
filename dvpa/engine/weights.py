"""Checkpoint tensors read straight into existing memory, and a model without its experts.

Nothing is mapped: a mapping grows with every page touched and counts as resident, so a bound on
memory would not hold. `pread` fills the destination itself where dtype and device allow, else it
goes through one small buffer; so does FP8, see `fp8_bands`.

Left out on purpose: checksums. The format has none, so bits that flip in a file without changing
its size or modification time are not noticed.
"""

import os
import threading
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from dvpa.checkpoint import ShardReader
from dvpa.checkpoint.number_format import check_format, fp8_names
from dvpa.checkpoint.shards import DTYPES
from dvpa.config import DvpaConfig
from dvpa.engine.fp8_bands import read_bands
from dvpa.fp8 import CODES, SCALE_SUFFIX, is_scale
from dvpa.model import DvpaForCausalLM
from dvpa.model.causal_lm import TIER_MAP_FILE
from dvpa.model.decoder import DvpaRotaryEmbedding
from dvpa.model.tensor_names import TIER_BIAS, expert_index, tensor_shapes
from dvpa.tiers import TierMap

# On a CPU a copy of at most 32768 elements stays on the thread that asked for it: a background
# reader must not start a second team of threads beside the step's. A GPU wants long transfers.
CPU_BUFFER_BYTES = 1 << 16
GPU_BUFFER_BYTES = 1 << 22


class _Buffer(threading.local):
    """One staging buffer for each thread that reads; pinned where it feeds a GPU."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        size = GPU_BUFFER_BYTES if on_gpu else CPU_BUFFER_BYTES
        with torch.inference_mode(False):
            self.data = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)


class WeightFiles:
    """The tensors of a checkpoint folder, read by name; safe to use from several threads.

    A file that changes after it was opened is refused: half of one checkpoint and half of another
    would be a wrong answer without an error.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a tensor is missing, unknown, or of the wrong shape or kind of dtype; a shard is
            corrupt, unless it holds nothing but routed experts outside the base pool.
    """

    def __init__(
        self,
        folder: Path,
        config: DvpaConfig,
        device: torch.device | str = "cpu",
        drop_page_cache: bool = False,
    ) -> None:
        self.folder = folder
        self._drop_page_cache = drop_page_cache
        self._reader = ShardReader(folder, keep_going=True)
        self._buffer = _Buffer(torch.device(device))
        _check(config, self._reader)
        # Descriptor, and what the file looked like when its header was read.
        self._files: dict[Path, tuple[int, tuple[int, int]]] = {}
        for path in sorted({self._reader.locate(name)[0] for name in self._reader.tensors}):
            descriptor = os.open(path, os.O_RDONLY)
            self._files[path] = descriptor, _signature(descriptor)

    def count_fp8(self, config: DvpaConfig) -> int:
        """Weights of a model of `config` that are in FP8, of those whose shards could be read."""
        return len(fp8_names(self._reader.tensors) & tensor_shapes(config).keys())

    def read_into(self, name: str, out: Tensor) -> int:
        """Fill `out` (contiguous, of the tensor's shape) and return the bytes read.

        `out` may have another floating dtype and lie on any device. FP8 is dequantised on the way.

        Raises:
            ValueError: the data cannot be read; the message names file and tensor.
        """
        for stored in (name, name + SCALE_SUFFIX):
            if stored in self._reader.broken:
                raise ValueError(self._reader.broken[stored])
        if self._reader.tensors[name].dtype == CODES:
            return self._read_fp8(name, out.detach())
        dtype = DTYPES[self._reader.tensors[name].dtype]
        flat = out.detach().view(-1)
        if dtype == out.dtype and out.device.type == "cpu":
            self._read(name, 0, flat)
        else:
            step = self._buffer.data.numel() // dtype.itemsize
            for first in range(0, flat.numel(), step):
                part = flat[first : first + step]
                staged = self._buffer.data.view(dtype)[: part.numel()]
                self._read(name, first, staged)
                part.copy_(staged)  # waits for a GPU: the buffer is filled again at once
        return self._finish(name)

    def _read_fp8(self, name: str, out: Tensor) -> int:
        scale = name + SCALE_SUFFIX
        scale_inv = torch.empty(self._reader.tensors[scale].shape)
        self._read(scale, 0, scale_inv.view(-1))
        read_bands(partial(self._read, name), scale_inv, out, self._buffer.data)
        return self._finish(scale) + self._finish(name)

    def _read(self, name: str, first: int, out: Tensor) -> None:
        """Fill a flat CPU tensor, of the tensor's dtype, from its number `first` on."""
        path, offset = self._reader.locate(name)
        try:
            descriptor, signature = self._files[path]
            if _signature(descriptor) != signature:
                raise OSError("the file has changed since it was opened")
            _read_exactly(descriptor, offset + first * out.itemsize, out)
        except OSError as error:
            raise ValueError(f"{path}: {name}: {error}") from error

    def _finish(self, name: str) -> int:
        """After a tensor was read; its bytes."""
        path, offset = self._reader.locate(name)
        num_bytes = self._reader.tensors[name].num_bytes
        if self._drop_page_cache:
            try:
                os.posix_fadvise(self._files[path][0], offset, num_bytes, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                raise ValueError(f"{path}: {name}: {error}") from error
        return num_bytes

    def close(self) -> None:
        """Close the files; nobody may be reading."""
        while self._files:
            os.close(self._files.popitem()[1][0])


def _signature(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _read_exactly(descriptor: int, offset: int, out: Tensor) -> None:
    """Fill a flat CPU tensor from a file; the interpreter lock is free meanwhile."""
    rest = out.view(torch.uint8).numpy().data
    while rest:
        count = os.preadv(descriptor, [rest], offset)
        if count == 0:
            raise OSError(f"truncated: {len(rest)} bytes are missing at offset {offset}")
        rest, offset = rest[count:], offset + count


def _check(config: DvpaConfig, reader: ShardReader) -> None:
    expected = tensor_shapes(config)
    base_pool = config.pool_size(0)
    coded = fp8_names(reader.tensors)
    for name, shape in expected.items():
        stored = (name, name + SCALE_SUFFIX) if name in coded else (name,)
        broken = [reader.broken[each] for each in stored if each in reader.broken]
        if broken:
            expert = expert_index(name)
            if expert is None or expert < base_pool:
                raise ValueError(f"{name}: {broken[0]}")
            continue
        if name not in reader.tensors:
            raise ValueError(f"{reader.folder}: {name}: missing")
        info = reader.tensors[name]
        if info.shape != shape:
            raise ValueError(f"{reader.folder}: {name}: shape {info.shape}, expected {shape}")
        check_format(reader.folder, name, reader.tensors, config.has_fp8_weights)
    weights = coded | reader.broken.keys()  # of which a broken one may have scales elsewhere
    for name in (*reader.tensors, *reader.broken):
        if name not in expected and not is_scale(name, weights):
            raise ValueError(f"{reader.folder}: {name}: unknown tensor")


def other_bytes(config: DvpaConfig, dtype: torch.dtype) -> int:
    """Bytes of every weight but the routed experts, loaded as `dtype`."""
    return sum(
        prod(shape) * _stored_as(name, dtype).itemsize
        for name, shape in tensor_shapes(config).items()
        if expert_index(name) is None
    )


def load_without_experts(
    config: DvpaConfig,
    weights: WeightFiles,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> DvpaForCausalLM:
    """The model in eval mode, as `from_pretrained` gives it, its routed experts left on `meta`.

    Tensor by tensor, so memory never holds more than the result. No weight requires a gradient.

    Raises:
        ValueError: a tensor cannot be read, or `tier_map.json` does not fit the model.
    """
    with torch.inference_mode(False), torch.device("meta"):
        model = DvpaForCausalLM(config)
    model.config.dtype = dtype
    # Transformers' rotary tables are computed, not stored.
    model.model.rotary_emb = DvpaRotaryEmbedding(config=config).to(device)
    with torch.inference_mode(False):  # an engine may be built anywhere
        for name, shape in tensor_shapes(config).items():
            if expert_index(name) is not None:
                continue
            value = torch.empty(shape, dtype=_stored_as(name, dtype), device=device)
            weights.read_into(name, value)
            owner, _, attribute = name.rpartition(".")
            is_buffer = name.endswith(TIER_BIAS)
            kept = value if is_buffer else nn.Parameter(value, requires_grad=False)
            setattr(model.get_submodule(owner), attribute, kept)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False)
    if (weights.folder / TIER_MAP_FILE).is_file():
        model.tier_map = TierMap.load(weights.folder / TIER_MAP_FILE)
    return model.eval()


def _stored_as(name: str, dtype: torch.dtype) -> torch.dtype:
    """Selection biases stay fp32 in every model (`dvpa.model.precision`)."""
    return torch.float32 if name.endswith(TIER_BIAS) else dtype
