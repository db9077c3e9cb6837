"""The traps of checkpoint formats: FP8 blocks, fp32 biases, multi-token prediction, copies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import mtp_model
from safetensors.torch import save_file
from source_world import (
    BASE,
    LATENT,
    in_half_precision,
    logits_of,
    make_source,
    randomise,
    read_folder,
    text,
    unseen,
)
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dvpa.checkpoint import convert_checkpoint, export_tier
from dvpa.checkpoint.fp8 import quantise
from dvpa.model import DvpaForCausalLM

QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}

PLAIN = {"quantization_config": None, "dtype": "float32"}


def is_quantised(name: str) -> bool:
    return name.endswith("proj.weight") or name.endswith("proj_with_mqa.weight")


def store(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], shards: int = 1
) -> None:
    """A checkpoint folder; tensors are dealt out to the shards in turn."""
    folder.mkdir(parents=True)
    dealt: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for i, (name, tensor) in enumerate(tensors.items()):
        dealt[i % shards][name] = tensor.contiguous()
    weight_map = {}
    for i, part in enumerate(dealt):
        file = f"model-{i + 1:05}-of-{shards:06}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def by_hand(codes: Tensor, scale: Tensor) -> Tensor:
    """Every element times the scale of its 128 x 128 block, rounded to bf16."""
    rows = torch.arange(codes.shape[0]) // 128
    columns = torch.arange(codes.shape[1]) // 128
    return (codes.float() * scale[rows][:, columns]).bfloat16()


@pytest.fixture(scope="module")
def fp8_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3's own shape of `kv_a_proj_with_mqa`, 576 rows: four blocks and a half."""
    folder = tmp_path_factory.mktemp("fp8") / "source"
    config = DeepseekV3Config(
        **{
            **BASE,
            **LATENT,
            "num_hidden_layers": 2,
            "hidden_size": 160,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        }
    )
    torch.manual_seed(0)
    randomise(DeepseekV3ForCausalLM(config)).save_pretrained(folder.parent / "made")
    in_half_precision(folder.parent / "made", folder.parent / "plain")
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_folder(folder.parent / "plain").items():
        if is_quantised(name):
            codes, scale = quantise(tensor)
            tensors |= {name: codes, f"{name}_scale_inv": scale}
        else:
            tensors[name] = tensor
    data = {**json.loads((folder.parent / "plain" / "config.json").read_text())}
    store(folder, tensors, {**data, "quantization_config": QUANTIZATION}, shards=3)
    return folder


def test_fp8_is_taken_in_as_bf16(fp8_source: Path, tmp_path: Path) -> None:
    """Scales are multiplied, over blocks of 128 with a smaller last one, from whatever shard."""
    theirs = read_folder(fp8_source)
    index = json.loads((fp8_source / "model.safetensors.index.json").read_text())["weight_map"]
    kv = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert theirs[kv].shape == (576, 160)
    assert theirs[f"{kv}_scale_inv"].shape == (5, 2)
    assert index[kv] != index[f"{kv}_scale_inv"]
    report = convert_checkpoint(fp8_source, tmp_path / "out", text(), pool="prefix")
    ours = read_folder(tmp_path / "out")
    plain = {
        name: by_hand(tensor, theirs[f"{name}_scale_inv"]) if is_quantised(name) else tensor
        for name, tensor in theirs.items()
        if not name.endswith("_scale_inv")
    }
    assert_is_permuted(ours, plain, report.expert_order)
    state = {name: tensor.float() for name, tensor in plain.items()}
    store(tmp_path / "plain", state, json.loads((fp8_source / "config.json").read_text()) | PLAIN)
    reference = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "plain").eval()
    model = DvpaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = logits_of(reference, unseen())
    difference = (logits_of(model, unseen(), tiers="top") - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()
    export_tier(tmp_path / "out", "top", tmp_path / "again", dtype="fp8")
    again = read_folder(tmp_path / "again")
    assert again.keys() == theirs.keys()
    for name, tensor in theirs.items():
        is_router = name.endswith("gate.weight")  # Transformers has stored it in fp32
        assert again[name].dtype == (torch.bfloat16 if is_router else tensor.dtype), name
        if not is_quantised(name):
            continue
        moved = name
        if ".experts." in name:
            layer, expert = name.split(".")[2], int(name.split(".")[5])
            place = report.expert_order[layer].index(expert)
            moved = name.replace(f".experts.{expert}.", f".experts.{place}.")
        assert torch.equal(again[moved].view(torch.uint8), tensor.view(torch.uint8)), name
        scales = (again[f"{moved}_scale_inv"], theirs[f"{name}_scale_inv"])
        torch.testing.assert_close(*scales, rtol=2**-8, atol=0)
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
        == QUANTIZATION
    )


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
                assert torch.equal(row, tensor[orders[layer]])
            left.remove(name)
            continue
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
        left.remove(name)
    assert not left


@pytest.mark.parametrize("pool", ["prefix", "striped"])
def test_round_trip_is_bit_for_bit(pool: str, tmp_path: Path) -> None:
    """DeepSeek-V3 in bf16, in and out again at the top tier: the permutation, and nothing else."""
    make_source(tmp_path / "made")
    in_half_precision(tmp_path / "made", tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out", text(), pool=pool)
    theirs = read_folder(tmp_path / "source")
    assert_is_permuted(read_folder(tmp_path / "out"), theirs, report.expert_order)
    exported = export_tier(tmp_path / "out", "top", tmp_path / "again", shard_bytes=30_000)
    assert exported.model_type == "deepseek_v3"
    again = read_folder(tmp_path / "again")
    assert again.keys() == theirs.keys()
    for name, tensor in theirs.items():
        layer = name.split(".")[2] if ".mlp." in name else ""
        if layer in report.expert_order and "shared" not in name:
            order = report.expert_order[layer]
            if pool == "striped":  # experts go back to their own groups
                order = [order[place * 4 + group] for group in range(4) for place in range(4)]
            if ".experts." in name:
                expert = int(name.split(".")[5])
                name = name.replace(f".experts.{expert}.", f".experts.{order.index(expert)}.")
            else:
                tensor = tensor[order]
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name
    before, after = (
        json.loads((tmp_path / folder / "config.json").read_text())
        for folder in ("source", "again")
    )
    after["num_nextn_predict_layers"] = before["num_nextn_predict_layers"]  # no such weights
    assert {key: before[key] for key in after if key in before} == {
        key: after[key] for key in after if key in before
    }
    reloaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "again").eval()
    source = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "source").eval()
    expected = logits_of(source.float(), unseen())
    assert torch.allclose(logits_of(reloaded.float(), unseen()), expected, rtol=0, atol=1e-4)


@pytest.fixture
def mtp_source(tmp_path: Path) -> Path:
    """A V3 checkpoint with its module, as one of ours exports it with `keep_mtp`."""
    config_changes = {"tiers": None, "num_experts_per_tok": 5, "topk_group": 2, "difficulty": None}
    model = mtp_model(**config_changes, routed_scaling_factor=2.2)
    model.save_pretrained(tmp_path / "made")
    export_tier(tmp_path / "made", 0, tmp_path / "source", keep_mtp=True)
    return tmp_path / "source"


def test_multi_token_prediction_is_kept(mtp_source: Path, tmp_path: Path) -> None:
    """Layer L is no layer of the stack, its experts are ranked too, and its copies are not kept."""
    original = DvpaForCausalLM.from_pretrained(tmp_path / "made").eval()
    report = convert_checkpoint(mtp_source, tmp_path / "out", text())
    ours = DvpaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert ours.config.num_nextn_predict_layers == 1
    assert report.expert_order.keys() == {"1", "2", "3"}
    assert report.expert_order["3"] != list(range(16))
    assert report.left_out == {
        "a copy of model.embed_tokens.weight": 1,
        "a copy of lm_head.weight": 1,
    }
    with torch.no_grad():
        inputs = {"input_ids": unseen(), "use_cache": False, "with_mtp": True}
        expected, out = original(**inputs, tiers=0), ours(**inputs, tiers="top")
    assert torch.allclose(out.logits, expected.logits, atol=1e-4)
    assert torch.allclose(out.mtp_logits, expected.mtp_logits, atol=1e-4)
    export_tier(tmp_path / "out", "top", tmp_path / "again", keep_mtp=True)
    assert read_folder(tmp_path / "again").keys() == read_folder(mtp_source).keys()


def test_multi_token_prediction_can_be_dropped(mtp_source: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(mtp_source, tmp_path / "out", text(), drop_mtp=True)
    assert report.left_out["multi-token prediction"] > 50
    ours = DvpaForCausalLM.from_pretrained(tmp_path / "out")
    assert ours.config.num_nextn_predict_layers == 0


def test_a_module_with_a_head_of_its_own_is_refused(mtp_source: Path, tmp_path: Path) -> None:
    tensors = read_folder(mtp_source)
    name = "model.layers.3.shared_head.head.weight"
    tensors[name] = tensors[name] + 1.0
    save_file(tensors, mtp_source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}: differs from lm_head.weight"):
        convert_checkpoint(mtp_source, tmp_path / "out", text())
    convert_checkpoint(mtp_source, tmp_path / "out", None, drop_mtp=True)


def test_a_layer_that_transformers_only_promises_is_not_missed(tmp_path: Path) -> None:
    """Its config says `num_nextn_predict_layers: 1` of checkpoints that have no such layer."""
    make_source(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_nextn_predict_layers": 1}))
    convert_checkpoint(tmp_path / "source", tmp_path / "out", None)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    )


def test_tied_embeddings_stored_twice(tmp_path: Path) -> None:
    make_source(tmp_path / "source", tie_word_embeddings=True)
    tensors = read_folder(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    store(tmp_path / "twice", tensors, config)
    report = convert_checkpoint(tmp_path / "twice", tmp_path / "out", None)
    assert report.left_out == {"a copy of model.embed_tokens.weight": 1}
    tensors["lm_head.weight"][3, 3] += 1
    store(tmp_path / "differing", tensors, config)
    with pytest.raises(ValueError, match=r"lm_head.weight: differs from model.embed_tokens"):
        convert_checkpoint(tmp_path / "differing", tmp_path / "no", None)


def test_older_spellings_of_the_rotary_settings(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` with a `type`, as DeepSeek-V3's own config.json has them."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    source = make_source(tmp_path / "source", rope_parameters={**yarn, "rope_theta": 500.0})
    path = tmp_path / "source" / "config.json"
    data = json.loads(path.read_text())
    data.pop("rope_parameters")
    data["rope_theta"] = 500.0
    data["rope_scaling"] = {"type": "yarn", **{k: v for k, v in yarn.items() if k != "rope_type"}}
    data.pop("dtype")
    data["torch_dtype"] = "float32"
    path.write_text(json.dumps(data))
    convert_checkpoint(tmp_path / "source", tmp_path / "out", text())
    ours = DvpaForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = logits_of(source, unseen())
    assert torch.allclose(logits_of(ours, unseen(), tiers="top"), expected, atol=1e-4)


def test_stored_rotary_frequencies_are_left_out(tmp_path: Path) -> None:
    make_source(tmp_path / "source", "mixtral")
    tensors = read_folder(tmp_path / "source")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    store(tmp_path / "old", tensors, config)
    report = convert_checkpoint(tmp_path / "old", tmp_path / "out", None)
    assert report.left_out == {"rotary frequencies": 3}
