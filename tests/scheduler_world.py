"""A made-up model in plain Python, run by the scheduler: every state hashes all it has read.

One wrong row, page, tier or order anywhere changes every later state of a request, and each request
is held against a computation of its own that knows nothing of pages, steps or other requests.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from dvpa.engine.pages import PageAllocator
from dvpa.engine.request import Part, Request, Segment, Stage
from dvpa.engine.sampling_params import SamplingParams, SpeculateParams
from dvpa.engine.scheduler import Scheduler
from dvpa.tiers.policy import Decision

NUM_TIERS, VOCAB, MAX_ESCALATIONS = 3, 50, 2
TRUNK, LOW, HIGH, READ = range(4)  # kinds of state: dense layers, probe layers, the rest, the head
STALE = -1


def mix(*values: Any) -> int:
    """A hash that is the same in every process (of whole numbers and tuples of them)."""
    return hash(values) & (2**61 - 1)


def token_after(trunk: int, high: int) -> int:
    """The greedy token; the tiers agree on most, as trained ones do."""
    return (trunk if trunk % 4 else high) % VOCAB


def is_unsure(request: Request, high: int) -> bool:
    may = request.params.allow_escalation and request.num_draft == 0
    return may and high % 5 == 0 and request.num_escalations < MAX_ESCALATIONS


def expected_states(request: Request, read_at_base: bool, length: int) -> list[int]:
    """The last state behind each output token, position by position, without a cache."""
    prompt, tier = request.prompt_token_ids, request.tier
    if request.scores:
        lows = rows_of(prompt, [0] * len(prompt))[1]
        reading = 0
        for low in lows:
            reading = mix(READ, reading, low)
        tier = reading % NUM_TIERS
    tokens = list(prompt)
    read_by = 0 if request.scores and read_at_base else tier
    tiers = [read_by] * (len(prompt) - 1) + [tier]
    states, num_escalations = list[int](), 0
    probe = Request("", prompt, request.params, 0, num_draft=request.num_draft)
    while len(states) < length:
        trunks, _, highs = rows_of(tokens, tiers)
        probe.num_escalations = num_escalations
        if is_unsure(probe, highs[-1]) and tier < NUM_TIERS - 1:
            num_escalations += 1
            tiers[-1] = tier = tier + 1
            continue
        states.append(highs[-1])
        tokens.append(token_after(trunks[-1], highs[-1]))
        tiers.append(tier)
    return states


def rows_of(tokens: list[int], tiers: list[int]) -> tuple[list[int], list[int], list[int]]:
    trunks, lows, highs = list[int](), list[int](), list[int]()
    for token, tier in zip(tokens, tiers, strict=True):
        trunks.append(mix(TRUNK, tuple(trunks), token))
        lows.append(mix(LOW, tuple(lows), trunks[-1], tier))
        highs.append(mix(HIGH, tuple(highs), lows[-1], tier))
    return trunks, lows, highs


@dataclass
class Kept:
    """What a probe leaves, as in the runner."""

    trunk: dict[int, int] = field(default_factory=dict)
    low: dict[int, int] = field(default_factory=dict)
    reading: int | None = None


class World:
    """Scheduler, pages, the made-up model, and what `Progress` does with its results."""

    def __init__(self, num_pages: int = 8, page_size: int = 4, **options: Any) -> None:
        self.pages = PageAllocator(num_pages, page_size)
        self.pages.on_allocate = self._allocate
        self.readings: dict[int, int] = {}
        self.scheduler = Scheduler(
            self.pages,
            **{"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_queue": 20, **options},
            has_probe=lambda page: page in self.readings,
        )
        self.cache = [dict.fromkeys(range(page_size), [STALE] * 3) for _ in range(num_pages)]
        self.kept: defaultdict[Request, Kept] = defaultdict(Kept)
        self.states: dict[Request, list[int]] = {}
        self.proposed: defaultdict[Request, int] = defaultdict(int)
        self.now = 0.0
        self.num_added = 0
        self.first_admitted: defaultdict[str | None, list[int]] = defaultdict(list)

    def _allocate(self, page: int) -> None:
        self.readings.pop(page, None)
        self.cache[page] = dict.fromkeys(range(self.pages.page_size), [STALE] * 3)

    # -- requests ---------------------------------------------------------------------------------

    def add(
        self,
        prompt: list[int],
        num_outputs: int = 1,
        tier: int | None = 0,
        draft: int = 0,
        leader: Request | None = None,
        **params: Any,
    ) -> Request:
        """Queue a request (tier None: to be scored); QueueFull if there is no room."""
        self.scheduler.check_room(1)
        request = Request(
            f"request-{self.num_added}",
            list(prompt),
            SamplingParams(**params, speculate=SpeculateParams(length=draft) if draft else None),
            seed=0,
            page_size=self.pages.page_size,
            max_total_tokens=len(prompt) + num_outputs,
            arrival=self.now,
            index=self.num_added,
            scores=tier is None,
            tier=tier or 0,
            leader=leader,
            num_draft=draft,
        )
        self.num_added += 1
        self.states[request] = []
        self.scheduler.add(request)
        return request

    def end(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self.scheduler.finish(request)
        self.kept.pop(request, None)
        self.scheduler.release_followers(request)

    def requests(self) -> list[Request]:
        return [*self.scheduler.running, *self.scheduler.waiting()]

    # -- one step ---------------------------------------------------------------------------------

    def step(self) -> list[Segment]:
        for request in self.scheduler.expired(self.now):
            assert self.now >= request.deadline
            self.end(request, "timeout")
        assert all(self.now < request.deadline for request in self.requests())
        before = list(self.scheduler.running)
        was_decoding = [r for r in before if r.stage is Stage.DECODING]
        had_work = bool(self.requests())
        segments, preempted = self.scheduler.schedule()
        self.check_schedule(segments, preempted, before, was_decoding, had_work)
        for request in preempted:
            self.kept.pop(request, None)
            self.proposed[request] = 0
        results = [self.run(segment) for segment in segments]
        for segment, result in zip(segments, results, strict=True):
            self.apply(segment, *result)
            request = segment.request
            if request.kept_to and request.num_computed >= request.kept_to:
                request.kept_from = request.kept_to = 0
                self.kept.pop(request, None)
        self.check_pages()
        return segments

    def check_schedule(
        self,
        segments: list[Segment],
        preempted: list[Request],
        before: list[Request],
        was_decoding: list[Request],
        had_work: bool,
    ) -> None:
        scheduler, requests = self.scheduler, [segment.request for segment in segments]
        assert sum(segment.length for segment in segments) <= scheduler.max_num_batched_tokens
        assert all(segment.length > 0 for segment in segments)
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert len(set(requests)) == len(requests)
        assert bool(segments) == had_work, "every step moves something"
        # The oldest gets on, and whoever loses its pages was admitted after all that keep theirs.
        assert preempted == before[len(before) - len(preempted) :][::-1]
        assert not before or before[0] not in preempted
        if before and before[0] in was_decoding:
            assert requests[0] is before[0]
        order = [
            (request not in was_decoding, scheduler.running.index(request)) for request in requests
        ]
        assert order == sorted(order), "decode rows, then prompts, each in the order of admission"
        assert not preempted or set(requests) <= set(before), "no room, no admission"
        for request in scheduler.running[len(before) - len(preempted) :]:
            if request.num_preemptions == 0 and request.leader is None:
                self.first_admitted[request.params.session_id].append(request.index)

    def check_pages(self) -> None:
        held = [page for request in self.scheduler.running for page in request.pages]
        assert self.pages.num_held == len(set(held))
        for request in self.scheduler.running:
            assert len(set(request.pages)) == len(request.pages)
        assert not any(request.pages for request in self.scheduler.waiting())

    def run(self, segment: Segment) -> tuple[list[tuple[int, int]], int | None]:
        """(trunk, high) of each position, and the difficulty of a prompt read to its end."""
        request, size, part = segment.request, self.pages.page_size, segment.part
        rows = [self.cache[page][slot] for page in request.pages for slot in range(size)]
        rows, kept = [list(row) for row in rows], self.kept[request]
        written = request.pages[segment.start // size : (segment.end - 1) // size + 1]
        others = [page for r in self.scheduler.running if r is not request for page in r.pages]
        assert not set(written) & set(others), "a shared page is only read"
        for i, position in enumerate(range(segment.start, segment.end)):
            row, tier, before = rows[position], segment.tiers[i], rows[:position]
            trunk, low, high = row
            if part in (Part.WHOLE, Part.PROBE):
                trunk = mix(TRUNK, tuple(r[TRUNK] for r in before), segment.token_ids[i])
            else:
                assert trunk == kept.trunk[position], "the trunk's rows are those of the probe"
            assert part is not Part.WHOLE or position not in kept.trunk, "the trunk ran already"
            if part is Part.AFTER_PROBE:
                assert tier == 0 and low == kept.low[position]
            else:
                assert part is not Part.AFTER_TRUNK or tier > 0, "the probe layers ran already"
                low = mix(LOW, tuple(r[LOW] for r in before), trunk, tier)
            if part is Part.PROBE:
                assert tier == 0
                kept.trunk[position], kept.low[position] = trunk, low
            else:
                high = mix(HIGH, tuple(r[HIGH] for r in before), low, tier)
            rows[position] = [trunk, low, high]
            self.cache[request.pages[position // size]][position % size] = rows[position]
        found = [(row[TRUNK], row[HIGH]) for row in rows[segment.start : segment.end]]
        return found, self._read(segment, rows)

    def _read(self, segment: Segment, rows: list[list[int]]) -> int | None:
        request, size = segment.request, self.pages.page_size
        if not request.scores or request.decision is not None:
            return None
        kept = self.kept[request]
        if kept.reading is None:
            first = segment.start // size
            kept.reading = self.readings[request.pages[first - 1]] if segment.start else 0
        for position in range(segment.start, segment.end):
            kept.reading = mix(READ, kept.reading, rows[position][LOW])
            if (position + 1) % size == 0:
                self.readings[request.pages[position // size]] = kept.reading
        return kept.reading if segment.end == len(request.prompt_token_ids) else None

    def apply(self, segment: Segment, found: list[tuple[int, int]], reading: int | None) -> None:
        """What `Progress` does, for greedy tokens."""
        request, scheduler = segment.request, self.scheduler
        if request.scores and request.decision is None:
            if reading is None:
                scheduler.commit(segment)
                return
            tier = reading % NUM_TIERS
            request.decision = Decision(tier, str(tier), "tier_map", 0.5, (), ())
            if segment.part is Part.PROBE:
                scheduler.commit(segment)
                if not scheduler.settle(request, tier):
                    self.kept.pop(request, None)
                return
            if tier > 0:
                self.redo_last(segment, tier)
                return
        elif segment.is_draft:
            assert segment.tiers == [request.draft_tier] and segment.num_logits == 1
            request.draft_token_ids.append(token_after(*found[0]))
            self.proposed[request] += 1
            return
        elif segment.end < request.num_tokens:
            scheduler.commit(segment)
            return
        assert segment.num_logits > 0
        draft = list(request.draft_token_ids)
        assert len(draft) == self.proposed[request] == self.drafts_due(request)
        rows = found[-1 - len(draft) :]
        if not draft and is_unsure(request, rows[-1][1]) and request.tier < NUM_TIERS - 1:
            request.num_escalations += 1
            self.redo_last(segment, request.tier + 1)
            return
        kept = 1
        while kept <= len(draft) and token_after(*rows[kept - 1]) == draft[kept - 1]:
            kept += 1
        request.draft_token_ids.clear()
        self.proposed[request] = 0
        for trunk, high in rows[:kept]:
            self.states[request].append(high)
            request.output_token_ids.append(token_after(trunk, high))
        scheduler.commit(segment, segment.end - len(draft) + kept - 1)
        self._release_followers(request)
        if request.num_tokens >= request.max_total_tokens:
            assert request.num_tokens == request.max_total_tokens
            self.end(request, "length")

    def drafts_due(self, request: Request) -> int:
        """Drafted tokens, whatever the load: a seeded output depends on them."""
        if not request.speculates:
            return 0
        room = request.max_total_tokens - request.num_tokens - 1
        return min(request.num_draft, room, self.scheduler.max_num_batched_tokens - 1)

    def redo_last(self, segment: Segment, tier: int) -> None:
        self.scheduler.commit(segment, segment.end - 1)
        segment.request.rewind(segment.end - 1, tier)
        segment.request.kept_from = segment.request.kept_to = 0
        self.kept.pop(segment.request, None)

    def _release_followers(self, leader: Request) -> None:
        for follower in self.scheduler.release_followers(leader):
            follower.decision = leader.decision
            if follower.scores and leader.decision is not None:
                follower.tier = leader.decision.tier
                prompt = len(leader.prompt_token_ids)
                follower.position_tiers = leader.position_tiers[: prompt - 1]

    # -- what came out ----------------------------------------------------------------------------

    def drain(self) -> None:
        """Step until nothing is left, within the steps that any schedule could need."""
        work = sum(
            (r.num_draft + 2) * (r.max_total_tokens + MAX_ESCALATIONS) for r in self.requests()
        )
        for _ in range(4 * work + 10):
            if not self.requests():
                break
            self.step()
        assert not self.requests(), "a request never ended"
        assert self.pages.num_held == 0
        self.check_states()

    def check_states(self) -> None:
        for request, states in self.states.items():
            expected = expected_states(original(request), self.scheduler.read_at_base, len(states))
            assert states == expected, request.request_id
            if request.finish_reason == "length":
                assert request.num_tokens == request.max_total_tokens
        for admitted in self.first_admitted.values():
            assert admitted == sorted(admitted), "first come, first served within a session"


def original(request: Request) -> Request:
    """The request as it was added."""
    given = request.tier - request.num_escalations
    return Request(
        request.request_id,
        request.prompt_token_ids,
        request.params,
        0,
        scores=request.scores,
        tier=given,
        num_draft=request.num_draft,
    )
