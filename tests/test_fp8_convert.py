"""DeepSeek-V3's FP8 through convert, export and assemble: codes and scales stay as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from assembly_world import write_recipe
from fp8_world import (
    EXPERT,
    KV,
    MISFITS,
    QUANTIZATION,
    SCALE,
    assert_is_permuted,
    by_hand,
    dequantised,
    edit_config,
    is_quantised,
    make_fp8_source,
    rewrite,
    same,
    store,
)
from helpers import mtp_model
from source_world import make_source, read_folder, text, unseen
from torch import Tensor

from dvpa.checkpoint import convert_checkpoint, export_tier, list_tiers
from dvpa.checkpoint.assemble import assemble
from dvpa.checkpoint.fp8 import dequantise, quantise
from dvpa.checkpoint.number_format import FormatCounts
from dvpa.cli import main
from dvpa.model import DvpaForCausalLM


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fp8_source(tmp_path_factory.mktemp("fp8") / "source")


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    """The same as a checkpoint of ours; never written to."""
    convert_checkpoint(source, source.parent / "out", text(), pool="prefix", shard_bytes=200_000)
    return source.parent / "out"


def config_of(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return data


def num_weights(tensors: dict[str, Tensor]) -> int:
    return sum(name.endswith(SCALE) for name in tensors)


def test_codes_and_scales_are_kept(source: Path, converted: Path) -> None:
    theirs, ours = read_folder(source), read_folder(converted)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert theirs[KV].shape == (576, 160)
    assert theirs[KV + SCALE].shape == (5, 2)
    assert index[KV] != index[KV + SCALE]
    record = json.loads((converted / "conversion.json").read_text())
    assert any(order != sorted(order) for order in record["expert_order"].values())
    assert_is_permuted(ours, theirs, record["expert_order"])
    count = num_weights(theirs)
    assert record["formats"] == {"kept_fp8": count, "quantised": 0, "dequantised": 0}
    assert record["num_tensors"] == len(ours)
    assert config_of(converted)["quantization_config"] == QUANTIZATION
    assert config_of(converted)["dtype"] == "bfloat16"


@pytest.mark.parametrize("pool", ["prefix", "striped"])
def test_there_and_back_is_bit_for_bit(pool: str, source: Path, tmp_path: Path) -> None:
    made = convert_checkpoint(source, tmp_path / "out", text(), pool=pool)
    report = export_tier(tmp_path / "out", "top", tmp_path / "again")
    theirs, again = read_folder(source), read_folder(tmp_path / "again")
    order = made.expert_order["1"]
    if pool == "striped":  # experts go back to their own groups
        order = [order[place * 2 + group] for group in range(2) for place in range(4)]
    assert again.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if ".experts." in name:
            expert = int(name.split(".")[5])
            name = name.replace(f".experts.{expert}.", f".experts.{order.index(expert)}.")
        elif ".layers.1.mlp.gate." in name:
            tensor = tensor[order]
        assert same(again[name], tensor), name
    assert config_of(tmp_path / "again")["quantization_config"] == QUANTIZATION
    assert (report.kept_fp8, report.quantised, report.dequantised) == (num_weights(theirs), 0, 0)
    assert report.dropped == 0
    convert_checkpoint(tmp_path / "again", tmp_path / "in again", None)
    assert_is_permuted(read_folder(tmp_path / "in again"), again, {"1": list(range(8))})


def test_a_lower_tier_and_other_formats(converted: Path, tmp_path: Path) -> None:
    ours = read_folder(converted)
    plain = dequantised(ours)
    for dtype in ("auto", "fp8", "bfloat16", "float32"):
        report = export_tier(converted, 0, tmp_path / dtype, dtype=dtype)
        cut = read_folder(tmp_path / dtype)
        assert sum(t.numel() * t.itemsize for t in cut.values()) == report.num_bytes
        assert list_tiers(converted)[0].num_bytes[dtype] == report.num_bytes
        assert report.dropped == len(plain) - report.copied - report.sliced
        keeps = dtype in ("auto", "fp8")
        assert ("quantization_config" in config_of(tmp_path / dtype)) == keeps
        assert (report.kept_fp8 > 0, report.dequantised > 0) == (keeps, not keeps)
        for name, tensor in cut.items():
            if keeps and (is_quantised(name) or name.endswith(SCALE)):
                assert same(tensor, ours[name]), name
            elif dtype == "bfloat16" and name in plain and is_quantised(name):
                assert same(tensor, plain[name]), name
            elif dtype == "float32" and is_quantised(name):
                assert same(tensor, dequantise(ours[name], ours[name + SCALE])), name
        assert not any("gate.weight_scale" in name or "lm_head.weight_" in name for name in cut)


def test_bf16_as_before(source: Path, tmp_path: Path) -> None:
    """Scales are multiplied, over blocks of 128 with a smaller last one, from whatever shard."""
    report = convert_checkpoint(source, tmp_path / "out", None, dtype="bfloat16")
    theirs, ours = read_folder(source), read_folder(tmp_path / "out")
    for name, tensor in dequantised(theirs).items():
        if is_quantised(name):
            assert same(ours[name], tensor), name
    assert report.formats == FormatCounts(0, 0, num_weights(theirs))
    assert not num_weights(ours)
    assert "quantization_config" not in config_of(tmp_path / "out")


def test_fp8_of_a_bf16_source(source: Path, tmp_path: Path) -> None:
    plain = dequantised(read_folder(source))
    store(tmp_path / "plain", plain, {**config_of(source), "quantization_config": None})
    report = convert_checkpoint(tmp_path / "plain", tmp_path / "out", None, dtype="fp8")
    ours = read_folder(tmp_path / "out")
    for name, tensor in ours.items():
        if is_quantised(name):
            codes, scale_inv = quantise(plain[name])
            assert same(tensor, codes), name
            assert same(ours[name + SCALE], scale_inv), name
        elif not name.endswith((SCALE, "tier_bias")):
            assert tensor.dtype == torch.bfloat16, name
    assert report.formats == FormatCounts(0, num_weights(ours), 0)
    assert config_of(tmp_path / "out")["quantization_config"] == QUANTIZATION


def test_the_module_for_multi_token_prediction_is_kept(tmp_path: Path) -> None:
    changes = {"tiers": None, "num_experts_per_tok": 5, "topk_group": 2, "difficulty": None}
    model = mtp_model(**changes, routed_scaling_factor=2.2, kv_lora_rank=160)
    model.save_pretrained(tmp_path / "made")
    export_tier(tmp_path / "made", 0, tmp_path / "source", keep_mtp=True, dtype="fp8")
    theirs = read_folder(tmp_path / "source")
    assert f"model.layers.3.mlp.experts.5.up_proj.weight{SCALE}" in theirs
    assert theirs["model.layers.3.eh_proj.weight"].dtype == torch.bfloat16
    convert_checkpoint(tmp_path / "source", tmp_path / "out", None)
    export_tier(tmp_path / "out", "top", tmp_path / "again", keep_mtp=True)
    again = read_folder(tmp_path / "again")
    assert again.keys() == theirs.keys()
    assert all(same(again[name], tensor) for name, tensor in theirs.items())
    convert_checkpoint(tmp_path / "source", tmp_path / "plain", None, dtype="bfloat16")
    inputs = {"input_ids": unseen(), "tiers": "top", "use_cache": False, "with_mtp": True}
    with torch.no_grad():
        out, expected = (
            DvpaForCausalLM.from_pretrained(tmp_path / name)(**inputs) for name in ("out", "plain")
        )
    assert same(out.mtp_logits, expected.mtp_logits)
    assert same(out.logits, expected.logits)


def test_assembling_two_of_ours(converted: Path, tmp_path: Path) -> None:
    other = make_fp8_source(tmp_path / "source", seed=1)
    convert_checkpoint(other, tmp_path / "b", None, shard_bytes=200_000)
    rules = [
        {"match": "routed_experts", "lambda": {"a": 0.0, "b": 1.0}},
        {"match": "all", "lambda": {"a": 0.5, "b": 0.5}},
    ]
    recipe = write_recipe(tmp_path / "r.yaml", {"a": converted, "b": tmp_path / "b"}, rules)
    assemble(recipe, tmp_path / "child")
    parents = [read_folder(folder) for folder in (converted, tmp_path / "b")]
    child = read_folder(tmp_path / "child")
    assert child.keys() == parents[0].keys()
    for name, tensor in child.items():
        if ".experts." in name:
            assert same(tensor, parents[1][name]), name
    middle = sum(dequantise(each[KV], each[KV + SCALE]) for each in parents) / 2
    error = (dequantise(child[KV], child[KV + SCALE]) - middle).norm() / middle.norm()
    assert error < 0.03
    assert config_of(tmp_path / "child") == config_of(converted)
    model = DvpaForCausalLM.from_pretrained(tmp_path / "child")
    gate, _ = model.model.layers[1].mlp.experts.gate_up_proj[6].chunk(2)
    name = EXPERT.replace("up_proj", "gate_proj")
    assert same(gate.detach(), by_hand(parents[1][name], parents[1][name + SCALE]))


def test_fp8_where_v3_has_none(source: Path, tmp_path: Path) -> None:
    """A head stays FP8; a router becomes bf16: its rows change places, which blocks cannot."""
    gate, head = "model.layers.1.mlp.gate.weight", "lm_head.weight"
    tensors = read_folder(source)
    for name in (gate, head):
        tensors[name], tensors[name + SCALE] = quantise(tensors[name])
    store(tmp_path / "source", tensors, config_of(source))
    convert_checkpoint(tmp_path / "source", tmp_path / "out", None)
    ours = read_folder(tmp_path / "out")
    assert same(ours[gate], by_hand(tensors[gate], tensors[gate + SCALE]))
    assert gate + SCALE not in ours
    for dtype in ("auto", "fp8"):
        export_tier(tmp_path / "out", 0, tmp_path / dtype, dtype=dtype)
        cut = read_folder(tmp_path / dtype)
        assert all(same(cut[name], tensors[name]) for name in (head, head + SCALE))
    model = DvpaForCausalLM.from_pretrained(tmp_path / "out")
    expected = by_hand(tensors[head], tensors[head + SCALE])
    assert same(model.lm_head.weight.detach(), expected)


DAMAGE: dict[str, tuple[Any, str]] = {
    **MISFITS,
    "dtype": (
        lambda t: t.update({KV + SCALE: torch.ones(5, 2).bfloat16()}),
        rf"{KV}{SCALE}: BF16 \(5, 2\), expected F32 \(5, 2\)",
    ),
    "scales of nothing": (
        lambda t: t.update({f"lm_head.weight{SCALE}": torch.ones(1, 2)}),
        f"lm_head.weight{SCALE}: unknown tensor",
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_what_does_not_fit_is_named(kind: str, converted: Path, tmp_path: Path) -> None:
    change, message = DAMAGE[kind]
    (tmp_path / "dvpa").mkdir()
    for path in converted.iterdir():
        (tmp_path / "dvpa" / path.name).write_bytes(path.read_bytes())
    rewrite(tmp_path / "dvpa", change)
    for run in (lambda: export_tier(tmp_path / "dvpa", 0, tmp_path / "out"), lambda: list_tiers(
        tmp_path / "dvpa"
    )):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run()
    assert not (tmp_path / "out").exists()


def test_undeclared_fp8_is_refused(converted: Path, tmp_path: Path) -> None:
    for path in converted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(ValueError, match=r"FP8, but config\.json says nothing of it"):
        list_tiers(tmp_path)
    edit_config(tmp_path, quantization_config={**QUANTIZATION, "weight_block_size": [64, 64]})
    with pytest.raises(ValueError, match=r"weight_block_size: \[64, 64\] must be \[128, 128\]"):
        list_tiers(tmp_path)


def test_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    count = num_weights(read_folder(source))
    assert main(["convert", str(source), out, "--keep-order"]) == 0
    assert f"FP8 kept as it is: {count} weights" in capsys.readouterr().out
    assert main(["export", out, "--tier", "top", str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    assert f"dequantised from FP8: {count} weights" in capsys.readouterr().out
    make_source(tmp_path / "plain")
    argv = ["convert", str(tmp_path / "plain"), str(tmp_path / "c"), "--keep-order"]
    assert main([*argv, "--dtype", "fp8", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["formats"]["quantised"] > 100
