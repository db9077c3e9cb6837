"""Two synthetic parents for merge timings, as sharded safetensors checkpoints; a shard at a time.

    python scripts/assemble_parents.py OUT                       # 0.992 GB bf16 each, 4,719 tensors
    python scripts/assemble_parents.py OUT --layers 96           # eight times the tensors
    python scripts/assemble_parents.py OUT --hidden 1536 --width 640  # tensors ten times as large
    python scripts/assemble_parents.py OUT --fp8                 # DeepSeek-V3's names and FP8, MTP

parent_b is parent_a plus noise whose size differs by class, so that a threshold has something to
separate; every fifth layer's attention is the same in both.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dvpa.checkpoint.fp8 import quantise

VOCABULARY = 32_000
Shape = tuple[int, ...]


def qwen3_moe(layers: int, experts: int, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of a Qwen3-MoE model of 8 query and 4 key heads."""
    yield "lm_head.weight", (VOCABULARY, hidden)
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield from _experts(f"{prefix}mlp", experts, hidden, width)
        yield f"{prefix}mlp.gate.weight", (experts, hidden)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        for name in ("k", "q"):
            yield f"{prefix}self_attn.{name}_norm.weight", (hidden // 8,)
        for name, rows in (("k", hidden // 2), ("o", hidden), ("q", hidden), ("v", hidden // 2)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
    yield "model.norm.weight", (hidden,)


def deepseek_v3(layers: int, experts: int, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of a DeepSeek-V3 model: one dense layer, a 576-row matrix, an MTP layer."""
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(layers + 1):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}self_attn.q_proj.weight", (8 * 128, hidden)
        yield f"{prefix}self_attn.kv_a_proj_with_mqa.weight", (576, hidden)
        yield f"{prefix}self_attn.kv_a_layernorm.weight", (512,)
        yield f"{prefix}self_attn.kv_b_proj.weight", (8 * 128, 512)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, 8 * 64)
        if layer == 0:
            yield from _mlp(f"{prefix}mlp", hidden, 3 * hidden)
            continue
        yield f"{prefix}mlp.gate.weight", (experts, hidden)
        yield f"{prefix}mlp.gate.e_score_correction_bias", (experts,)
        yield from _mlp(f"{prefix}mlp.shared_experts", hidden, width)
        yield from _experts(f"{prefix}mlp", experts, hidden, width)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{prefix}{name}.weight", (hidden,)
    yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def _experts(prefix: str, experts: int, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    for expert in range(experts):
        yield from _mlp(f"{prefix}.experts.{expert}", hidden, width)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.down_proj.weight", (hidden, width)
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)


def noise(name: str) -> float:
    """How far parent_b is from parent_a, relative to the weights."""
    if "self_attn" in name:
        return 0.0 if int(name.split(".")[2]) % 5 == 0 else 0.03
    return 0.10 if ".experts." in name else 0.01


class Values:
    """Normal values by the hundred million: slices of one drawn pool, from a place by name."""

    def __init__(self) -> None:
        self._pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))

    def take(self, shape: Shape, seed: int) -> Tensor:
        """fp32 values of standard deviation 1."""
        size = torch.Size(shape).numel()
        start = seed * 7_919 % (self._pool.numel() // 2)
        repeats = -(-(start + size) // self._pool.numel())
        pool = self._pool.repeat(repeats) if repeats > 1 else self._pool
        return pool[start : start + size].view(shape)


def tensors_of(
    name: str, shape: Shape, values: Values, seed: int, parent: str, fp8: bool
) -> dict[str, Tensor]:
    """The tensor of a name, or its FP8 codes and scales."""
    value = 0.02 * values.take(shape, seed)
    if parent == "parent_b":
        value = value + 0.02 * noise(name) * values.take(shape, seed + 1_000_003)
    if name.endswith("e_score_correction_bias"):
        return {name: value}
    if fp8 and "_proj" in name and "eh_proj" not in name:
        codes, scales = quantise(value)
        return {name: codes, f"{name}_scale_inv": scales}
    return {name: value.bfloat16()}


def write_parents(
    out: Path, shapes: list[tuple[str, Shape]], config: dict[str, Any], shard_mb: float, fp8: bool
) -> int:
    """Write both; returns the bytes of tensor data of one."""
    values, total = Values(), 0
    for parent in ("parent_a", "parent_b"):
        folder = out / parent
        folder.mkdir(parents=True)
        files: list[list[str]] = []
        shard: dict[str, Tensor] = {}
        used = total = 0
        for seed, (name, shape) in enumerate(shapes):
            for key, tensor in tensors_of(name, shape, values, seed, parent, fp8).items():
                if shard and used + tensor.nbytes > shard_mb * 1e6:
                    files.append(flush(folder, len(files), shard))
                    shard, used = {}, 0
                shard[key] = tensor.contiguous()
                used += tensor.nbytes
                total += tensor.nbytes
        files.append(flush(folder, len(files), shard))
        weight_map = {}
        for i, keys in enumerate(files):
            name = f"model-{i + 1:05d}-of-{len(files):06d}.safetensors"
            (folder / f"part-{i}.tmp").rename(folder / name)
            weight_map.update(dict.fromkeys(keys, name))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        print(folder, len(weight_map), "tensors", len(files), "shards", f"{total / 1e9:.3f} GB")
    return total


def flush(folder: Path, number: int, shard: dict[str, Tensor]) -> list[str]:
    """Write a shard under a provisional name; returns the names it holds."""
    save_file(shard, folder / f"part-{number}.tmp", metadata={"format": "pt"})
    return list(shard)


def make_parents(
    out: Path,
    layers: int = 12,
    experts: int = 128,
    hidden: int = 512,
    width: int = 192,
    shard_mb: float = 200,
    fp8: bool = False,
) -> int:
    """Write OUT/parent_a and OUT/parent_b; returns the bytes of tensor data of one."""
    shapes = list((deepseek_v3 if fp8 else qwen3_moe)(layers, experts, hidden, width))
    config = {
        "model_type": "deepseek_v3" if fp8 else "qwen3_moe",
        "architectures": ["DeepseekV3ForCausalLM" if fp8 else "Qwen3MoeForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * hidden,
        "moe_intermediate_size": width,
        "num_attention_heads": 8,
        "num_key_value_heads": 8 if fp8 else 4,
        "head_dim": hidden // 8,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if fp8:
        config |= {
            "n_routed_experts": experts,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
        }
    else:
        config |= {"num_experts": experts, "decoder_sparse_step": 1, "norm_topk_prob": True}
    return write_parents(out, shapes, config, shard_mb, fp8)


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="receives parent_a and parent_b")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=192, help="of an expert")
    parser.add_argument("--shard-mb", type=float, default=200)
    parser.add_argument("--fp8", action="store_true")
    make_parents(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
