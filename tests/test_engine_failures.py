"""What goes wrong, goes wrong for one request: the others get the same tokens, no page is lost."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_oracle import (
    NUM_NEW,
    Arrival,
    Between,
    Oracle,
    assert_greedy,
    check_all,
    crowd,
    greedy,
    make_engine,
    serve,
)
from residency_world import least_bytes, truncate, upper_shard, write_sharded

from dvpa.engine import Engine, Piece, SpeculateParams
from dvpa.model import DvpaForCausalLM

POISON = 63  # in no prompt and no answer


@pytest.fixture(scope="module")
def known() -> Oracle:
    """An oracle of this module's own, as its model gets damaged."""
    known = Oracle(seed=3)
    assert not any(POISON in prompt for prompt in known.prompts)
    for i in range(len(known.prompts)):
        assert not any(POISON in known.answer(i, tier) for tier in range(3))
    return known


@contextmanager
def not_a_number(weight: torch.Tensor) -> Iterator[None]:
    """The weight is NaN meanwhile."""
    before = weight.detach().clone()
    weight.data.fill_(float("nan"))
    try:
        yield
    finally:
        weight.data.copy_(before)


def poisoned(model: DvpaForCausalLM) -> Any:
    """Whoever reads POISON gets a state that is not finite."""
    return not_a_number(model.model.embed_tokens.weight[POISON])


# -- numbers that are none ------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["auto", 0, 2])
@pytest.mark.parametrize("place", [0, 9, 20])
def test_a_state_that_is_not_finite_fails_its_request_alone(
    known: Oracle, tier: int | str, place: int
) -> None:
    prompt = list(known.prompts[7])
    prompt[place] = POISON
    engine = make_engine(known.model, 40, page_size=4, max_num_seqs=6, max_num_batched_tokens=14)
    with poisoned(known.model):
        others, bad = crowd(known), Arrival(prompt, greedy(tier=tier), at=1)
        serve(engine, [*others, bad])
    check_all(known, others, [i % 3 for i in range(20)])
    last = bad.last()
    assert last.finish_reason == "error" and bad.tokens() == []
    assert last.error is not None and "non-finite" in last.error
    assert engine.progress.num_failed == 1
    # Later requests on the pages it had, NaN and all, are right; so is its own prompt.
    later = crowd(known)
    serve(engine, later)
    check_all(known, later, [i % 3 for i in range(20)])
    [again] = engine.generate([prompt], greedy(tier=2))
    assert again.finish_reason == "length"
    assert_greedy(known.model, prompt, again.token_ids, [2] * (len(prompt) + NUM_NEW))


def test_a_draft_that_is_not_finite_fails_its_request_alone(known: Oracle) -> None:
    engine = make_engine(known.model)
    bad = Arrival(
        known.prompts[4], greedy(tier=2, speculate=SpeculateParams(length=2), max_tokens=9)
    )
    other = Arrival(known.prompts[0], greedy(tier=1))
    tokens = known.answer(4, 2)
    with not_a_number(known.model.model.embed_tokens.weight[tokens[3]]):
        serve(engine, [other, bad])
    assert bad.last().finish_reason == "error"
    assert bad.tokens() == tokens[: tokens.index(tokens[3]) + 1]
    assert other.last().finish_reason == ("error" if tokens[3] in other.tokens() else "length")


@pytest.mark.parametrize("read_prompt", ["tier", "base"])
def test_a_score_that_is_no_number_falls_back(known: Oracle, read_prompt: str) -> None:
    engine = make_engine(known.model, page_size=4, read_prompt=read_prompt)
    assert known.model.difficulty_head is not None
    with not_a_number(known.model.difficulty_head.fc2.weight):
        outputs = engine.generate(known.prompts, greedy())
        base = engine.generate(known.prompts[0], greedy(max_tier=0))[0].telemetry
    for i, output in enumerate(outputs):
        record = output.telemetry
        assert (record.tier, record.decided_by, record.difficulty) == (2, "fallback", None)
        known.check(i, 2, output.token_ids)
    assert (base.tier, base.decided_by) == (0, "cap")
    assert engine.policy.counters["fallback"] == 21
    assert known.num_near_ties == 0


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt: must not be empty"),
        ("text", {}, "prompt: must be token ids, the checkpoint has no tokenizer"),
        ([5, 64], {}, r"prompt: token id 64 must be in 0 \.\. 63"),
        ([-1], {}, r"prompt: token id -1 must be in 0 \.\. 63"),
        ([5, 1.5], {}, r"prompt: token id 1.5 must be in 0 \.\. 63"),
        ([5] * 256, {}, "prompt: 256 tokens must be fewer than the context of 256"),
        ([5] * 90, {"max_tokens": 40}, "prompt, max_tokens: 90 and 40 tokens must fit the cache"),
        ([5], {"max_tokens": None}, "prompt, max_tokens: 1 and None tokens must fit the cache"),
        ([5], {"tier": "huge"}, "tier: 'huge' is not a tier; known tiers: base"),
        ([5], {"tier": 3}, "tier: 3 is not a tier"),
        ([5], {"max_tier": 9}, "max_tier: 9 is not a tier"),
        ([5], {"min_tier": 2, "max_tier": 1}, "min_tier: 2 must not be above max_tier 1"),
        ([5], {"stop_token_ids": [64]}, r"stop_token_ids: token id 64 must be in 0 \.\. 63"),
        ([5], {"logit_bias": {70: 1.0}}, r"logit_bias: token id 70 must be in 0 \.\. 63"),
        ([5], {"speculate": SpeculateParams(draft_tier=2)}, "speculate.draft_tier: 2 must be"),
    ],
)
def test_bad_input_names_its_field(
    known: Oracle, prompt: Any, params: dict[str, Any], message: str
) -> None:
    engine = make_engine(known.model, 32, page_size=4)
    for call in (engine.add, engine.generate):
        with pytest.raises(ValueError, match=f"^{message}"):
            call([prompt] if call == engine.generate else prompt, greedy(**params))
    assert not engine.has_work and engine.pages.num_held == 0
    assert engine.generate([5] * 88, greedy(max_tokens=40))[0].finish_reason == "length"


def test_an_id_in_use_is_refused(known: Oracle) -> None:
    engine = make_engine(known.model)
    assert engine.add([5], request_id="mine") == "mine"
    with pytest.raises(ValueError, match="request_id: 'mine' is in use"):
        engine.add([5], request_id="mine")
    engine.cancel("mine")
    engine.add([5], request_id="mine")


# -- faults of ours -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["run", "sample"])
def test_a_fault_ends_the_requests_of_its_step_and_the_engine_goes_on(
    known: Oracle, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(known.model, 60, page_size=4, max_num_seqs=4, max_num_batched_tokens=60)
    arrivals = crowd(known, n=1)
    owner, name = (engine.runner, "run") if where == "run" else (engine.progress._sampler, "sample")
    original, calls, hit = getattr(owner, name), [0], list[int]()

    def fault(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            running = {request.request_id for request in engine.scheduler.running}
            hit.extend(i for i, a in enumerate(arrivals) if a.request_id in running)
            raise RuntimeError("secret detail")
        return original(*args)

    monkeypatch.setattr(owner, name, fault)
    with caplog.at_level(logging.ERROR):
        serve(engine, arrivals)
    assert 0 < len(hit) <= 4 and "secret detail" in caplog.text
    for i, arrival in enumerate(arrivals):
        known.check(i, i % 3, arrival.tokens())
        last = arrival.last()
        if i in hit:
            assert (last.finish_reason, last.error) == ("error", "internal error: RuntimeError")
            assert last.telemetry is not None
        else:
            assert last.finish_reason == "length"
    assert engine.progress.num_failed == len(hit)
    again = crowd(known)
    serve(engine, again)
    check_all(known, again, [i % 3 for i in range(20)])


def test_a_listener_that_fails_is_given_up_alone(
    known: Oracle, caplog: pytest.LogCaptureFixture
) -> None:
    engine, heard = make_engine(known.model), list[Piece]()

    def listener(piece: Piece) -> None:
        heard.append(piece)
        raise OSError("gone")

    other = Arrival(known.prompts[0], greedy(tier=0))
    bad = engine.add(known.prompts[3], greedy(n=2), listener=listener)
    engine.add(other.prompt, other.params, listener=other.pieces.append)
    news = list[Piece]()
    while engine.has_work:
        news += engine.step()
    known.check(0, 0, other.tokens())
    assert other.last().finish_reason == "length" and engine.pages.num_held == 0
    assert len(heard) == 1 and f"listener of request {bad}" in caplog.text
    ends = [piece.finish_reason for piece in news if piece.request_id == bad]
    assert sorted(filter(None, ends)) == ["cancelled"] * 2 and len(ends) < 6


# -- experts that cannot be read ------------------------------------------------------------------


@pytest.fixture
def folder(known: Oracle, tmp_path: Path) -> Path:
    """The oracle's model on disk, about one expert in each shard."""
    return write_sharded(known.model, tmp_path / "sharded")


@pytest.mark.parametrize(("group", "left"), [(3, 1), (1, 0)])
def test_a_group_that_cannot_be_read_degrades(
    known: Oracle, folder: Path, group: int, left: int
) -> None:
    truncate(upper_shard(folder, 2, group))
    engine = Engine(folder, max_resident_bytes=least_bytes(), page_size=4)
    engine.model.generation_config.eos_token_id = None
    draft = SpeculateParams(length=2)
    params = [
        greedy(tier="auto" if i % 4 == 3 else i % 4, speculate=draft if i % 3 == 0 else None)
        for i in range(20)
    ]
    refusing = [
        greedy(tier=2, allow_degradation=False),
        greedy(min_tier=2),
        greedy(tier="auto", min_tier=left),
    ]
    arrivals = [
        Arrival(prompt, own, at=i // 5)
        for i, (prompt, own) in enumerate(
            zip([*known.prompts, *[known.prompts[7]] * 3], [*params, *refusing], strict=True)
        )
    ]
    serve(engine, arrivals)
    num_degraded = 0
    for i, arrival in enumerate(arrivals[:20]):
        wanted = known.tier_of(i) if i % 4 == 3 else i % 4
        record = arrival.last().telemetry
        assert record is not None and arrival.last().finish_reason == "length"
        if record.decided_by == "fallback":
            assert wanted > left == record.tier
            num_degraded += 1
            at_first = record.tier_tokens[wanted]
            tiers = [wanted if at_first else left] * (len(arrival.prompt) - 1)
            tiers += [wanted] * at_first + [left] * NUM_NEW
            assert_greedy(known.model, arrival.prompt, arrival.tokens(), tiers)
        else:
            assert record.tier == wanted
            known.check(i, wanted, arrival.tokens())
    assert num_degraded > 3
    for arrival in arrivals[20:22]:
        assert arrival.last().finish_reason == "error"
        assert arrival.last().error == f"tier top: layer 2, expert group {group} cannot be read"
    assert arrivals[22].last().finish_reason == "length"
    assert engine.progress.num_degraded == num_degraded + (known.tier_of(7) > left)
    engine.close()


def test_a_group_that_is_lost_while_serving(known: Oracle, folder: Path) -> None:
    path, config = upper_shard(folder, 1, 3), {"allow_degradation": False}
    for settings in ({}, config):
        engine = Engine(
            folder, max_resident_bytes=least_bytes(), page_size=1, cache_bytes=72 * 288, **settings
        )
        engine.model.generation_config.eos_token_id = None
        arrivals = [Arrival(known.prompts[i], greedy(tier=2, max_tokens=9)) for i in (2, 3, 9)]
        whole = path.read_bytes()

        def act(step: int) -> None:
            if step == 4:
                truncate(path)

        Between(engine, act)
        serve(engine, arrivals)
        path.write_bytes(whole)
        for arrival in arrivals:
            last = arrival.last()
            assert last.telemetry is not None
            if settings:
                assert last.finish_reason == "error"
                continue
            assert last.finish_reason == "length" and last.telemetry.decided_by == "fallback"
            _, at_middle, _ = last.telemetry.tier_tokens
            assert at_middle > 0
        engine.close()
