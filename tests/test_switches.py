"""The model's switches: other attention and other gates; model, `generate` and engine agree."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import left_padded, tiny_config, tiny_model
from test_route import STRIPED

from dvpa.engine import Engine, SamplingParams
from dvpa.pricing import price

GROUPED = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "kv_lora_rank": None,
    "qk_rope_head_dim": 16,  # the default: not given
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "rope_interleave": False,
}
SOFTMAX = {"scoring_func": "softmax", "topk_method": "group_limited_greedy"}
CASES: dict[str, dict[str, Any]] = {
    "softmax": SOFTMAX,
    "unnormalised softmax": {**SOFTMAX, "norm_topk_prob": False, "n_shared_experts": 0},
    "striped": {"pool": "striped", "tiers": STRIPED},
    "grouped": GROUPED,
    "norms of heads": {**GROUPED, **SOFTMAX, "qk_norm": "head", "attention_bias": True},
    "norms of projections": {
        **GROUPED,
        **SOFTMAX,
        "qk_norm": "projection",
        "pool": "striped",
        "tiers": STRIPED,
    },
}
PROMPTS = [5, 30, 2]  # the second is long enough to be expanded, not absorbed


@pytest.mark.parametrize("case", list(CASES))
def test_model_generate_and_engine_agree(case: str) -> None:
    """Greedy: token by token over whole sequences, `generate`, the engine's mixed batch."""
    model = tiny_model(tiny_config(**CASES[case]), seed=list(CASES).index(case))
    batch = left_padded(PROMPTS, seed=3)
    prompts = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    tiers, count = [2, 0, 1], 12
    wanted = []
    with torch.no_grad():
        for prompt, tier in zip(prompts, tiers, strict=True):
            ids = torch.tensor([prompt])
            for _ in range(count):
                logits = model(ids, tiers=tier, use_cache=False).logits[:, -1]
                ids = torch.cat((ids, logits.argmax(-1)[None]), 1)
            wanted.append(ids[0, len(prompt) :].tolist())
        generated = model.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            tiers=torch.tensor(tiers),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )[:, batch.input_ids.shape[1] :]
    assert generated.tolist() == wanted
    engine = Engine(model, max_num_batched_tokens=48, max_num_seqs=4, page_size=4)
    params = [
        SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, tier=tier)
        for tier in tiers
    ]
    assert [list(out.token_ids) for out in engine.generate(prompts, params)] == wanted


@pytest.mark.parametrize("case", list(CASES))
def test_prices_are_those_of_the_model(case: str) -> None:
    model = tiny_model(tiny_config(**CASES[case]))
    priced = price(model.config)
    assert priced.total_params == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        cache = model(torch.zeros(1, 3, dtype=torch.long), tiers=0).past_key_values
    rows = sum(part.numel() for layer in cache.layers for part in (layer.keys, layer.values))
    assert priced.tiers[0].kv_bytes_per_token == 2 * rows // 3


@pytest.mark.parametrize("case", ["striped", "norms of projections", "softmax"])
def test_experts_from_disk(case: str, tmp_path: Path) -> None:
    """With room for the base pools and one layer's other experts; of stripes as of groups."""
    model = tiny_model(tiny_config(**CASES[case]), seed=5)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be at least") as refused:
        Engine(tmp_path, max_resident_bytes=1)
    least = int(re.findall(r"at least (\d+)", str(refused.value))[0])
    prompts = [[5, 6, 7], [9] * 20, [3]]
    params = [
        SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, tier=tier)
        for tier in (2, 0, 1)
    ]
    wanted = [out.token_ids for out in Engine(model).generate(prompts, params)]
    paged = Engine(tmp_path, max_resident_bytes=least)
    assert [out.token_ids for out in paged.generate(prompts, params)] == wanted
    assert paged.store is not None
    assert paged.store.stats.bytes_read > 0
    paged.close()
