"""`save_pretrained` and `from_pretrained`: bit-exact, or one error that names the tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import left_padded, moe_layers, thresholds, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM, DvpaModel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_saving_and_loading_is_bit_exact(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(tie_word_embeddings=tied)).to(dtype)
    model.tier_map = thresholds(model, 0.25, 0.75)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    loaded = DvpaForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype, name
        assert torch.equal(before[name], after[name]), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.tier_map == model.tier_map
    assert loaded.config.tiers == model.config.tiers
    batch = left_padded([6, 3])
    assert torch.equal(model(*batch, tiers=2).logits, loaded(*batch, tiers=2).logits)


@torch.no_grad()
def test_files_carry_deepseeks_names_and_an_fp32_bias(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.1.mlp.gate.tier_bias"].dtype == torch.float32
    assert tensors["model.layers.2.mlp.experts.15.gate_proj.weight"].shape == (16, 32)
    assert not any("gate_up_proj" in name for name in tensors)


@torch.no_grad()
def test_experts_land_where_they_belong(tmp_path: Path) -> None:
    """Numeric order, not alphabetic: expert 10 does not follow expert 1."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for expert in range(16):
        prefix = f"model.layers.1.mlp.experts.{expert}."
        stacked = moe_layers(model)[0].experts
        joined = torch.cat(
            (tensors[prefix + "gate_proj.weight"], tensors[prefix + "up_proj.weight"])
        )
        assert torch.equal(joined, stacked.gate_up_proj[expert])
        assert torch.equal(tensors[prefix + "down_proj.weight"], stacked.down_proj[expert])


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
NORM, BIAS = "model.norm.weight", "model.layers.1.mlp.gate.tier_bias"
DAMAGE: dict[str, tuple[Any, str]] = {
    "missing": (lambda t: t.pop(NORM), NORM),
    "missing expert": (lambda t: t.pop(EXPERT), rf"{EXPERT}: missing"),
    "last expert": (
        lambda t: [t.pop(name) for name in list(t) if ".experts.15." in name],
        r"experts.15.gate_proj.weight: missing",
    ),
    "one too many": (
        lambda t: t.update({EXPERT.replace("3", "16"): t[EXPERT].clone()}),
        r"experts.16.up_proj.weight: unknown",
    ),
    "renamed": (lambda t: t.update({"model.norm.w": t.pop(NORM)}), NORM),
    "unknown": (lambda t: t.update({"model.extra.weight": torch.zeros(2)}), r"model.extra.weight"),
    "shape": (lambda t: t.update({NORM: torch.zeros(5)}), rf"{NORM}: shape \(5,\)"),
    "expert shape": (lambda t: t.update({EXPERT: torch.zeros(5, 32)}), rf"{EXPERT}: shape"),
    "bias shape": (lambda t: t.update({BIAS: torch.zeros(16)}), rf"{BIAS}: shape \(16,\)"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_wrong_tensor_is_named_on_load(kind: str, tmp_path: Path) -> None:
    change, message = DAMAGE[kind]
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        DvpaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 50, -100], ids=str)
def test_a_corrupt_file_is_one_clear_error(keep: int, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors: "):
        DvpaForCausalLM.from_pretrained(tmp_path)


def test_files_that_are_missing_or_foreign(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"model_type": "dvpa"', '"model_type": "llama"'))
    with pytest.raises(ValueError, match="model_type: 'llama' must be 'dvpa'"):
        DvpaForCausalLM.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        DvpaForCausalLM.from_pretrained(tmp_path)
    config.write_text(text)
    (tmp_path / "tier_map.json").write_text("{")
    with pytest.raises(ValueError, match=r"tier_map.json"):
        DvpaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "tier_map.json").unlink()
    assert not DvpaForCausalLM.from_pretrained(tmp_path).tier_map.is_fitted
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model.safetensors"):
        DvpaForCausalLM.from_pretrained(tmp_path)


def test_loading_options_of_transformers_still_work(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model, info = DvpaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert model.config._attn_implementation == "eager"
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert moe_layers(model)[0].gate.tier_bias.dtype == torch.float32
    assert not info["missing_keys"]
    config = DvpaConfig.from_pretrained(tmp_path)
    assert DvpaForCausalLM.from_pretrained(tmp_path, config=config).config is not None


@torch.no_grad()
def test_the_trunk_alone(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    trunk = DvpaModel.from_pretrained(tmp_path).eval()
    batch = left_padded([5, 3])
    assert torch.equal(trunk(*batch, tiers=1).hidden, model.model(*batch, tiers=1).hidden)
