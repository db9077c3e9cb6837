"""`export_tier`: a plain DeepSeek-V3 folder, or one clear error and nothing on the disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import moe_layers, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, DeepseekV3Config

from dvpa.checkpoint import ShardWriter, export_tier
from dvpa.checkpoint.shards import INDEX_FILE
from dvpa.model import DvpaForCausalLM

ROUTED = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def model() -> DvpaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def saved(model: DvpaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def edit(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the weights after `change` had its way with them."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("tier", "name"), [(0, "base"), (1, "middle"), (2, "top")])
def test_every_tensor_is_the_right_slice(
    tier: int, name: str, model: DvpaForCausalLM, saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = export_tier(saved, name, out)
    source, result = load_file(saved / "model.safetensors"), load_file(out / "model.safetensors")
    pool = model.config.pool_size(tier)
    for key, tensor in result.items():
        if key.endswith("e_score_correction_bias"):
            row = source[key.replace("e_score_correction_bias", "tier_bias")][tier, :pool]
            assert torch.equal(tensor, row)
            assert tensor.dtype == torch.float32
            assert row.any()
        elif key.endswith("mlp.gate.weight"):
            assert torch.equal(tensor, source[key][:pool])
        else:
            assert torch.equal(tensor, source[key]), key
    experts = {key.split(".")[5] for key in result if key.startswith(ROUTED)}
    assert experts == {str(expert) for expert in range(pool)}
    assert not any("difficulty" in key or "tier_bias" in key for key in result)
    layers = len(moe_layers(model))
    assert (report.tier, report.tier_name) == (tier, name)
    assert report.copied + report.sliced == len(result)
    assert report.dropped == len(source) - len(result) == 3 * (16 - pool) * layers + 7
    assert report.sliced == layers * (1 if tier == 2 else 2)  # the top tier's router is whole
    assert report.num_bytes == sum(t.numel() * t.itemsize for t in result.values())


def test_the_config_is_deepseek_and_holds_nothing_of_ours(saved: Path, tmp_path: Path) -> None:
    export_tier(saved, 1, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.7,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
        "norm_topk_prob": True,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "dtype": "float32",
    }
    assert {key: data.get(key) for key in expected} == expected
    assert not {"tiers", "difficulty", "auto_map"} & data.keys()
    assert "dvpa" not in (tmp_path / "out" / "config.json").read_text().lower()
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "out"), DeepseekV3Config)


def test_side_files_are_copied_and_ours_are_not(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "tokenizer_config.json").write_text("{ }")
    (checkpoint / "training_state").mkdir()
    (checkpoint / "notes.txt").write_text("private")
    export_tier(checkpoint, 0, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{ }"


def test_sharded_in_and_out(model: DvpaForCausalLM, saved: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert (tmp_path / "sharded" / INDEX_FILE).exists()
    export_tier(tmp_path / "sharded", 1, tmp_path / "out", shard_bytes=20_000)
    export_tier(saved, 1, tmp_path / "whole")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size <= 20_000 + 8_000 for path in shards)  # data and header
    joined = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)


def test_bf16_stays_bf16_with_an_fp32_bias(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(tie_word_embeddings=True)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint")
    export_tier(tmp_path / "checkpoint", 2, tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(result["lm_head.weight"], result["model.embed_tokens.weight"])
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    for name, tensor in result.items():
        wanted = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
        assert tensor.dtype == wanted, name


def test_one_tensor_in_memory_at_a_time(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads and writes alternate: what is read is written before the next is read."""
    events: list[str] = []
    from dvpa.checkpoint import shards

    read, write = shards.ShardReader.read, ShardWriter.write

    def reading(self: shards.ShardReader, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        events.append("read")
        return read(self, name, index)

    def writing(self: ShardWriter, name: str, tensor: Tensor) -> None:
        events.append("write")
        write(self, name, tensor)

    monkeypatch.setattr(shards.ShardReader, "read", reading)
    monkeypatch.setattr(ShardWriter, "write", writing)
    report = export_tier(saved, 0, tmp_path / "out")
    assert events == ["read", "write"] * (report.copied + report.sliced)


BIAS, GATE = "model.layers.1.mlp.gate.tier_bias", "model.layers.2.mlp.gate.weight"
EXPERT = f"{ROUTED}3.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing expert": (lambda t: t.pop(EXPERT), f"{EXPERT}: missing"),
    "missing of another tier": (
        lambda t: t.pop(f"{ROUTED}15.down_proj.weight"),
        "experts.15.down_proj.weight: missing",
    ),
    "missing bias": (lambda t: t.pop(BIAS), f"{BIAS}: missing"),
    "missing norm": (lambda t: t.pop("model.norm.weight"), "model.norm.weight: missing"),
    "renamed": (
        lambda t: t.update({"model.norm.wheight": t.pop("model.norm.weight")}),
        "model.norm.weight: missing",
    ),
    "unknown": (
        lambda t: t.update({"model.extra": torch.zeros(2)}),
        "model.extra: unknown tensor",
    ),
    "one expert too many": (
        lambda t: t.update({f"{ROUTED}16.up_proj.weight": torch.zeros(16, 32)}),
        "experts.16.up_proj.weight: unknown tensor",
    ),
    "router rows": (lambda t: t.update({GATE: t[GATE][:8].clone()}), f"{GATE}: shape \\(8, 32\\)"),
    "bias rows": (lambda t: t.update({BIAS: t[BIAS][0].clone()}), f"{BIAS}: shape \\(16,\\)"),
    "transposed": (lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}), f"{EXPERT}: shape"),
    "integers": (lambda t: t.update({EXPERT: t[EXPERT].int()}), f"{EXPERT}: dtype I32"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_wrong_tensor_is_named_and_nothing_is_left(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    change, message = DAMAGE[kind]
    edit(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        export_tier(checkpoint, 0, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_a_truncated_shard_is_named_and_nothing_is_left(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: .* bytes of data"):
        export_tier(checkpoint, 0, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_a_failure_midway_leaves_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = ShardWriter.write, iter(range(100))

    def failing(self: ShardWriter, name: str, tensor: Tensor) -> None:
        if next(count) == 20:
            raise OSError("no space left on device")
        write(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", failing)
        with pytest.raises(OSError, match="no space left"):
            export_tier(saved, 0, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export_tier(saved, 0, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_killed_run_is_replaced_by_the_next(saved: Path, tmp_path: Path) -> None:
    stale = tmp_path / "out.incomplete"
    stale.mkdir()
    (stale / ".dvpa-incomplete").touch()
    (stale / "model.safetensors").write_bytes(b"half")
    export_tier(saved, 0, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_full_folder_is_never_touched(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="out: exists and is not empty"):
        export_tier(saved, 0, out)
    assert (out / "config.json").read_text() == "mine"


@pytest.mark.parametrize("tier", ["huge", 3, -1, "auto"])
def test_an_unknown_tier_names_the_known_ones(tier: int | str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0=base, 1=middle, 2=top"):
        export_tier(saved, tier, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: not valid JSON"),
        ("[]", "model_type: None must be 'dvpa'"),
        ('{"model_type": "llama"}', "model_type: 'llama' must be 'dvpa'"),
        ('{"model_type": "dvpa", "hidden_size": -2}', "config.json: hidden_size: -2"),
    ],
)
def test_a_bad_config_is_refused(text: str, message: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        export_tier(checkpoint, 0, tmp_path / "out")


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json: no such checkpoint"):
        export_tier(tmp_path / "nowhere", 0, tmp_path / "out")
