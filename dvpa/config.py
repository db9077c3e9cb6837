"""`DvpaConfig`: the architecture and its tiers as a Transformers config."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dvpa.architecture import (
    TOP_TIER_FIELDS,
    Architecture,
    DifficultyConfig,
    TierConfig,
    find_config,
    load_yaml,
    name_file,
    read_architecture,
)

__all__ = [
    "FP8_QUANTIZATION",
    "DifficultyConfig",
    "DvpaConfig",
    "TierConfig",
    "find_config",
    "has_fp8_blocks",
    "load_model_config",
    "load_yaml",
]
# `quantization_config` of a checkpoint whose matrices are block-scaled FP8, as DeepSeek-V3's.
FP8_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


class DvpaConfig(Architecture, PreTrainedConfig):
    """Configuration of `DvpaForCausalLM`: DeepSeek-V3 field names plus nested tiers.

    `has_fp8_weights` tells of the folder it was read from: matrices there are block-scaled FP8. It
    is no property of a model, whose weights are never that, so no copy that is written carries it;
    in the file it is `quantization_config`, which Transformers would load in its own way.

    Raises:
        ValueError: a field is out of range; the message names field, value and what is allowed.
    """

    model_type = "dvpa"
    keys_to_ignore_at_inference = ("past_key_values", "cache", "routing")
    attribute_map = {"num_local_experts": "n_routed_experts"}  # noqa: RUF012 (Transformers' contract)

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive what Transformers reads, resolve and validate the architecture."""
        kwargs.pop("qk_head_dim", None)  # derived, but config.json carries it too
        self.resolve()  # sets head_dim, which Transformers' rotary embedding reads
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        stored = kwargs.get("quantization_config")
        self.has_fp8_weights = False
        if isinstance(stored, Mapping) and stored.get("quant_method") == "fp8":
            self.has_fp8_weights = has_fp8_blocks(kwargs.pop("quantization_config"))
        PreTrainedConfig.__post_init__(self, **kwargs)

    def truncate(self, num_tiers: int) -> "DvpaConfig":
        """The first `num_tiers` tiers as a model of its own, without a difficulty head.

        Raises:
            ValueError: `num_tiers` is not in 1 .. self.num_tiers.
        """
        if not 1 <= num_tiers <= self.num_tiers:
            raise ValueError(f"num_tiers: {num_tiers} must be in 1 .. {self.num_tiers}")
        data = self.to_dict()
        for name in TOP_TIER_FIELDS:
            data.pop(name)
        data.update(
            tiers=data["tiers"][:num_tiers],
            n_group=self._tier(num_tiers - 1).num_groups,
            n_routed_experts=self.pool_size(num_tiers - 1),
            difficulty=None,
        )
        truncated: DvpaConfig = DvpaConfig.from_dict(data)
        return truncated

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers, but another architecture's config is refused, not reinterpreted."""
        model_type = config_dict.get("model_type") if isinstance(config_dict, dict) else None
        if model_type not in (None, cls.model_type) or not isinstance(config_dict, dict):
            raise ValueError(f"model_type: {model_type!r} must be {cls.model_type!r}")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; tiers and difficulty as plain mappings."""
        data = super().to_dict()
        data.pop("has_fp8_weights", None)
        data["tiers"] = [asdict(tier) for tier in self.tiers or ()]
        for tier in data["tiers"]:  # one of the two says it all
            tier.pop("num_groups" if self.pool == "striped" else "experts_per_group")
        data["difficulty"] = None if self.difficulty is None else asdict(self.difficulty)
        return data


def has_fp8_blocks(quantization: Mapping[str, Any] | None) -> bool:
    """Whether `quantization_config` says that weights are FP8 in blocks, as DeepSeek-V3's are.

    Raises:
        ValueError: they are in another number format; the message names the key.
    """
    if quantization is None:
        return False
    for key in ("quant_method", "fmt", "weight_block_size"):
        wanted = FP8_QUANTIZATION[key]
        given = quantization.get(key, wanted if key == "fmt" else None)
        if given != wanted:
            raise ValueError(f"quantization_config.{key}: {given!r} must be {wanted!r}")
    return True


def load_model_config(path: str | Path) -> DvpaConfig:
    """Read a model YAML strictly.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key (the message lists the allowed ones) or a bad value.
    """
    try:
        return DvpaConfig(**read_architecture(path))
    except (TypeError, ValueError) as error:
        raise name_file(path, error) from None
