"""Tiny random models for the tests: every part present, no value that would hide a mistake.

Selection biases are non-zero and of both signs, norm weights differ from one, tiers differ in every
field, and the initial weights are large enough for the experts to matter.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM
from dvpa.tiers import TierMap

TIERS = [
    {"name": "base", "num_groups": 1, "top_k": 2, "topk_group": 1, "routed_scaling_factor": 1.41},
    {"name": "middle", "num_groups": 2, "top_k": 3, "topk_group": 1, "routed_scaling_factor": 1.7},
    {"name": "top", "num_groups": 4, "top_k": 5, "topk_group": 3, "routed_scaling_factor": 2.2},
]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}


def tiny_config(**changes: Any) -> DvpaConfig:
    """Three layers (one dense), four groups of four experts, three tiers, a difficulty head."""
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "n_routed_experts": 16,
        "n_group": 4,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "tiers": TIERS,
        "difficulty": {"probe_layer": 2, "hidden_size": 16},
    }
    return DvpaConfig(**{**fields, **changes})


@torch.no_grad()
def tiny_model(
    config: DvpaConfig | None = None, seed: int = 0, bias: float = 0.3, shift: float = 0.0
) -> DvpaForCausalLM:
    """A random model in eval mode; each tier has its own biases, normal(`shift`, `bias`)."""
    torch.manual_seed(seed)
    model = DvpaForCausalLM(tiny_config() if config is None else config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(1.0, 0.2)
        elif parameter.dim() == 1:
            parameter.normal_(0.0, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("tier_bias"):
            buffer.normal_(shift, bias)
    return model


def mtp_model(seed: int = 0, **changes: Any) -> DvpaForCausalLM:
    """`tiny_model` with a module for multi-token prediction."""
    return tiny_model(tiny_config(num_nextn_predict_layers=1, **changes), seed=seed)


class Batch(NamedTuple):
    """Left-padded prompts: token ids, mask and positions, each int64 [B, S]."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


def left_padded(lengths: list[int], vocab_size: int = 64, seed: int = 0) -> Batch:
    """Random prompts of the given lengths, padded on the left to the longest."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, vocab_size, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return Batch(ids * mask, mask, (mask.cumsum(1) - 1).clamp(min=0))


def moe_layers(model: DvpaForCausalLM) -> list[Any]:
    """The MoE blocks of a model, first layer first."""
    return [layer.mlp for layer in model.model.layers if layer.is_moe]


def thresholds(model: DvpaForCausalLM, *cuts: float) -> TierMap:
    """A map that only compares the raw difficulty with cuts."""
    return TierMap("threshold", ("base", "middle", "top"), model.tier_map.costs, 2, cuts)


def logits_with_mtp(model: DvpaForCausalLM, batch: Batch, tiers: Any) -> tuple[Tensor, Tensor]:
    """Logits and the module's logits."""
    out = model(**batch._asdict(), tiers=tiers, use_cache=False, with_mtp=True)
    return out.logits, out.mtp_logits
