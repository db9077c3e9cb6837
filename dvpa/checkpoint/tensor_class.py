"""What a tensor is, by its name: the classes that assembly rules match and reports count.

Names are those of the DeepSeek, Qwen, Mixtral and OLMoE families on the disk. A tensor of the
multi-token prediction module (V3: the layer after the last one) is `mtp`, whatever it does there.
Normalisations inside attention are `norms`; the output head is one of `embeddings`; what no pattern
knows is `other`.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

_PATTERNS = {  # the first that is found decides
    "difficulty_head": r"^difficulty_head\.",
    "norms": r"(^|\.)\w*norm\w*\.(weight|bias)$",
    "routed_experts": r"\.experts\.",
    "shared_experts": r"\.shared_experts?(_gate)?\.",
    "router": r"\.(gate|router)\.",
    "attention": r"\.(self_attn|attention|attn|linear_attn)\.",
    "dense_mlp": r"\.(mlp|feed_forward|ffn)\.",
    "embeddings": r"(^|\.)(embed_tokens|lm_head|wte|embed_out)\.",
}
CLASSES = (
    *("routed_experts", "shared_experts", "dense_mlp", "router", "attention", "norms"),
    *("embeddings", "mtp", "difficulty_head", "other"),
)
_COMPILED = {name: re.compile(pattern) for name, pattern in _PATTERNS.items()}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_MTP = re.compile(r"^(model\.)?mtp\.")


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's class, and its layer and routed expert where its name has one."""

    tensor_class: str
    layer: int | None
    expert: int | None


def place_of(name: str, num_layers: int) -> Place:
    """Where a tensor belongs in a model of `num_layers` layers (its multi-token module apart)."""
    layer, expert = (_number(pattern, name) for pattern in (_LAYER, _EXPERT))
    if _MTP.search(name) or (layer is not None and layer >= num_layers):
        return _place("mtp", layer, expert)
    found = (kind for kind, pattern in _COMPILED.items() if pattern.search(name))
    return _place(next(found, "other"), layer, expert)


@lru_cache(maxsize=64)  # an expert's matrices share theirs
def _place(tensor_class: str, layer: int | None, expert: int | None) -> Place:
    return Place(tensor_class, layer, expert)


def _number(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.search(name)
    return int(match[1]) if match else None
