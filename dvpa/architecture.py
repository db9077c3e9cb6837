"""Architecture and tiers of a dvpa model, and the strict YAML for them; no Transformers.

Fields are DeepSeek-V3's own plus `tiers` (base first), `pool` and `difficulty`. Top-level
`n_routed_experts`, `num_experts_per_tok`, `topk_group` and `routed_scaling_factor` describe the
top tier. Everything is validated on construction, so that whoever reads it never has to check.
`dvpa.config.DvpaConfig` is the same thing as a Transformers config; pricing needs only this.

A tier's pool is always the experts 0 .. pool_size - 1. With `pool: prefix` experts are stored group
by group, and a tier has the first groups. With `pool: striped` they are stored in stripes, one
expert of every group (expert e is of group e % n_group), and a tier has the first
`experts_per_group` of every group.
"""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import yaml

from dvpa.validation import validate_config


@dataclass(frozen=True)
class TierConfig:
    """One tier: which experts it may use and how it routes among them.

    `num_groups` is all of them in a striped pool, and may be left out there; `experts_per_group`
    is for striped pools only.
    """

    name: str
    num_groups: int
    top_k: int
    topk_group: int
    routed_scaling_factor: float
    experts_per_group: int | None = None


@dataclass(frozen=True)
class DifficultyConfig:
    """The difficulty head: the number of layers run before it, and the width of its MLP."""

    probe_layer: int
    hidden_size: int


@dataclass(kw_only=True, repr=False)
class Architecture:
    """The shape of a model, and what its tiers may use.

    Raises:
        ValueError: a field is out of range; the message names field, value and what is allowed.
    """

    vocab_size: int = 512
    hidden_size: int = 64
    intermediate_size: int = 256
    moe_intermediate_size: int = 48
    num_hidden_layers: int = 4
    num_nextn_predict_layers: int = 0  # 1: a multi-token prediction module comes after the layers
    num_attention_heads: int = 4
    n_shared_experts: int = 1
    n_routed_experts: int = 32
    num_experts_per_tok: int | None = None
    routed_scaling_factor: float | None = None
    n_group: int = 8
    topk_group: int | None = None
    pool: str = "prefix"  # or "striped": what of the groups a tier may use
    num_key_value_heads: Any = None  # int, once constructed: as many as heads; no others in MLA
    head_dim: Any = None  # int, once constructed: grouped-query attention's; MLA's follow below
    qk_norm: str | None = None  # grouped-query attention: norms over each "head" or "projection"
    kv_lora_rank: Any = 32  # int; None: grouped-query attention in place of MLA
    q_lora_rank: int | None = None
    qk_rope_head_dim: int = 16
    qk_nope_head_dim: int = 16
    v_head_dim: int = 16
    first_k_dense_replace: int = 1
    scoring_func: str = "sigmoid"  # or "softmax", over the tier's pool, as in DeepSeek-V2
    topk_method: str = "noaux_tc"  # groups by their two best; "group_limited_greedy": by their best
    norm_topk_prob: bool = True
    gate: str = "deepseek_v3"  # for ablations, not exportable: "fixed_denominator", "group_quota"
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True  # how it is run, not what it is: no key of a model YAML
    rope_parameters: dict[str, Any] | None = None
    rope_interleave: bool = True
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    tiers: Any = None  # list[TierConfig], once constructed
    difficulty: Any = None  # DifficultyConfig or None, once constructed

    def __post_init__(self) -> None:
        """Resolve defaults, turn mappings into records, validate."""
        self.resolve()

    def resolve(self) -> None:
        """What construction does after the fields are set."""
        self._resolve_attention()
        if self.tiers is None:  # one tier: an ordinary DeepSeek-V3 model
            self.tiers = [
                {
                    "name": "top",
                    "num_groups": self.n_group,
                    "top_k": 8 if self.num_experts_per_tok is None else self.num_experts_per_tok,
                    "topk_group": self.n_group if self.topk_group is None else self.topk_group,
                    "routed_scaling_factor": self.routed_scaling_factor or 1.0,
                }
            ]
            if self.pool == "striped":
                self.tiers[0]["experts_per_group"] = self.n_routed_experts // self.n_group
        if not isinstance(self.tiers, list) or not self.tiers:
            raise ValueError(f"tiers: {self.tiers!r} must be a non-empty list, base tier first")
        self.tiers = [
            _record(TierConfig, self._with_pool(tier), f"tiers[{i}]")
            for i, tier in enumerate(self.tiers)
        ]
        if self.difficulty is not None:
            self.difficulty = _record(DifficultyConfig, self.difficulty, "difficulty")
        for name, of_tier in TOP_TIER_FIELDS.items():
            value, expected = getattr(self, name), getattr(self.tiers[-1], of_tier)
            if value is not None and value != expected:
                raise ValueError(
                    f"{name}: {value} must equal the top tier's {of_tier}, {expected} "
                    "(or be left out)"
                )
            setattr(self, name, expected)
        validate_config(self)

    def _resolve_attention(self) -> None:
        """Widths of heads; for grouped-query attention MLA's, of heads that are rotated whole."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.kv_lora_rank is not None:
            if self.head_dim not in (None, self.qk_rope_head_dim):
                raise ValueError(
                    f"head_dim: {self.head_dim} must be qk_rope_head_dim = {self.qk_rope_head_dim} "
                    "(or be left out): it is grouped-query attention's"
                )
            self.head_dim = self.qk_rope_head_dim
            return
        if self.head_dim is None and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        for name, width in LATENT_WIDTHS.items():
            ours = 0 if name == "qk_nope_head_dim" else self.head_dim
            if getattr(self, name) not in (width, ours):
                raise ValueError(
                    f"{name}: {getattr(self, name)} must be left out: kv_lora_rank is null, which "
                    "is grouped-query attention"
                )
            setattr(self, name, ours)

    def _with_pool(self, tier: Any) -> Any:
        """A tier's mapping; in a striped pool with all groups, which go without saying there."""
        if self.pool == "striped" and isinstance(tier, Mapping):
            return {"num_groups": self.n_group, **tier}
        return tier

    @property
    def num_tiers(self) -> int:
        """Number of tiers."""
        return len(self.tiers or ())

    @property
    def top_tier(self) -> int:
        """Index of the top tier."""
        return self.num_tiers - 1

    @property
    def tier_names(self) -> list[str]:
        """Tier names, base first."""
        return [tier.name for tier in self.tiers or ()]

    @property
    def group_size(self) -> int:
        """Routed experts per group."""
        return self.n_routed_experts // self.n_group

    @property
    def kv_width(self) -> int:
        """Values that the cache keeps of a position in one layer."""
        if self.kv_lora_rank is not None:
            return int(self.kv_lora_rank + self.qk_rope_head_dim)
        return int(2 * self.num_key_value_heads * self.head_dim)

    @property
    def unit_size(self) -> int:
        """Experts of a unit, contiguous, by which pools grow: a group, or a stripe (striped pools).

        Units are what is paged, and what is spread over ranks.
        """
        return self.n_group if self.pool == "striped" else self.group_size

    @property
    def num_units(self) -> int:
        """Units of all routed experts."""
        return self.n_routed_experts // self.unit_size

    def tier_units(self, tier: int) -> int:
        """Units that `tier` may choose from: the first so many."""
        return self.pool_size(tier) // self.unit_size

    def experts_per_group(self, tier: int) -> int:
        """Experts of a group that `tier` may choose from."""
        return self._tier(tier).experts_per_group or self.group_size

    def pool_size(self, tier: int) -> int:
        """Number of routed experts that `tier` may choose from: experts 0 .. pool_size - 1."""
        return self._tier(tier).num_groups * self.experts_per_group(tier)

    def tier_index(self, name_or_index: int | str) -> int:
        """Index of a tier given by name or index.

        Raises:
            ValueError: no such tier; the message names the known ones.
        """
        known = ", ".join(f"{i}={name}" for i, name in enumerate(self.tier_names))
        if isinstance(name_or_index, str):
            if name_or_index in self.tier_names:
                return self.tier_names.index(name_or_index)
            if name_or_index.isdecimal():
                name_or_index = int(name_or_index)
        if isinstance(name_or_index, bool) or not isinstance(name_or_index, int):
            raise ValueError(f"tier: {name_or_index!r} is not one of {known}")
        if not 0 <= name_or_index < self.num_tiers:
            raise ValueError(f"tier: {name_or_index} is not one of {known}")
        return name_or_index

    def _tier(self, tier: int) -> TierConfig:
        tier_config: TierConfig = self.tiers[tier]
        return tier_config


LATENT_WIDTHS = {  # and their defaults
    name: getattr(Architecture, name)
    for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
}

TOP_TIER_FIELDS = {
    "num_experts_per_tok": "top_k",
    "topk_group": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
}


def _record(kind: type[Any], value: Any, where: str) -> Any:
    """Build the frozen dataclass `kind` from a mapping, strictly."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {value!r} must be a mapping")
    allowed = [field.name for field in fields(kind)]
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    unknown, missing = sorted(set(value) - set(allowed)), [n for n in needed if n not in value]
    if unknown:
        raise ValueError(f"{where}.{unknown[0]}: unknown key; allowed: {', '.join(allowed)}")
    if missing:
        raise ValueError(f"{where}.{missing[0]}: missing; needed: {', '.join(needed)}")
    values: dict[str, Any] = {}
    for field in fields(kind):
        given, wanted = value.get(field.name), field.type
        if field.name not in needed:
            if given is None:
                continue
            wanted = get_args(wanted)[0]
        assert isinstance(wanted, type)
        fits = isinstance(given, int | float if wanted is float else wanted)
        if not fits or isinstance(given, bool):
            raise ValueError(f"{where}.{field.name}: {given!r} must be of type {wanted.__name__}")
        values[field.name] = wanted(given)
    return kind(**values)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML (the message has the line), or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be a mapping of keys to values")
    return data


def read_architecture(path: str | Path) -> dict[str, Any]:
    """The keys of a model YAML, all of them known.

    Raises:
        FileNotFoundError: no such file, here or below `configs/`.
        ValueError: not YAML, or an unknown key (the message lists the allowed ones).
    """
    path = find_config(path)
    data = load_yaml(path)
    allowed = [field.name for field in fields(Architecture) if field.name != "use_cache"]
    for key in data:
        if key not in allowed:
            raise ValueError(f"{path}: {key}: unknown key; allowed: {', '.join(sorted(allowed))}")
    return data


def load_architecture(path: str | Path) -> Architecture:
    """Read a model YAML strictly, without Transformers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key or a bad value.
    """
    try:
        return Architecture(**read_architecture(path))
    except (TypeError, ValueError) as error:
        raise name_file(path, error) from None


def name_file(path: str | Path, error: Exception) -> ValueError:
    """`error` with the config file's name in front, once."""
    text = str(error)
    return ValueError(text if str(find_config(path)) in text else f"{find_config(path)}: {text}")


def find_config(name: str | Path) -> Path:
    """Resolve a config file: as given, else below the checkout's or the installation's `configs/`.

    Raises:
        FileNotFoundError: not found; the message names what was tried.
    """
    given = Path(name)
    checkout = Path(__file__).resolve().parent.parent
    tried = [given, checkout / given, checkout / "configs" / given]
    tried += [Path(sys.prefix) / "share" / "dvpa" / "configs" / given.relative_to("configs")
              if given.parts[:1] == ("configs",)
              else Path(sys.prefix) / "share" / "dvpa" / "configs" / given]  # fmt: skip
    for candidate in tried:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{name}: no such config file (looked there and below configs/)")
