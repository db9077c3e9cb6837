"""A checkpoint of another family, seen as one of ours: its config and, by our names, its tensors.

Every tensor of the folder is accounted for before anything is read: what a model of this config
needs is there in the right shape, and nothing else is, but for what `Source` lists in `left_out`.
Block-scaled FP8 (DeepSeek-V3, R1) is read as bf16.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvpa.checkpoint import fp8
from dvpa.checkpoint.families import Family, Fields, find_family, read_fields
from dvpa.checkpoint.shards import DTYPES, ShardReader, TensorInfo
from dvpa.config import DvpaConfig
from dvpa.model.tensor_names import TIER_BIAS, Shape, mtp_prefix, tensor_shapes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CODES = "F8_E4M3"
ROTARY = ".rotary_emb.inv_freq"  # older checkpoints store what follows from the config


@dataclass(frozen=True)
class Source:
    """A checkpoint to be taken in.

    Attributes:
        folder: where it is.
        family: what it is.
        config: ours for it: one tier, experts in its own order.
        reader: its tensors, by its own names.
        left_out: its tensors that ours has no place for, each with the reason.
    """

    folder: Path
    family: Family
    config: DvpaConfig
    reader: ShardReader
    left_out: dict[str, str] = field(default_factory=dict)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor of ours, as `read` gives it."""
        theirs = self.family.name_of(name)
        if name.endswith(TIER_BIAS):
            return TensorInfo("F32", (1, self.config.n_routed_experts))
        assert theirs is not None
        info = self.reader.tensors[theirs]
        return TensorInfo("BF16", info.shape) if info.dtype == CODES else info

    def read(self, name: str) -> Tensor:
        """A tensor of ours; the selection bias as [1, E] in fp32, zero where there is none.

        Raises:
            ValueError: the shard cannot be read.
        """
        theirs = self.family.name_of(name)
        if theirs is None:
            return torch.zeros(1, self.config.n_routed_experts)
        tensor = self.reader.read(theirs)
        if tensor.dtype == fp8.DTYPE:
            scale = self.reader.read(theirs + fp8.SCALE_SUFFIX)
            return fp8.dequantise(tensor, scale, torch.bfloat16)
        return tensor[None].float() if name.endswith(TIER_BIAS) else tensor


def open_source(folder: Path | str, drop_mtp: bool = False) -> Source:
    """Read and check the config and the headers of a checkpoint folder; no weights yet.

    `drop_mtp` leaves its multi-token prediction module out.

    Raises:
        FileNotFoundError: no checkpoint there, or a shard is missing.
        ValueError: a family, a setting or a number format that we do not have; a tensor that is
            missing, unknown, or of the wrong shape or dtype (the message names it); a corrupt
            shard.
    """
    folder = Path(folder)
    data = _read_json(folder / "config.json")
    try:
        family = find_family(data)
        fields = read_fields(family, data)
        has_blocks = _has_fp8_blocks(data)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    reader = ShardReader(folder)
    left_out: dict[str, str] = {}
    _settle_mtp(fields, reader, drop_mtp, left_out)
    try:
        config = DvpaConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    source = Source(folder, family, config, reader, left_out)
    known = set(left_out)
    for name, shape in _needed(source):
        known.add(name)
        _check_tensor(source, name, shape)
        if reader.tensors[name].dtype == CODES:
            if not has_blocks:
                raise ValueError(f"{folder}: {name}: FP8, but config.json says nothing of it")
            known.add(name + fp8.SCALE_SUFFIX)
            _check_scale(source, name)
    copies = dict(_copies(source))
    for name in reader.tensors:
        if name in known:
            continue
        if name.endswith(ROTARY):
            left_out[name] = "rotary frequencies"
            continue
        original = copies.get(name)
        if original is None:
            raise ValueError(f"{folder}: {name}: unknown tensor")
        _check_copy(source, name, original)
        left_out[name] = f"a copy of {original}"
    return source


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold a mapping")
    return data


def _has_fp8_blocks(data: dict[str, Any]) -> bool:
    """Whether weights are FP8 in blocks, as DeepSeek-V3's are.

    Raises:
        ValueError: they are in another number format.
    """
    quantization = data.get("quantization_config")
    if quantization is None:
        return False
    expected = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [fp8.BLOCK, fp8.BLOCK]}
    for key, wanted in expected.items():
        given = quantization.get(key, wanted if key == "fmt" else None)
        if given != wanted:
            raise ValueError(f"quantization_config.{key}: {given!r} must be {wanted!r}")
    return True


def _settle_mtp(
    fields: Fields, reader: ShardReader, drop_mtp: bool, left_out: dict[str, str]
) -> None:
    """Keep the module for multi-token prediction where there is one, and one alone.

    Transformers writes `num_nextn_predict_layers: 1` for DeepSeek-V3 whatever it has saved.

    Raises:
        ValueError: more such layers than one.
    """
    count = fields.get("num_nextn_predict_layers", 0)
    first = fields["num_hidden_layers"]
    prefixes = tuple(f"model.layers.{layer}." for layer in range(first, first + count))
    found = [name for name in reader.tensors if prefixes and name.startswith(prefixes)]
    if drop_mtp or not found:
        fields["num_nextn_predict_layers"] = 0
        left_out.update(dict.fromkeys(found, "multi-token prediction"))


def _needed(source: Source) -> Iterator[tuple[str, Shape]]:
    """Their names and shapes of every tensor of ours that comes from one of theirs."""
    for name, shape in tensor_shapes(source.config).items():
        theirs = source.family.name_of(name)
        if theirs is not None:
            yield theirs, shape[1:] if name.endswith(TIER_BIAS) else shape


def _copies(source: Source) -> Iterator[tuple[str, str]]:
    """Tensors that are stored a second time: the copy and the original."""
    config = source.config
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    if config.tie_word_embeddings:
        yield HEAD, EMBEDDING
    if config.num_nextn_predict_layers:
        yield f"{mtp_prefix(config)}embed_tokens.weight", EMBEDDING
        yield f"{mtp_prefix(config)}shared_head.head.weight", head


def _check_tensor(source: Source, name: str, shape: Shape) -> None:
    """Their tensor `name` is there, and fits."""
    info = source.reader.tensors.get(name)
    if info is None:
        raise ValueError(f"{source.folder}: {name}: missing")
    if info.shape != shape:
        raise ValueError(f"{source.folder}: {name}: shape {info.shape}, expected {shape}")
    if not DTYPES[info.dtype].is_floating_point:
        raise ValueError(f"{source.folder}: {name}: dtype {info.dtype} is not a float's")


def _check_scale(source: Source, name: str) -> None:
    """The scales of an FP8 tensor are there, and fit."""
    scale, shape = name + fp8.SCALE_SUFFIX, source.reader.tensors[name].shape
    info = source.reader.tensors.get(scale)
    if info is None:
        raise ValueError(f"{source.folder}: {scale}: missing")
    if info != TensorInfo("F32", fp8.scale_shape(shape)):
        raise ValueError(
            f"{source.folder}: {scale}: {info.dtype} {info.shape}, expected F32 "
            f"{fp8.scale_shape(shape)}"
        )


def _check_copy(source: Source, name: str, original: str) -> None:
    """A copy says what the original says: ours has one place for both.

    Raises:
        ValueError: it does not.
    """
    infos = source.reader.tensors
    same = infos[name] == infos[original]
    step = max(1, (1 << 24) // max(1, infos[name].shape[1])) if same else 1
    for first in range(0, infos[name].shape[0] if same else 0, step):
        rows = (slice(first, first + step),)
        parts = [source.reader.read(each, rows).view(torch.uint8) for each in (name, original)]
        same = same and torch.equal(*parts)
    if not same:
        raise ValueError(f"{source.folder}: {name}: differs from {original}, and ours keep one")
