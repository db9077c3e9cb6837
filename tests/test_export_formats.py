"""Tiers of switched models as checkpoints of their own families, FP8, and the list of sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_moe import DeepseekMoe
from helpers import left_padded, tiny_config, tiny_model
from source_world import FAMILIES, logits_of, make_source, read_folder, text, unseen
from test_route import STRIPED
from test_switches import GROUPED, SOFTMAX
from transformers import AutoModelForCausalLM

from dvpa.checkpoint import convert_checkpoint, export_tier, list_tiers
from dvpa.cli import main
from dvpa.model import DvpaForCausalLM
from dvpa.pricing import price


def load(folder: Path) -> Any:
    """An export in Transformers' own class: every tensor used, none missing."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def in_and_out(family: str, folder: Path) -> DvpaForCausalLM:
    """Take a random checkpoint in; returns it as ours."""
    make_source(folder / "source", family)
    convert_checkpoint(folder / "source", folder / "dvpa", text())
    return DvpaForCausalLM.from_pretrained(folder / "dvpa").eval()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_tier_is_a_model_of_its_own_family(family: str, tmp_path: Path) -> None:
    """With the tiers that `convert` chooses by itself."""
    ours = in_and_out(family, tmp_path)
    source = json.loads((tmp_path / "source" / "config.json").read_text())
    for tier in range(3):
        report = export_tier(tmp_path / "dvpa", tier, tmp_path / str(tier))
        assert report.model_type == source["model_type"]
        assert report.is_in_transformers
        exported = json.loads((tmp_path / str(tier) / "config.json").read_text())
        assert exported["architectures"] == source["architectures"]
        theirs = logits_of(load(tmp_path / str(tier)), unseen())
        difference = (logits_of(ours, unseen(), tiers=tier) - theirs).abs().max()
        assert difference <= 1e-5 * theirs.abs().max()
    assert read_folder(tmp_path / "2").keys() == read_folder(tmp_path / "source").keys()


def test_striped_pools(tmp_path: Path) -> None:
    for name, changes in {"deepseek_v3": {}, "deepseek_v2": SOFTMAX}.items():
        changes = {**changes, "norm_topk_prob": name == "deepseek_v3"}
        config = tiny_config(pool="striped", tiers=STRIPED, **changes)
        model = tiny_model(config, bias=0.3 if name == "deepseek_v3" else 0.0)
        folder = tmp_path / name
        model.save_pretrained(folder / "dvpa")
        batch = left_padded([9, 9])
        for tier in range(3):
            report = export_tier(folder / "dvpa", tier, folder / str(tier))
            assert report.model_type == name
            theirs = logits_of(load(folder / str(tier)), batch.input_ids)
            difference = (logits_of(model, batch.input_ids, tiers=tier) - theirs).abs().max()
            assert difference <= 1e-4 * theirs.abs().max()


def test_deepseek_moe(tmp_path: Path) -> None:
    """Not in Transformers: the reference reads what was exported."""
    source = DeepseekMoe()
    source.save(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "dvpa", text())
    ours = DvpaForCausalLM.from_pretrained(tmp_path / "dvpa").eval()
    for tier, routing in enumerate(ours.config.tiers):
        report = export_tier(tmp_path / "dvpa", tier, tmp_path / str(tier))
        assert (report.model_type, report.is_in_transformers) == ("deepseek", False)
        written = json.loads((tmp_path / str(tier) / "config.json").read_text())
        assert written["n_routed_experts"] == ours.config.pool_size(tier)
        reference = DeepseekMoe(**{key: written[key] for key in written if key in source.config})
        reference.tensors = read_folder(tmp_path / str(tier))
        expected = reference.logits(unseen())
        difference = (logits_of(ours, unseen(), tiers=tier) - expected).abs().max()
        assert difference <= 1e-5 * expected.abs().max()
        assert written["num_experts_per_tok"] == routing.top_k
    again = read_folder(tmp_path / "2")
    assert again.keys() == source.tensors.keys()
    convert_checkpoint(tmp_path / "2", tmp_path / "in again", text())


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_fp8(family: str, tmp_path: Path) -> None:
    """Transformers reads the blocks back to within E4M3's rounding; what V3 keeps stays bf16."""
    ours = in_and_out(family, tmp_path)
    report = export_tier(tmp_path / "dvpa", "top", tmp_path / "fp8", dtype="fp8")
    tensors = read_folder(tmp_path / "fp8")
    scales = {name for name in tensors if name.endswith("_scale_inv")}
    assert report.quantised == len(scales) > 100
    plain = read_folder(tmp_path / "dvpa")
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" in scales:
            assert tensor.dtype == torch.float8_e4m3fn
            restored = tensor.float() * tensors[f"{name}_scale_inv"]  # all smaller than one block
            largest = plain[name].abs().max() if name in plain else 1.0
            assert (restored - plain[name]).abs().max() <= largest / 16 if name in plain else True
        elif name not in scales:
            kept = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
            assert tensor.dtype == kept, name
    assert not any("gate.weight_scale" in name or "lm_head" in name for name in scales)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    kept = config["quantization_config"].get("modules_to_not_convert", [])
    assert ("model.layers.1.mlp.gate" in kept) == (family == "qwen3_moe")
    theirs = logits_of(load(tmp_path / "fp8"), unseen()).float()
    expected = logits_of(ours, unseen(), tiers="top")
    assert (theirs - expected).abs().mean() < 0.2 * expected.abs().mean()


def test_other_dtypes(tmp_path: Path) -> None:
    ours = in_and_out("olmoe", tmp_path)
    export_tier(tmp_path / "dvpa", 1, tmp_path / "half", dtype="bfloat16")
    tensors = read_folder(tmp_path / "half")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="dtype: 'int4' must be one of auto, bfloat16"):
        export_tier(tmp_path / "dvpa", 1, tmp_path / "no", dtype="int4")
    assert ours.dtype == torch.float32


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sigmoid": (GROUPED, "scoring_func: 'sigmoid' must be 'softmax' in the format of deepseek"),
    "limited": ({**GROUPED, **SOFTMAX, "tiers": None, "n_group": 4, "topk_group": 2,
                 "num_experts_per_tok": 2, "n_shared_experts": 0, "first_k_dense_replace": 0},
                r"tiers\[0\].topk_group: 2 must be 4 in the format of mixtral"),
    "scaled": ({**GROUPED, **SOFTMAX, "tiers": None, "num_experts_per_tok": 2,
                "routed_scaling_factor": 2.0, "qk_norm": "head", "n_shared_experts": 0},
               r"routed_scaling_factor: 2.0 must be 1.0 in the format of qwen3_moe"),
    "norms beside shared experts": ({**GROUPED, **SOFTMAX, "qk_norm": "head"},
                                    "qk_norm: 'head' must be None in the format of deepseek"),
    "normalised": (SOFTMAX, "norm_topk_prob: True must be False in the format of deepseek_v2"),
    "sums of two": ({**SOFTMAX, "norm_topk_prob": False, "topk_method": "noaux_tc",
                     "tiers": None, "num_experts_per_tok": 2, "topk_group": 2},
                    "topk_method: 'noaux_tc' must be 'group_limited_greedy'"),
    "bests": ({"topk_method": "group_limited_greedy", "tiers": None, "num_experts_per_tok": 2,
               "topk_group": 2}, "topk_method: 'group_limited_greedy' must be 'noaux_tc'"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_no_family_computes_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    model = tiny_model(tiny_config(difficulty=None, **changes), bias=0.0)
    model.save_pretrained(tmp_path / "dvpa")
    with pytest.raises(ValueError, match=message):
        export_tier(tmp_path / "dvpa", model.config.top_tier, tmp_path / "out")
    sizes = list_tiers(tmp_path / "dvpa")
    assert sizes[-1].model_type is None
    assert sizes[-1].num_bytes == {}
    assert {path.name for path in tmp_path.iterdir()} == {"dvpa"}


def test_a_selection_bias_that_the_family_lacks_is_refused(tmp_path: Path) -> None:
    config = tiny_config(norm_topk_prob=False, **SOFTMAX)
    tiny_model(config, bias=0.3).save_pretrained(tmp_path / "dvpa")
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate.tier_bias: not zero for tier middle"):
        export_tier(tmp_path / "dvpa", 1, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dvpa"}


def test_the_list_is_what_would_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "dvpa")
    sizes = list_tiers(tmp_path / "dvpa")
    assert [size.tier_name for size in sizes] == ["base", "middle", "top"]
    assert [size.num_experts for size in sizes] == [4, 8, 16]
    for size, tier in zip(sizes, price(model.config).tiers, strict=True):
        assert size.num_bytes["bfloat16"] == tier.weight_bytes
        assert size.num_bytes["fp8"] == tier.weight_bytes_fp8
        for dtype, expected in size.num_bytes.items():
            out = tmp_path / f"{size.tier}-{dtype}"
            assert export_tier(tmp_path / "dvpa", size.tier, out, dtype=dtype).num_bytes == expected
            written = read_folder(out).values()
            assert sum(tensor.numel() * tensor.itemsize for tensor in written) == expected
    assert main(["export", str(tmp_path / "dvpa"), "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("base", "deepseek_v3", "fp8"))
    assert main(["export", str(tmp_path / "dvpa"), "--list", "--json", "-"]) == 0
    listed = json.loads(capsys.readouterr().out)["tiers"]
    assert [tier["num_bytes"] for tier in listed] == [size.num_bytes for size in sizes]
    assert main(["export", str(tmp_path / "dvpa"), "--list", "--tier", "0"]) == 2
    assert "--list" in capsys.readouterr().err


def test_an_export_can_be_taken_in_again(tmp_path: Path) -> None:
    """A tier of ours is a source like any other, and its top tier computes what it did."""
    model = tiny_model(tiny_config(tie_word_embeddings=True), seed=2)
    model.save_pretrained(tmp_path / "dvpa")
    export_tier(tmp_path / "dvpa", "top", tmp_path / "plain")
    convert_checkpoint(tmp_path / "plain", tmp_path / "again", text())
    again = DvpaForCausalLM.from_pretrained(tmp_path / "again").eval()
    expected = logits_of(model, unseen(), tiers="top")
    assert torch.allclose(logits_of(again, unseen(), tiers="top"), expected, atol=1e-4)
