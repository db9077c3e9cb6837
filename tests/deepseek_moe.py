"""DeepSeekMoE-16B's architecture in plain PyTorch, for want of a class in Transformers.

Written from the published description (arXiv 2401.06066: sections 2 and 3, softmax affinities as
gates, shared experts beside the chosen; the attention is LLaMA's) and from the keys of the
published config.json. Slow, fp32, one token at a time where it helps to be sure.

Letters: B batch, S positions, D hidden, H heads, X head dims.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "model_type": "deepseek",
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 64,
}


class DeepseekMoe:
    """Random weights under the published names, and logits from them."""

    def __init__(self, seed: int = 0, **changes: Any) -> None:
        self.config = {**CONFIG, **changes}
        self._generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        c = self.config
        hidden, vocabulary = c["hidden_size"], c["vocab_size"]
        self._add("model.embed_tokens.weight", vocabulary, hidden)
        for i in range(c["num_hidden_layers"]):
            prefix = f"model.layers.{i}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self._add(f"{prefix}{norm}.weight", hidden)
            keys = c["num_key_value_heads"] * hidden // c["num_attention_heads"]
            for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
                self._add(f"{prefix}self_attn.{name}_proj.weight", rows, hidden)
            if i < c["first_k_dense_replace"]:
                self._add_mlp(f"{prefix}mlp.", c["intermediate_size"])
                continue
            width = c["moe_intermediate_size"]
            self._add(f"{prefix}mlp.gate.weight", c["n_routed_experts"], hidden)
            self._add_mlp(f"{prefix}mlp.shared_experts.", width * c["n_shared_experts"])
            for expert in range(c["n_routed_experts"]):
                self._add_mlp(f"{prefix}mlp.experts.{expert}.", width)
        self._add("model.norm.weight", hidden)
        self._add("lm_head.weight", vocabulary, hidden)

    def save(self, folder: Path) -> None:
        """As the published checkpoint looks."""
        folder.mkdir(parents=True)
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config))

    def logits(self, ids_BS: Tensor) -> Tensor:
        """Logits [B, S, vocabulary] of whole sequences."""
        hidden = self.tensors["model.embed_tokens.weight"][ids_BS]
        for i in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{i}."
            hidden = hidden + self._attention(
                prefix, self._norm(prefix + "input_layernorm", hidden)
            )
            normed = self._norm(prefix + "post_attention_layernorm", hidden)
            if i < self.config["first_k_dense_replace"]:
                hidden = hidden + self._mlp(f"{prefix}mlp.", normed)
            else:
                hidden = hidden + self._moe(f"{prefix}mlp.", normed)
        return F.linear(self._norm("model.norm", hidden), self.tensors["lm_head.weight"])

    def _attention(self, prefix: str, x_BSD: Tensor) -> Tensor:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        width = self.config["hidden_size"] // heads
        query, key, value = (
            F.linear(x_BSD, self.tensors[f"{prefix}self_attn.{name}_proj.weight"])
            .unflatten(-1, (-1, width))
            .transpose(1, 2)
            for name in "qkv"
        )
        query, key = self._rotate(query), self._rotate(key)
        mixed = []
        for head in range(heads):
            of_group = head // (heads // groups)
            scores = query[:, head] @ key[:, of_group].mT / width**0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            mixed.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ value[:, of_group])
        return F.linear(torch.cat(mixed, -1), self.tensors[f"{prefix}self_attn.o_proj.weight"])

    def _rotate(self, x_BHSX: Tensor) -> Tensor:
        """LLaMA's: dimension i turns with dimension i + X / 2."""
        half = x_BHSX.shape[-1] // 2
        rates = self.config["rope_theta"] ** (-torch.arange(half) / half)
        angle = torch.arange(x_BHSX.shape[-2])[:, None] * rates
        first, second = x_BHSX.split(half, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def _moe(self, prefix: str, x_BSD: Tensor) -> Tensor:
        out = self._mlp(f"{prefix}shared_experts.", x_BSD)
        affinity = F.linear(x_BSD, self.tensors[f"{prefix}gate.weight"]).softmax(-1)
        for b, s in torch.cartesian_prod(*(torch.arange(size) for size in x_BSD.shape[:2])):
            gates, chosen = affinity[b, s].sort(descending=True)
            gates = gates[: self.config["num_experts_per_tok"]]
            if self.config["norm_topk_prob"]:
                gates = gates / gates.sum()
            for gate, expert in zip(gates, chosen, strict=False):
                out[b, s] += gate * self._mlp(f"{prefix}experts.{int(expert)}.", x_BSD[b, s])
        return out

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate, up, down = (
            self.tensors[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return x / scale * self.tensors[f"{name}.weight"]

    def _add_mlp(self, prefix: str, width: int) -> None:
        hidden = self.config["hidden_size"]
        for name in ("gate", "up"):
            self._add(f"{prefix}{name}_proj.weight", width, hidden)
        self._add(f"{prefix}down_proj.weight", hidden, width)

    def _add(self, name: str, *shape: int) -> None:
        draw = torch.randn(shape, generator=self._generator) * 0.2
        self.tensors[name] = draw + 1.0 if "norm" in name else draw
