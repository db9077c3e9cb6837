"""Small random checkpoints of the families that `convert` takes in, no value hiding a mistake.

Made with Transformers: norms differ from one, biases from zero, and initial weights are large
enough for the experts to matter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

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


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {"deepseek_v3": deepseek_v3}


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


def reversed_text(length: int = 24) -> Tensor:
    """Sequences that no calibration has seen."""
    return text(3, length, seed=7).ids
