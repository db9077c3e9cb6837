"""Small checkpoints in DeepSeek-V3's FP8: sources, what is to come of them, and damage."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from source_world import BASE, LATENT, in_half_precision, randomise, read_folder
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dvpa.checkpoint.fp8 import quantise

QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
SCALE = "_scale_inv"
KV = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
EXPERT = "model.layers.1.mlp.experts.6.up_proj.weight"  # outside of the base pool
MISFITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {  # whoever reads them
    "no scales": (lambda t: t.pop(EXPERT + SCALE), f"{EXPERT}{SCALE}: missing"),
    "shape": (
        lambda t: t.update({KV + SCALE: torch.ones(4, 2)}),
        rf"{KV}{SCALE}: F32 \(4, 2\), expected F32 \(5, 2\)",
    ),
    "another FP8": (
        lambda t: t.update({EXPERT: t[EXPERT].float().to(torch.float8_e5m2)}),
        rf"{EXPERT}: F8_E5M2 \(144, 160\) is no matrix of F8_E4M3",
    ),
}


def is_quantised(name: str) -> bool:
    return name.endswith("proj.weight") or name.endswith("proj_with_mqa.weight")


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], weight_map: Mapping[str, str]
) -> None:
    """Write tensors into the files that an index names, and the index; other shards go."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for file in set(weight_map.values()):
        part = {name: t.contiguous() for name, t in tensors.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def store(
    folder: Path, tensors: Mapping[str, Tensor], config: dict[str, Any], shards: int = 1
) -> None:
    """A checkpoint folder; tensors are dealt out to the shards in turn."""
    folder.mkdir(parents=True)
    files = [f"model-{i + 1:05}-of-{shards:06}.safetensors" for i in range(shards)]
    write_shards(folder, tensors, {name: files[i % shards] for i, name in enumerate(tensors)})
    (folder / "config.json").write_text(json.dumps(config))


def by_hand(codes: Tensor, scale: Tensor) -> Tensor:
    """Every element times the scale of its 128 x 128 block, rounded to bf16."""
    rows = torch.arange(codes.shape[0]) // 128
    columns = torch.arange(codes.shape[1]) // 128
    return (codes.float() * scale[rows][:, columns]).bfloat16()


def make_fp8_source(folder: Path, seed: int = 0) -> Path:
    """DeepSeek-V3's own shape of `kv_a_proj_with_mqa`, 576 rows: four blocks and a half.

    Made with Transformers; scales lie in other shards than their weights.
    """
    config = DeepseekV3Config(
        **{
            **BASE,
            **LATENT,
            "num_hidden_layers": 2,
            "hidden_size": 160,
            "moe_intermediate_size": 144,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        }
    )
    torch.manual_seed(seed)
    randomise(DeepseekV3ForCausalLM(config), seed).save_pretrained(
        folder.parent / f"{folder.name}-made"
    )
    plain = folder.parent / f"{folder.name}-plain"
    in_half_precision(folder.parent / f"{folder.name}-made", plain)
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_folder(plain).items():
        if is_quantised(name):
            codes, scale = quantise(tensor)
            tensors |= {name: codes, f"{name}_scale_inv": scale}
        else:
            tensors[name] = tensor
    data = json.loads((plain / "config.json").read_text())
    store(folder, tensors, {**data, "quantization_config": QUANTIZATION}, shards=3)
    return folder


def same(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit, scales of infinity and codes of NaN too."""
    bits = [each.contiguous().flatten().view(torch.uint8) for each in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


def assert_is_permuted(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], orders: dict[str, list[int]]
) -> None:
    """Every tensor of theirs is in ours, bit for bit, experts in their recorded order."""
    left = set(ours)
    for name, tensor in theirs.items():
        if ".mlp." in name:
            layer = name.split(".")[2]
        if ".experts." in name:
            expert = int(name.split(".")[5])
            place = orders[layer].index(expert)
            name = name.replace(f".experts.{expert}.", f".experts.{place}.")
        elif name.endswith("mlp.gate.weight"):
            tensor = tensor[orders[layer]]
        elif name.endswith("e_score_correction_bias"):
            name = name.replace("e_score_correction_bias", "tier_bias")
            for row in ours[name]:
                assert same(row, tensor[orders[layer]])
            left.remove(name)
            continue
        assert same(ours[name], tensor), name
        left.remove(name)
    assert not left


def dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight of a checkpoint, FP8 as bf16."""
    return {
        name: by_hand(tensor, tensors[name + SCALE]) if name + SCALE in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder of several shards; what is new goes into one of its own."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = read_folder(folder)
    change(tensors)
    write_shards(folder, tensors, {name: index.get(name, "new.safetensors") for name in tensors})


def quantise_folder(folder: Path, out: Path) -> Path:
    """A checkpoint of ours in bf16 or fp32 again in FP8, with all its other files."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_folder(folder).items():
        tensors[name] = tensor
        if is_quantised(name) and ".eh_proj." not in name:
            tensors[name], tensors[name + SCALE] = quantise(tensor)
    store(out, tensors, {}, shards=2)
    for path in folder.iterdir():
        if path.is_file() and "safetensors" not in path.name:
            (out / path.name).write_bytes(path.read_bytes())
    edit_config(out, quantization_config=QUANTIZATION, dtype="bfloat16")
    return out


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
