"""Small random checkpoints of the families that `convert` takes in, no value hiding a mistake.

Made with Transformers: norms differ from one, biases from zero, and initial weights are large
enough for the experts to matter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dvpa.checkpoint.calibration_text import CalibrationText

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
ROUTED = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


def deepseek_v3(**changes: Any) -> PreTrainedModel:
    """Four groups of four experts, of which a token may use two."""
    grouped = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    fields = {**BASE, **LATENT, **ROUTED, **grouped, **changes}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**fields))


def deepseek_v2(**changes: Any) -> PreTrainedModel:
    """As V2: softmax, groups by their best expert, weights that sum to less than one."""
    grouped = {
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
        "n_shared_experts": 2,
    }
    fields = {**BASE, **LATENT, **ROUTED, **grouped, **changes}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**fields))


def deepseek_v2_lite(**changes: Any) -> PreTrainedModel:
    """As V2-Lite: no query latent, no groups."""
    lite = {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    }
    return deepseek_v2(**{**lite, **changes})


def olmoe(**changes: Any) -> PreTrainedModel:
    """Norms over whole projections, biases, weights that sum to less than one; no shared expert."""
    fields = {
        **BASE,
        "intermediate_size": 16,
        "num_experts": 16,
        "attention_bias": True,
        "num_key_value_heads": 2,
    }
    return OlmoeForCausalLM(OlmoeConfig(**{**fields, **changes}))


def qwen3_moe(**changes: Any) -> PreTrainedModel:
    """Norms over each head, grouped keys, heads wider than their share, one dense layer."""
    fields = {
        **BASE,
        "num_experts": 16,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "attention_bias": True,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**fields, **changes}))


def mixtral(**changes: Any) -> PreTrainedModel:
    """Few wide experts, tensors under other names."""
    fields = {
        **BASE,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
    }
    return MixtralForCausalLM(MixtralConfig(**{**fields, **changes}))


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "deepseek_v3": deepseek_v3,
    "deepseek_v2": deepseek_v2,
    "deepseek_v2_lite": deepseek_v2_lite,
    "olmoe": olmoe,
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
}


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draw every tensor anew, those that start at zero or one too; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            tensor.normal_(1.0, 0.2, generator=generator)
        elif name.endswith("e_score_correction_bias"):
            tensor.normal_(-0.4, 0.3, generator=generator)
        elif "inv_freq" not in name:
            tensor.normal_(0.0, 0.2, generator=generator)
    return model.eval()


def make_source(folder: Path, family: str = "deepseek_v3", **changes: Any) -> PreTrainedModel:
    """Save a random checkpoint of a family in several shards, and return the model."""
    torch.manual_seed(0)
    model = randomise(FAMILIES[family](**changes))
    model.save_pretrained(folder, max_shard_size="50KB")
    return model


def text(sequences: int = 8, length: int = 24, seed: int = 1) -> CalibrationText:
    """Random tokens to measure experts on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (sequences, length), generator=generator)
    return CalibrationText(ids, "random tokens")


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits of whole sequences."""
    return model(ids, use_cache=False, **kwargs).logits


def unseen(length: int = 24) -> Tensor:
    """Sequences that no calibration has seen."""
    return text(3, length, seed=7).ids


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def in_half_precision(folder: Path, out: Path) -> None:
    """A checkpoint again in bf16, but for what Transformers keeps in fp32; in several shards."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size="30KB")
