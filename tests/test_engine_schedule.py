"""Whatever runs beside a request, and however it is cut, greedy output is that of `generate()`."""

from typing import Any

import pytest
from engine_oracle import (
    NUM_NEW,
    Arrival,
    Oracle,
    greedy,
    make_engine,
    oracle,
    preempt_at_random,
    serve,
)
from helpers import YARN
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpa.engine import SpeculateParams

NUM_PROMPTS = 20
TIERS = [None, None, 0, 1, 2]

arrivals = st.builds(
    dict,
    prompt=st.integers(0, NUM_PROMPTS - 1),
    tier=st.sampled_from(TIERS),
    at=st.integers(0, 9),
    max_tokens=st.sampled_from([1, 2, 7, NUM_NEW, NUM_NEW, NUM_NEW]),
    cancel_after=st.sampled_from([None, None, None, None, None, 0, 3, 9]),
    draft=st.sampled_from([None, None, (0, 1), (0, 4), (1, 3)]),
    n=st.sampled_from([1, 1, 1, 2]),
    session_id=st.sampled_from([None, "a"]),
)


def run(known: Oracle, given: list[dict[str, Any]], num_pages: int | None, **options: Any) -> Any:
    """Serve what hypothesis made up and check every token of it."""
    share = options.pop("preempted", 0.0)
    engine = make_engine(known.model, num_pages, session_affinity=False, **options)
    preempt_at_random(engine, share)
    has_head = known.model.difficulty_head is not None
    served = []
    for item in given:
        tier, draft, after = item["tier"], item.get("draft"), item.get("cancel_after")
        params = greedy(
            tier="auto" if tier is None else tier,
            max_tokens=item.get("max_tokens", NUM_NEW),
            n=item.get("n", 1),
            session_id=item.get("session_id"),
            speculate=draft and SpeculateParams(draft_tier=draft[0], length=draft[1]),
        )
        at = item.get("at", 0)
        cancel_at = None if after is None else at + after
        prompt = known.prompts[item["prompt"]]
        served.append((item, Arrival(prompt, params, at, cancel_at)))
    serve(engine, [arrival for _, arrival in served])
    for item, arrival in served:
        auto = item["tier"] is None and has_head
        tier = known.tier_of(item["prompt"]) if auto else item["tier"]
        tier = known.model.config.top_tier if tier is None else tier
        by_base = auto and options.get("read_prompt") == "base"
        for index in range(arrival.params.n):
            tokens, last = arrival.tokens(index), arrival.last(index)
            if last.finish_reason == "length":
                assert len(tokens) == arrival.params.max_tokens
            else:
                assert last.finish_reason == "cancelled" and arrival.cancel_at is not None
            known.check(item["prompt"], tier, tokens, by_base)
            telemetry = last.telemetry
            assert telemetry is not None
            if tokens:
                assert telemetry.tier == tier
                assert telemetry.decided_by == (
                    "tier_map" if auto else "fallback" if item["tier"] is None else "override"
                )
                if auto:
                    assert abs(telemetry.difficulty - known.difficulties[item["prompt"]]) < 1e-4
    return engine


@settings(max_examples=70)
@given(
    given=st.lists(arrivals, min_size=8, max_size=20),
    page_size=st.sampled_from([1, 1, 2, 4, 7, 32]),
    spare_pages=st.sampled_from([0, 6, 10**6]),
    max_num_seqs=st.integers(2, 9),
    spare_tokens=st.sampled_from([3, 9, 60]),
    prefix_caching=st.booleans(),
    read_prompt=st.sampled_from(["tier", "base"]),
    preempted=st.sampled_from([0.0, 0.3]),
)
def test_any_mix_of_requests_gives_what_generate_gives(
    given: list[dict[str, Any]],
    page_size: int,
    spare_pages: int,
    max_num_seqs: int,
    spare_tokens: int,
    **options: Any,
) -> None:
    known = oracle()
    longest = max(map(len, known.prompts)) + NUM_NEW
    run(
        known,
        given,
        min(-(-longest // page_size) + spare_pages, 4096 // page_size),
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare_tokens,
        **options,
    )
    assert known.num_near_ties == 0


ARCHITECTURES = {
    "probe after the trunk": {"difficulty": {"probe_layer": 1, "hidden_size": 16}},
    "probe after all layers": {"difficulty": {"probe_layer": 3, "hidden_size": 16}},
    "no head": {"difficulty": None},
    "query latent": {"q_lora_rank": 12},
    "query latent, biases": {"q_lora_rank": 12, "attention_bias": True},
    "biases": {"attention_bias": True},
    "halves rotated": {"rope_interleave": False},
    "yarn": {"rope_parameters": YARN},
    "tied": {"tie_word_embeddings": True},
    "two dense layers": {"num_hidden_layers": 4, "first_k_dense_replace": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "no shared experts": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "weights as they are": {"norm_topk_prob": False},
    "norm": {"rms_norm_eps": 1e-2},
}


READ_BY_BASE = ["probe after the trunk", "probe after all layers", "no head", "yarn"]


@pytest.mark.parametrize(
    ("name", "read_prompt"),
    [*((name, "tier") for name in ARCHITECTURES), *((name, "base") for name in READ_BY_BASE)],
)
def test_every_architecture(name: str, read_prompt: str) -> None:
    known = Oracle(**ARCHITECTURES[name])
    given = [
        {"prompt": i % NUM_PROMPTS, "tier": TIERS[i % 5], "at": i // 3} for i in range(0, 33, 2)
    ]
    run(known, given, 60, page_size=4, max_num_batched_tokens=34, read_prompt=read_prompt)
    assert known.num_near_ties == 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_requests_lose_nothing(prefix_caching: bool) -> None:
    known = oracle()
    drafts = [None, (0, 3)]
    given = [
        {"prompt": i, "tier": TIERS[i % 5], "draft": drafts[i % 2]} for i in range(NUM_PROMPTS)
    ]
    engine = run(known, given, 56, page_size=1, prefix_caching=prefix_caching)
    assert engine.scheduler.num_preemptions > 5
    assert known.num_near_ties == 0


def test_a_known_prefix_is_read_once() -> None:
    known = oracle()
    engine = make_engine(known.model, page_size=4)
    for tier in (0, 1):
        costs = []
        for _ in range(3):
            [output] = engine.generate([known.prompts[7]], greedy(tier=tier, max_tokens=1))
            costs.append(output.telemetry.flops)
        assert costs[1] == costs[2] == costs[0] / 10, "four positions of forty are left"
