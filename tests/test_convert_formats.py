"""The traps of checkpoint formats: fp32 biases, multi-token prediction, copies; FP8 has its own."""

import json
from pathlib import Path

import pytest
import torch
from fp8_world import assert_is_permuted, store
from helpers import mtp_model
from safetensors.torch import save_file
from source_world import (
    in_half_precision,
    logits_of,
    make_source,
    read_folder,
    text,
    unseen,
)
from transformers import DeepseekV3ForCausalLM

from dvpa.checkpoint import convert_checkpoint, export_tier
from dvpa.model import DvpaForCausalLM


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
