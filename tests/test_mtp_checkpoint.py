"""Checkpoints with a multi-token prediction module: saved, exported, left out by the engine."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import left_padded, logits_with_mtp, mtp_model, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from dvpa.checkpoint import export_tier
from dvpa.cli import main
from dvpa.engine import Engine, SamplingParams
from dvpa.engine.loading import load_model
from dvpa.model import DvpaForCausalLM
from dvpa.model.mtp import DvpaMtpLayer

PREFIX = "model.layers.3."  # one past the last layer


@pytest.fixture(scope="module")
def model() -> DvpaForCausalLM:
    return mtp_model()


@pytest.fixture(scope="module")
def saved(model: DvpaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtp") / "checkpoint"
    model.save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Tensor | None) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_saving_and_loading_is_bit_exact_under_v3s_names(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = mtp_model(tie_word_embeddings=True).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    stored = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    own = {name.removeprefix(PREFIX) for name in stored if name.startswith(PREFIX)}
    special = {"eh_proj", "enorm", "hnorm", "shared_head.norm", "input_layernorm"}
    assert {f"{name}.weight" for name in special} <= own
    assert "mlp.experts.15.gate_proj.weight" in own
    assert not {"embed_tokens.weight", "shared_head.head.weight"} & own  # shared, not copied
    loaded = DvpaForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert isinstance(loaded.model.layers[3], DvpaMtpLayer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.model.layers[3].mlp.gate.tier_bias.dtype == torch.float32
    batch = left_padded([6, 3])
    for ours, theirs in zip(
        logits_with_mtp(model, batch, 2), logits_with_mtp(loaded, batch, 2), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eh_proj.weight", None, r"model.layers.3.eh_proj.weight"),
        ("shared_head.norm.weight", None, r"model.layers.3.shared_head.norm.weight"),
        ("mlp.experts.7.up_proj.weight", None, r"layers.3.mlp.experts.7.up_proj.weight: missing"),
        ("hnorm.weight", torch.zeros(3), r"model.layers.3.hnorm.weight: shape \(3,\)"),
        ("embed_tokens.weight", torch.zeros(64, 32), r"model.layers.3.embed_tokens.weight"),
    ],
)
def test_a_wrong_tensor_is_named(
    saved: Path, tmp_path: Path, name: str, value: Tensor | None, message: str
) -> None:
    folder = copy_of(saved, tmp_path)
    edit(folder, **{PREFIX + name: value})
    with pytest.raises(ValueError, match=message):
        DvpaForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"{PREFIX}{name}"):
        export_tier(folder, 0, tmp_path / "out")


def copy_of(folder: Path, into: Path, **config: Any) -> Path:
    """A copy of a checkpoint in one file, its config changed."""
    copy = into / "copy"
    copy.mkdir()
    data = json.loads((folder / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(data))
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return copy


def test_a_module_that_the_config_denies_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"model.layers.3"):
        DvpaForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"model.layers.3"):
        Engine(folder)


def test_a_checkpoint_from_before_the_field_has_no_module(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "old")
    data = json.loads((tmp_path / "old" / "config.json").read_text())
    data.pop("num_nextn_predict_layers", None)
    (tmp_path / "old" / "config.json").write_text(json.dumps(data))
    loaded = DvpaForCausalLM.from_pretrained(tmp_path / "old")
    assert loaded.config.num_nextn_predict_layers == 0
    assert len(loaded.model.layers) == 3


@torch.no_grad()
def test_export_drops_or_keeps_it(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = load_file(saved / "model.safetensors")
    num_own = sum(name.startswith(PREFIX) for name in source)
    dropped = export_tier(saved, 1, tmp_path / "dropped")
    kept = export_tier(saved, 1, tmp_path / "kept", keep_mtp=True)
    assert (dropped.dropped_mtp, kept.dropped_mtp) == (num_own, 0)
    left = load_file(tmp_path / "dropped" / "model.safetensors")
    more = load_file(tmp_path / "kept" / "model.safetensors")
    for report, tensors in ((dropped, left), (kept, more)):
        assert report.copied + report.sliced == len(tensors)
        assert report.num_bytes == sum(t.numel() * t.itemsize for t in tensors.values())
    assert dropped.dropped == len(source) - len(left)
    assert kept.dropped == len(source) - (len(more) - 2)  # embedding and head are there twice
    assert {name for name in more if not name.startswith(PREFIX)} == left.keys()
    assert torch.equal(more[PREFIX + "embed_tokens.weight"], source["model.embed_tokens.weight"])
    assert torch.equal(more[PREFIX + "shared_head.head.weight"], source["lm_head.weight"])
    bias = source[PREFIX + "mlp.gate.tier_bias"][1, :8]
    assert torch.equal(more[PREFIX + "mlp.gate.e_score_correction_bias"], bias)
    experts = {name.split(".")[5] for name in more if name.startswith(PREFIX + "mlp.experts.")}
    assert experts == {str(expert) for expert in range(8)}
    for folder, layers in (("dropped", 0), ("kept", 1)):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["num_nextn_predict_layers"] == layers
    models = [load_deepseek(tmp_path / folder, folder == "kept") for folder in ("dropped", "kept")]
    ids = left_padded([6]).input_ids
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    capsys.readouterr()
    assert main(["export", str(saved), "--tier", "base", str(tmp_path / "cli")]) == 0
    assert f"{num_own} tensors of multi-token prediction" in capsys.readouterr().out
    assert main(["export", str(saved), "--tier", "0", str(tmp_path / "cli2"), "--keep-mtp"]) == 0
    assert "multi-token" not in capsys.readouterr().out


def load_deepseek(folder: Path, has_module: bool) -> DeepseekV3ForCausalLM:
    """Transformers' own model; only tensors of the module may be in vain."""
    model, info = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert bool(info["unexpected_keys"]) == has_module
    assert all(name.startswith(PREFIX) for name in info["unexpected_keys"])
    return model.eval()


def test_keeping_what_is_not_there_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"keep_mtp: .*plain has no multi-token prediction"):
        export_tier(tmp_path / "plain", 0, tmp_path / "out", keep_mtp=True)
    assert export_tier(tmp_path / "plain", 0, tmp_path / "out").dropped_mtp == 0


# -- the engine -----------------------------------------------------------------------------------


def test_the_engine_leaves_it_on_the_disk(
    model: DvpaForCausalLM, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = sum(name.startswith(PREFIX) for name in load_file(saved / "model.safetensors"))
    prompts, params = [[5, 9, 11], [7] * 12], SamplingParams(max_tokens=8, temperature=0, tier=2)
    without = tiny_model()
    without.load_state_dict(model.state_dict(), strict=False)
    expected = [out.token_ids for out in Engine(without).generate(prompts, params)]
    assert [out.token_ids for out in Engine(model).generate(prompts, params)] == expected
    with caplog.at_level(logging.INFO, "dvpa.engine.loading"):
        loaded = load_model(saved, None, "auto", None, None)
    assert f"{stored} tensors skipped" in caplog.text
    assert loaded.skipped_tensors == stored
    assert type(loaded.model) is DvpaForCausalLM
    assert len(loaded.model.model.layers) == 3
    assert [out.token_ids for out in Engine(saved).generate(prompts, params)] == expected
    paged = Engine(saved, max_resident_bytes=1 << 20)
    assert [out.token_ids for out in paged.generate(prompts, params)] == expected
    paged.close()
    assert load_model(model, None, "auto", None, None).skipped_tensors == 0


def test_a_bound_on_memory_does_not_count_it(model: DvpaForCausalLM, saved: Path) -> None:
    plain = tiny_config()
    with pytest.raises(ValueError, match="max_resident_bytes: 1 must be at least") as with_module:
        load_model(saved, None, "auto", None, 1)
    folder = saved.parent / "plain"
    tiny_model(plain).save_pretrained(folder)
    with pytest.raises(ValueError, match="must be at least") as without:
        load_model(folder, None, "auto", None, 1)
    assert str(with_module.value) == str(without.value)
