"""Each exported tier in Transformers' own DeepSeek-V3 gives our logits at that tier.

The reference shares no code with ours and both are fp32. Its router masks dropped groups with -inf
in the two versions we test (5.17 and 5.23; see test_router.py), so biases may be negative.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import YARN, Batch, left_padded, tiny_config, tiny_model
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from dvpa.checkpoint import export_tier
from dvpa.model import DvpaForCausalLM

TOLERANCE = 1e-4  # of the logits' scale
WIDE = [
    {"name": "s", "num_groups": 3, "top_k": 2, "topk_group": 2, "routed_scaling_factor": 0.7},
    {"name": "m", "num_groups": 5, "top_k": 4, "topk_group": 2, "routed_scaling_factor": 1.9},
    {"name": "l", "num_groups": 8, "top_k": 9, "topk_group": 5, "routed_scaling_factor": 3.0},
]
# name: (config changes, spread of the biases, their mean)
CASES: dict[str, tuple[dict[str, Any], float, float]] = {
    "plain": ({}, 0.3, 0.0),
    "negative": ({}, 0.4, -0.9),
    "strongly-negative": ({"norm_topk_prob": False}, 2.0, -6.0),
    "positive": ({}, 0.5, 3.0),
    "q-lora": ({"q_lora_rank": 12, "n_shared_experts": 2}, 0.3, -0.5),
    "unnormalised": ({"norm_topk_prob": False}, 0.3, 0.0),
    "tied": ({"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, 0.3, -0.5),
    "eps": ({"rms_norm_eps": 1e-2}, 0.3, 0.0),
    "yarn": ({"rope_parameters": YARN, "q_lora_rank": 12}, 0.3, -0.5),
    "half-rope": ({"rope_interleave": False}, 0.3, 0.0),
    "bias": ({"attention_bias": True, "q_lora_rank": 12}, 0.3, 0.0),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 0.3, 0.0),
    "all-moe": ({"first_k_dense_replace": 0, "num_hidden_layers": 2}, 0.3, -0.5),
    "eight-groups": ({"n_group": 8, "n_routed_experts": 32, "tiers": WIDE}, 0.4, -0.8),
    "no-limit": ({"tiers": [{**t, "topk_group": t["num_groups"]} for t in WIDE], "n_group": 8,
                  "n_routed_experts": 16}, 0.4, -0.8),
}  # fmt: skip


def pair(
    model: DvpaForCausalLM, tier: int, folder: Path
) -> tuple[DvpaForCausalLM, DeepseekV3ForCausalLM]:
    """A model and the reference loaded from the export of one of its tiers."""
    if not (folder / "dvpa").exists():
        model.save_pretrained(folder / "dvpa")
    export_tier(folder / "dvpa", tier, folder / str(tier))
    reference, info = DeepseekV3ForCausalLM.from_pretrained(
        folder / str(tier), dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model, reference.eval()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Largest difference at most 1e-4 of the largest logit."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def decode(model: Any, batch: Batch, **kwargs: Any) -> Tensor:
    """Logits of a batch of ten positions: six at once, then one at a time from the cache."""
    logits, cache = [], None
    for begin, end in [(0, 6), (6, 7), (7, 8), (8, 9), (9, 10)]:
        out = model(
            batch.input_ids[:, begin:end],
            attention_mask=batch.attention_mask[:, :end],
            position_ids=batch.position_ids[:, begin:end],
            past_key_values=cache,
            use_cache=True,
            **kwargs,
        )
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("case", list(CASES))
@torch.no_grad()
def test_logits_with_and_without_cache(case: str, tmp_path: Path) -> None:
    changes, spread, mean = CASES[case]
    seed = list(CASES).index(case)
    model = tiny_model(tiny_config(**changes), seed=seed, bias=spread, shift=mean)
    batch = left_padded([10, 7, 3], seed=seed)
    valid = batch.attention_mask.bool()
    for tier in range(3):
        ours, reference = pair(model, tier, tmp_path)
        whole = reference(**batch._asdict(), use_cache=False).logits[valid]
        once = ours(**batch._asdict(), tiers=tier, use_cache=False).logits[valid]
        assert_close(once, whole)
        cached = decode(ours, batch, tiers=tier)[valid]
        assert_close(cached, decode(reference, batch)[valid])
        assert_close(cached, whole)


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_random_configs(seed: int, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (1,), generator=g))]

    size = pick(2, 3, 4)
    config = tiny_config(
        n_group=4,
        n_routed_experts=4 * size,
        tiers=[
            {"name": "a", "num_groups": 2, "top_k": 2, "topk_group": pick(1, 2),
             "routed_scaling_factor": pick(1.0, 2.5)},
            {"name": "b", "num_groups": 4, "top_k": pick(3, 4), "topk_group": pick(2, 3, 4),
             "routed_scaling_factor": pick(1.0, 2.5)},
        ],
        q_lora_rank=pick(None, 8),
        norm_topk_prob=pick(True, False),
        tie_word_embeddings=pick(True, False),
        n_shared_experts=pick(1, 2),
        num_attention_heads=pick(1, 3),
        v_head_dim=pick(4, 16),
        rms_norm_eps=pick(1e-6, 1e-5),
        rope_parameters=pick(None, YARN),
        difficulty=None,
    )  # fmt: skip
    model = tiny_model(config, seed, bias=pick(0.1, 1.0), shift=pick(0.0, -1.0, -8.0))
    batch = left_padded([9, 2, 6, 1], seed=seed)
    valid = batch.attention_mask.bool()
    for tier in (0, 1):
        ours, reference = pair(model, tier, tmp_path)
        theirs = reference(**batch._asdict()).logits[valid]
        assert_close(ours(**batch._asdict(), tiers=tier).logits[valid], theirs)


@pytest.mark.parametrize("tier", [0, 1, 2])
def test_greedy_generation(tier: int, tmp_path: Path) -> None:
    ours, reference = pair(tiny_model(seed=4, shift=-0.7), tier, tmp_path)
    batch: Batch = left_padded([8, 5, 2], seed=9)
    arguments = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "max_new_tokens": 12,
        "do_sample": False,
    }
    assert torch.equal(ours.generate(**arguments, tiers=tier), reference.generate(**arguments))


@torch.no_grad()
def test_losses_agree(tmp_path: Path) -> None:
    ours, reference = pair(tiny_model(seed=5), 1, tmp_path)
    ids = left_padded([9, 9]).input_ids
    assert torch.allclose(
        ours(ids, tiers=1, labels=ids).loss, reference(ids, labels=ids).loss, rtol=1e-5
    )
