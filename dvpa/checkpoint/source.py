"""A checkpoint of another family, seen as one of ours: its config and, by our names, its tensors.

Every tensor of the folder is accounted for before anything is read: what a model of this config
needs is there in the right shape, and nothing else is, but for what `Source` lists in `left_out`.
Block-scaled FP8 (DeepSeek-V3, R1) is read as it is stored, or as bf16.
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
from dvpa.checkpoint.number_format import Fp8, check_fp8, read_weight
from dvpa.checkpoint.shards import DTYPES, ShardReader, TensorInfo
from dvpa.config import DvpaConfig, has_fp8_blocks
from dvpa.model.tensor_names import TIER_BIAS, Shape, mtp_prefix, tensor_shapes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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

    def stored(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor of ours, as it is stored: `read_stored`."""
        theirs = self.family.name_of(name)
        if name.endswith(TIER_BIAS):
            return TensorInfo("F32", (1, self.config.n_routed_experts))
        assert theirs is not None
        return self.reader.tensors[theirs]

    def info(self, name: str) -> TensorInfo:
        """The same, as `read` gives it."""
        info = self.stored(name)
        return TensorInfo("BF16", info.shape) if info.dtype == fp8.CODES else info

    def read_stored(self, name: str) -> Tensor | Fp8:
        """A tensor of ours; the selection bias as [1, E] in fp32, zero where there is none.

        Raises:
            ValueError: the shard cannot be read.
        """
        theirs = self.family.name_of(name)
        if theirs is None:
            return torch.zeros(1, self.config.n_routed_experts)
        weight = read_weight(self.reader, theirs)
        if isinstance(weight, Tensor) and name.endswith(TIER_BIAS):
            return weight[None].float()
        return weight

    def read(self, name: str) -> Tensor:
        """The same, FP8 dequantised to bf16."""
        weight = self.read_stored(name)
        if isinstance(weight, Fp8):
            return fp8.dequantise(weight.codes, weight.scale_inv, torch.bfloat16)
        return weight


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
        has_blocks = has_fp8_blocks(data.get("quantization_config"))
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
        _check_tensor(source, name, shape, has_blocks)
        if reader.tensors[name].dtype == fp8.CODES:
            known.add(name + fp8.SCALE_SUFFIX)
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


def _check_tensor(source: Source, name: str, shape: Shape, has_blocks: bool) -> None:
    """Their tensor `name` is there, and fits; so do its scales, if it is FP8."""
    info = source.reader.tensors.get(name)
    if info is None:
        raise ValueError(f"{source.folder}: {name}: missing")
    if info.shape != shape:
        raise ValueError(f"{source.folder}: {name}: shape {info.shape}, expected {shape}")
    if not DTYPES[info.dtype].is_floating_point:
        raise ValueError(f"{source.folder}: {name}: dtype {info.dtype} is not a float's")
    check_fp8(source.folder, name, source.reader.tensors, has_blocks)


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
