"""Small parents with DeepSeek-V3's names, as shards on the disk, and the fp32 formula on them."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvpa.checkpoint.fp8 import quantise

LAYERS, EXPERTS, HIDDEN, WIDTH = 3, 4, 256, 160
FP8_PARTS = ("_proj.weight", "_proj_with_mqa.weight")
ALL = {"match": "all", "lambda": {"a": 1.0}}
MIX = {"match": "all", "lambda": {"a": 0.6, "b": 0.4}}
GATE = "model.layers.1.mlp.gate.weight"
QUANTISATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def weights(seed: int, fp8: bool = False, scale: float = 0.02) -> dict[str, Tensor]:
    """One dense and two MoE layers, a multi-token prediction layer, one name nobody knows."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (300, HIDDEN)}
    for layer in range(LAYERS + 1):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _layer(layer).items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (300, HIDDEN)}
    shapes["model.unheard_of"] = (7, 3)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * scale
        if fp8 and name.endswith(FP8_PARTS) and "eh_proj" not in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(value)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = value
        else:
            tensors[name] = value.bfloat16()
    return tensors


def _layer(layer: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_a_proj_with_mqa.weight": (576, HIDDEN),  # 4.5 blocks, as in V3
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    }
    if layer == 0:
        return {**shapes, **_mlp("mlp", 2 * WIDTH)}
    shapes |= {"mlp.gate.weight": (EXPERTS, HIDDEN), "mlp.gate.e_score_correction_bias": (EXPERTS,)}
    shapes |= _mlp("mlp.shared_experts", WIDTH)
    for expert in range(EXPERTS):
        shapes |= _mlp(f"mlp.experts.{expert}", WIDTH)
    if layer == LAYERS:
        shapes |= {"enorm.weight": (HIDDEN,), "eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
        shapes["shared_head.norm.weight"] = (HIDDEN,)
    return shapes


def _mlp(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (width, HIDDEN),
        f"{name}.up_proj.weight": (width, HIDDEN),
        f"{name}.down_proj.weight": (HIDDEN, width),
    }


def save(folder: Path, tensors: Mapping[str, Tensor], shards: int = 4, **config: Any) -> Path:
    """Write a checkpoint; every shard takes every n-th tensor, so that scales lie elsewhere."""
    folder.mkdir(parents=True)
    fp8 = any(name.endswith("_scale_inv") for name in tensors)
    settings = {"model_type": "deepseek_v3", "num_hidden_layers": LAYERS, **config}
    if fp8:
        settings = {"quantization_config": QUANTISATION, **settings}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    names, metadata = list(tensors), {"format": "pt", "made_by": "the tests"}
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata=metadata)
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:06d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata=metadata)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by safetensors' own reader."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().flatten().view(torch.uint8)


def same(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit."""
    return left.dtype == right.dtype and left.shape == right.shape and bits(left).equal(bits(right))


def formula(shares: list[float], tensors: list[Tensor]) -> Tensor:
    """sum of share * tensor, in fp32 from the left, rounded once."""
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    total = tensors[0].to(wide) * shares[0]
    for share, tensor in zip(shares[1:], tensors[1:], strict=True):
        total = total + tensor.to(wide) * share
    return total.to(tensors[0].dtype)


def write_recipe(path: Path, parents: Mapping[str, Path], rules: Any, **keys: Any) -> Path:
    """A recipe file; the first parent is the base."""
    data = {
        "parents": {name: str(folder) for name, folder in parents.items()},
        "base": next(iter(parents)),
        "rules": rules,
        **keys,
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the shard that holds what `change` touches; the index stays as it is."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        before = dict(tensors)
        change(tensors)
        if tensors.keys() != before.keys() or any(tensors[k] is not before[k] for k in before):
            save_file(tensors, path, metadata={"format": "pt"})


def command(world: Path) -> list[str]:
    """`dvpa assemble` of WORLD/r.yaml into WORLD/out, as a process of its own."""
    program = [sys.executable, "-m", "dvpa", "assemble", "--threads", "2"]
    return [*program, str(world / "r.yaml"), str(world / "out")]


def save_parents(root: Path, names: str, fp8: bool = False) -> dict[str, Path]:
    """A parent for each letter."""
    return {name: save(root / name, weights(i, fp8=fp8)) for i, name in enumerate(names)}


def copied_world(parents: Mapping[str, Path], folder: Path) -> Path:
    """Copies of parents that may be damaged, and a recipe, r.yaml, that mixes them."""
    for name, parent in parents.items():
        shutil.copytree(parent, folder / name)
    write_recipe(folder / "r.yaml", {name: folder / name for name in parents}, [MIX])
    return folder
