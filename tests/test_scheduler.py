"""The scheduler under random and chosen events, over the made-up model of `scheduler_world`."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_world import MAX_ESCALATIONS, World

from dvpa.engine.request import Part, Request
from dvpa.engine.sampling_params import SamplingParams
from dvpa.engine.scheduler import QueueFull


def random_event(world: World, rng: random.Random) -> None:
    """One of: add, cancel, let time pass, step."""
    capacity = world.pages.num_pages * world.pages.page_size
    kind = rng.random()
    if kind < 0.3:
        prefix = [7] * rng.randrange(12) if rng.random() < 0.7 else [rng.randrange(3)] * 5
        prompt = [*prefix, *(rng.randrange(3) for _ in range(rng.randrange(1, 6)))]
        prompt = prompt[: capacity - 1]
        living = [r for r in world.requests() if r.leader is None and not r.output_token_ids]
        leader = rng.choice(living) if living and rng.random() < 0.15 else None
        same = {} if leader is None else {"prompt": leader.prompt_token_ids}
        tier = rng.choice([None, None, 0, 1, 2])
        if leader is not None:
            tier = None if leader.scores else leader.tier
        num_outputs = rng.randrange(1, min(24, capacity - len(prompt)) + 1)
        try:
            world.add(
                **{"prompt": prompt, **same},
                num_outputs=num_outputs if leader is None else 1,
                tier=tier,
                draft=rng.choice([0, 0, 0, 1, 3]),
                leader=leader,
                session_id=rng.choice([None, "a", "b"]),
                timeout_s=rng.choice([None, None, None, 0.5, 2.0]),
                prompt_logprobs=None,
            )
        except QueueFull:
            assert world.scheduler.num_waiting >= world.scheduler.max_queue
    elif kind < 0.34 and (living := world.requests()):
        world.end(rng.choice(living), "cancelled")
    elif kind < 0.38:
        world.now += rng.random()
    else:
        world.step()


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    page_size=st.integers(1, 5),
    num_pages=st.integers(5, 24),
    max_num_seqs=st.integers(1, 6),
    spare=st.integers(0, 9),
    read_at_base=st.booleans(),
    prefix_caching=st.booleans(),
)
def test_any_schedule_gives_what_each_request_gives_alone(
    seed: int, page_size: int, num_pages: int, max_num_seqs: int, spare: int, **options: bool
) -> None:
    rng = random.Random(seed)
    world = World(
        num_pages,
        page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare,
        max_queue=6,
        **options,
    )
    for _ in range(70):
        random_event(world, rng)
    world.drain()


def test_ten_thousand_random_events_leak_no_page() -> None:
    rng, world = random.Random(5), World(16, 3, max_num_seqs=6, max_queue=6)
    for _ in range(10_000):
        random_event(world, rng)
    assert world.scheduler.num_preemptions > 100
    reasons = {r.finish_reason for r in world.states}
    assert reasons >= {"length", "cancelled", "timeout"}
    assert max(r.num_escalations for r in world.states) == MAX_ESCALATIONS
    assert sum(r.cached_tokens > 0 for r in world.states) > 100
    world.drain()
    assert sorted(world.pages.allocate(16)) == list(range(16))


# -- one thing at a time --------------------------------------------------------------------------


def test_decode_rows_come_before_prompts_and_prompts_in_chunks() -> None:
    world = World(20, 4, max_num_batched_tokens=6)
    first = world.add([1, 2, 3], num_outputs=9)
    second = world.add(list(range(10)), num_outputs=2)
    steps = [[(s.request, s.start, s.end, s.num_logits) for s in world.step()] for _ in range(3)]
    assert steps == [
        [(first, 0, 3, 1), (second, 0, 3, 0)],
        [(first, 3, 4, 1), (second, 3, 8, 0)],
        [(first, 4, 5, 1), (second, 8, 10, 1)],
    ]


def test_sessions_take_turns_and_each_is_first_come_first_served() -> None:
    world = World(max_num_seqs=1)
    sessions = ["a", "a", "a", "b", None, "b"]
    requests = [world.add([i], session_id=name) for i, name in enumerate(sessions)]
    served = [segment.request for _ in requests for segment in world.step()]
    assert [requests.index(request) for request in served] == [0, 3, 4, 1, 5, 2]


def test_the_youngest_is_preempted_and_comes_back_before_any_new_one() -> None:
    world = World(6, 2, max_num_seqs=3, max_num_batched_tokens=16)
    requests = [world.add([i], 9, allow_escalation=False) for i in range(3)]
    late = world.add([9])
    running = []
    while requests[0].finish_reason is None:
        world.step()
        running.append([request.index for request in world.scheduler.running])
    assert running == [[0, 1, 2]] * 4 + [[0, 1]] * 2 + [[0]] * 2 + [[]]
    assert [request.index for request in world.scheduler.waiting()] == [1, 2, 3]
    assert [request.num_preemptions for request in requests] == [0, 1, 1]
    world.drain()
    assert late.finish_reason == "length"


def test_the_queue_is_bounded_and_load_is_its_share() -> None:
    world = World(max_num_seqs=1, max_queue=4)
    for i in range(3):
        world.add([i])
    assert world.scheduler.load == 0.75
    world.scheduler.check_room(1)
    with pytest.raises(QueueFull, match="queue: 3 of 4 places are taken"):
        world.scheduler.check_room(2)
    world.add([3])
    with pytest.raises(QueueFull):
        world.add([4])
    world.step()
    assert world.scheduler.num_waiting == 3
    world.add([4])


def test_a_deadline_ends_running_and_waiting_requests() -> None:
    world = World(max_num_seqs=1)
    running = world.add([1], num_outputs=9, timeout_s=2.0)
    waiting, patient = world.add([2], timeout_s=3.0), world.add([3])
    world.step()
    world.now = 2.0
    assert world.scheduler.expired(1.9) == [] and patient.deadline == float("inf")
    assert world.scheduler.expired(2.0) == [running]
    assert world.scheduler.expired(3.0) == [running, waiting]
    world.step()
    assert running.finish_reason == "timeout" and running.pages == []


def test_the_completions_of_a_prompt_wait_for_the_first_to_read_it() -> None:
    world = World(20, 4)
    leader = world.add(list(range(13)), num_outputs=3, tier=None)
    followers = [world.add(leader.prompt_token_ids, 2, None, leader=leader) for _ in range(2)]
    while not leader.output_token_ids:
        assert [s.request for s in world.step()] == [leader]
    world.step()
    assert [f.cached_tokens for f in followers] == [12, 12]
    assert all(f.decision is leader.decision and f.tier == leader.tier for f in followers)
    world.drain()


@pytest.mark.parametrize("how", ["cancelled", "error"])
def test_the_completions_of_a_prompt_outlive_the_first(how: str) -> None:
    world = World(20, 4)
    leader = world.add([1, 2, 3], tier=None)
    follower = world.add([1, 2, 3], tier=None, leader=leader)
    world.end(leader, how)
    world.drain()
    assert follower.finish_reason == "length" and follower.decision is not None


def test_scoring_starts_behind_the_prefix_that_was_read_before() -> None:
    tiers = set()
    for seed in range(60):
        world, prefix = World(20, 4, max_num_batched_tokens=64), [seed] * 8
        first = world.add([*prefix, 1, 2], tier=None, allow_escalation=False)
        world.drain()
        second = world.add([*prefix, 3], tier=None, allow_escalation=False)
        [segment] = world.step()
        # Only the base tier's pages carry what the head has read up to their end.
        assert segment.start == (8 if first.tier == 0 else 0)
        world.drain()
        assert (second.cached_tokens == 8) == (first.tier in (0, second.tier))
        tiers |= {(first.tier, second.tier)}
    assert len(tiers) == 9


def test_rows_that_the_head_has_not_read_are_no_prefix_for_scoring() -> None:
    world = World(20, 4)
    world.add([1] * 9, tier=0)
    world.drain()
    world.add([1] * 9, tier=None)
    assert world.step()[0].start == 0


def test_a_known_prefix_is_only_reused_where_tiers_and_wishes_allow() -> None:
    world, prompt = World(20, 4), list(range(9))
    starts = []
    for options in ({"tier": 1}, {"tier": 1}, {"tier": 2}, {"tier": 1, "prompt_logprobs": 0}):
        world.add(prompt, **options)
        [segment] = world.step()[:1]
        starts.append(segment.start)
        world.drain()
    assert starts == [0, 8, 0, 0]
    without = World(20, 4, prefix_caching=False)
    for _ in range(2):
        without.add(prompt)
        assert without.step()[0].start == 0
        without.drain()


@pytest.mark.parametrize("read_at_base", [False, True])
@pytest.mark.parametrize("tier", [None, 2])
def test_prompt_logprobs_ask_for_every_row_of_the_prompt(
    tier: int | None, read_at_base: bool
) -> None:
    world = World(20, 4, max_num_batched_tokens=5, read_at_base=read_at_base)
    world.add(list(range(12)), 4, tier, prompt_logprobs=1, allow_escalation=False)
    asked = [s.num_logits for _ in range(9) for s in world.step() if s.part is not Part.PROBE]
    assert sum(asked[:3]) == 12 and set(asked[3:]) <= {1}


def test_the_step_must_hold_a_row_for_every_request() -> None:
    with pytest.raises(ValueError, match=r"max_num_batched_tokens: 3 must be at least .* \(4\)"):
        World(max_num_batched_tokens=3)


def test_rewind_and_lower_forget_what_they_must() -> None:
    request = Request("a", list(range(12)), SamplingParams(), 0, page_size=4, tier=2)
    request.position_tiers, request.num_computed = [2] * 10, 6
    before = request.keys(2)
    request.draft_token_ids, request.draft_tier = [1], 0
    request.lower(1)
    assert request.tiers(0, 12) == [2] * 6 + [1] * 6
    assert request.keys(1) == before[:1] and request.keys(2) != before
    assert request.draft_token_ids == [] and request.tier == 1
    request.lower(2)
    assert request.tier == 1
    request.rewind(5, 2)
    assert request.num_computed == 5 and request.tiers(0, 12) == [2] * 12
