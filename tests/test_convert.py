"""`convert_checkpoint`: what was taken in computes what the source computes, at the top tier."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepseek_moe import DeepseekMoe
from safetensors.torch import load_file
from source_world import (
    FAMILIES,
    in_half_precision,
    logits_of,
    make_source,
    read_folder,
    text,
    unseen,
)
from torch import Tensor

from dvpa.checkpoint import convert_checkpoint
from dvpa.checkpoint.convert import RECORD_FILE
from dvpa.checkpoint.importance import super_experts
from dvpa.checkpoint.pools import TierWish, default_tiers, order_experts, parse_tiers
from dvpa.config import DvpaConfig
from dvpa.model import DvpaForCausalLM

TOLERANCE = 1e-5  # of the logits' scale
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def take_in(folder: Path, **options: Any) -> tuple[DvpaForCausalLM, Any]:
    """Convert `folder / "source"`; the loaded checkpoint and the report."""
    report = convert_checkpoint(folder / "source", folder / "out", text(), **options)
    return DvpaForCausalLM.from_pretrained(folder / "out").eval(), report


@torch.no_grad()
def assert_same_function(ours: DvpaForCausalLM, theirs: Tensor, report: Any) -> None:
    """The top tier gives `theirs`, the base tier something else; the report's losses hold."""
    ids = unseen()
    assert_close(logits_of(ours, ids, tiers="top"), theirs)
    base = logits_of(ours, ids, tiers=0)
    assert base.isfinite().all()
    assert (base - theirs).abs().max() > 0.01
    held_out = text().held_out
    for i, tier in enumerate(report.tiers):
        loss = ours(held_out, labels=held_out, tiers=i, use_cache=False).loss
        assert tier.nll == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_top_tier_is_the_source_and_the_base_tier_runs(family: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", family)
    ours, report = take_in(tmp_path)
    assert_same_function(ours, logits_of(source, unseen()), report)
    assert any(order != sorted(order) for order in report.expert_order.values())
    prompt = unseen()[:1, :9]
    expected = source.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(
        ours.generate(prompt, tiers="top", max_new_tokens=6, do_sample=False), expected
    )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {"rope_parameters": YARN}),
        ("deepseek_v3", {"rope_interleave": False, "q_lora_rank": None}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1, "tie_word_embeddings": True}),
        ("deepseek_v3", {"attention_bias": True, "n_shared_experts": 2}),
        ("deepseek_v2", {"rope_parameters": YARN}),
        ("deepseek_v2_lite", {"n_group": 4, "topk_group": 2}),  # greedy looks at no groups
        ("olmoe", {"norm_topk_prob": True, "attention_bias": False}),
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
        ("qwen3_moe", {"tie_word_embeddings": True, "rope_parameters": {**YARN}}),
        ("mixtral", {"head_dim": 6, "num_key_value_heads": 1}),
    ],
    ids=str,
)
def test_variants(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", family, **changes)
    ours, report = take_in(tmp_path)
    assert_same_function(ours, logits_of(source, unseen()), report)


@pytest.mark.parametrize(
    "changes", [{}, {"norm_topk_prob": True}, {"num_key_value_heads": 2}], ids=str
)
def test_deepseek_moe(changes: dict[str, Any], tmp_path: Path) -> None:
    source = DeepseekMoe(**changes)
    source.save(tmp_path / "source")
    ours, report = take_in(tmp_path)
    assert_same_function(ours, source.logits(unseen()), report)


@pytest.mark.parametrize("pool", ["prefix", "striped"])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_both_kinds_of_pools_preserve_the_function(pool: str, family: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", family)
    ours, report = take_in(tmp_path, pool=pool)
    assert_same_function(ours, logits_of(source, unseen()), report)
    assert report.pool == ours.config.pool == pool
    for order in report.expert_order.values():
        assert sorted(order) == list(range(16))
        groups = [expert // 4 for expert in order]
        if pool == "prefix":  # whole groups, one after the other
            assert groups == [group for group in groups[::4] for _ in range(4)]
        else:  # one expert of every group in turn, always in one order
            assert groups == [0, 1, 2, 3] * 4


def test_auto_takes_the_pools_that_lose_less(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    losses = {}
    for pool in ("prefix", "striped"):
        alone = convert_checkpoint(tmp_path / "source", tmp_path / pool, text(), pool=pool)
        losses |= alone.pools
    _, report = take_in(tmp_path)
    assert report.pools == losses
    assert losses["prefix"][-1] == losses["striped"][-1]
    assert losses["prefix"][:-1] != losses["striped"][:-1]
    assert report.pool == min(losses, key=lambda pool: sum(losses[pool]))
    assert [tier.nll for tier in report.tiers] == losses[report.pool]
    fits_one = parse_tiers("8:2,12:3,16:4".replace("12", "10"))
    with pytest.raises(ValueError, match=r"middle: a pool of 10 experts must be a multiple of 4"):
        convert_checkpoint(tmp_path / "source", tmp_path / "no", text(), tiers=fits_one)


@torch.no_grad()
def test_importance_is_reap(tmp_path: Path) -> None:
    """Mean over an expert's tokens of gate x norm of its output, from the source's own modules."""
    source = make_source(tmp_path / "source")
    seen: dict[int, Tensor] = {}
    for i, layer in enumerate(source.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0]}))
    logits_of(source, text().measuring)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out", text())
    for i in (1, 2):
        mlp, hidden = source.model.layers[i].mlp, seen[i].flatten(0, 1)
        _, weights, chosen = mlp.gate(hidden)
        gates = weights / weights.sum(-1, keepdim=True)  # the source's sum to 2.5
        for expert in range(16):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden[token], mlp.experts.gate_up_proj[expert]).chunk(2, -1)
            out = F.linear(F.silu(gate) * up, mlp.experts.down_proj[expert])
            score = (gates[token, slot] * out.norm(dim=-1)).sum() / max(1, len(token))
            assert report.importance[str(i)][expert] == pytest.approx(float(score), rel=1e-4)
    assert report.never_chosen == sum(
        score == 0 for scores in report.importance.values() for score in scores
    )


def test_orders_follow_importance_and_groups() -> None:
    fields = {"n_routed_experts": 8, "n_group": 2, "num_experts_per_tok": 2}
    limited = DvpaConfig(**fields, topk_group=1)
    scores = torch.tensor([1.0, 4.0, 2.0, 3.0, 9.0, 0.0, 5.0, 5.0])
    none, last = torch.zeros(8, dtype=torch.bool), torch.arange(8) == 5
    free = DvpaConfig(**fields, topk_group=2)
    assert order_experts(free, scores, none, "prefix").tolist() == [4, 6, 7, 1, 3, 2, 0, 5]
    assert order_experts(free, scores, last, "prefix").tolist() == [5, 4, 6, 7, 1, 3, 2, 0]
    assert order_experts(limited, scores, none, "prefix").tolist() == [4, 6, 7, 5, 1, 3, 2, 0]
    assert order_experts(limited, scores, none, "striped").tolist() == [1, 4, 3, 6, 2, 7, 0, 5]
    first = torch.arange(8) == 0
    assert order_experts(limited, scores, first, "prefix").tolist() == [0, 1, 3, 2, 4, 6, 7, 5]
    assert order_experts(limited, scores, first, "striped").tolist() == [0, 4, 1, 6, 3, 7, 2, 5]
    assert order_experts(limited, torch.zeros(8), none, "prefix").tolist() == list(range(8))


def test_super_experts_are_pinned_whatever_their_rank(tmp_path: Path) -> None:
    """An expert with huge outputs and hardly any gate would rank low, and ends up first."""
    source = make_source(tmp_path / "made", num_experts_per_tok=8, n_routed_experts=32)
    experts = source.model.layers[2].mlp.experts
    with torch.no_grad():
        experts.down_proj[13] *= 1000
        source.model.layers[2].mlp.gate.weight[13] -= 0.0
    source.save_pretrained(tmp_path / "source")
    _, report = take_in(tmp_path, pool="striped")
    assert report.super_experts == [(2, 13)]
    assert report.unpinned == []
    assert report.expert_order["2"].index(13) < 4  # the first of its group
    peaks = {0: torch.tensor([1.0, 2.0, 1.5]), 1: torch.tensor([1.0, 40.0, 2.0])}
    assert super_experts(peaks) == [(1, 1)]
    assert super_experts({0: torch.tensor([1.0, 2.0, 3.0])}) == []
    assert super_experts({}) == []


def test_a_base_pool_without_room_for_a_super_expert_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_source(tmp_path / "source", topk_group=1, num_experts_per_tok=3)
    found = [(1, 1), (1, 5), (1, 9), (2, 14), (2, 15)]  # of groups 0, 1, 2 and 3, 3
    monkeypatch.setattr("dvpa.checkpoint.expert_choice.super_experts", lambda peaks: found)
    _, report = take_in(tmp_path, pool="prefix", tiers=parse_tiers("4:1,16:3"))
    assert report.super_experts == found
    assert len(report.unpinned) == 2
    assert {layer for layer, _ in report.unpinned} == {1}
    order = report.expert_order["1"][4:]
    assert all(expert in order for _, expert in report.unpinned)
    striped = convert_checkpoint(tmp_path / "source", tmp_path / "no", text(), pool="striped",
                                 tiers=parse_tiers("8:1,16:3"))  # fmt: skip
    assert striped.unpinned == []


def test_order_is_kept_without_a_text(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out", None)
    assert all(order == list(range(16)) for order in report.expert_order.values())
    assert report.text is None
    assert [tier.nll for tier in report.tiers] == [None] * 3
    theirs, ours = read_folder(tmp_path / "source"), read_folder(tmp_path / "out")
    for name, tensor in theirs.items():
        if not name.endswith("e_score_correction_bias"):
            assert torch.equal(ours[name], tensor), name
    assert logits_of(source, unseen()).isfinite().all()


def test_the_record_and_side_files(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    for name in ("LICENSE", "tokenizer.json", "notes.txt"):
        (tmp_path / "source" / name).write_text("{}")
    _, report = take_in(tmp_path)
    assert json.loads((tmp_path / "out" / RECORD_FILE).read_text()) == json.loads(
        json.dumps(report.to_dict())
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("LICENSE", "tokenizer.json", "config.json", "conversion.json", "tier_map.json"),
        *("generation_config.json", "model.safetensors"),
        *("configuration_dvpa.py", "modeling_dvpa.py"),
    }


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    in_half_precision(tmp_path / "source", tmp_path / "half")
    convert_checkpoint(tmp_path / "half", tmp_path / "out", text(), dtype=dtype)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = read_folder(tmp_path / "half")
    name = "model.layers.1.self_attn.o_proj.weight"
    assert ours[name].dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    assert torch.equal(ours[name].bfloat16(), theirs[name])
    bias = "model.layers.1.mlp.gate."
    assert ours[bias + "tier_bias"].dtype == torch.float32
    assert theirs[bias + "e_score_correction_bias"].dtype == torch.float32


def test_tiers_of_one_s_own(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    wishes = parse_tiers("small=4:1,8:2:0.9,12:3,16:4")
    assert wishes[0] == TierWish("small", 4, 1)
    assert [wish.name for wish in wishes] == ["small", "middle1", "middle2", "top"]
    ours, report = take_in(tmp_path, tiers=wishes)
    assert_same_function(ours, logits_of(source, unseen()), report)
    assert [(tier.pool, tier.top_k) for tier in report.tiers] == [(4, 1), (8, 2), (12, 3), (16, 4)]
    scales = [tier.routed_scaling_factor for tier in report.tiers]
    assert scales == pytest.approx([1.25, 0.9, 2.5 * 0.75**0.5, 2.5])


def test_default_tiers_of_real_sizes(tmp_path: Path) -> None:
    """By the sizes of published checkpoints, without weights."""
    v3 = {
        "hidden_size": 7168,
        "moe_intermediate_size": 2048,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "vocab_size": 129280,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    }
    tiers = default_tiers(DvpaConfig(**v3))
    assert [(tier.pool, tier.top_k) for tier in tiers] == [(128, 2), (192, 4), (256, 8)]
