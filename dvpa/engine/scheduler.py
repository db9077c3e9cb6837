"""What runs in the next step: decode rows first, then prompts in chunks, then new requests.

Continuous batching in the manner of vLLM, with one difference: every position has a tier, and
whatever the tiers, all positions of a step run together. Plain Python, no tensors.

* Admission is first come, first served within a session and round robin between sessions, so that
  one busy client does not keep the others waiting.
* Pages are taken as a request grows. When none are left, the request admitted last is preempted: it
  loses its pages and is recomputed later, each position at the tier it had. The oldest request
  always gets on, so there is no livelock.
* A prompt that is still to be scored is read by the base tier's first layers (`Part.PROBE`); what
  they computed is used again by the chosen tier. With `read_at_base` the base tier reads the whole
  prompt instead and the chosen tier takes over at its last token.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from dvpa.engine.pages import PageAllocator
from dvpa.engine.request import Part, Request, Segment, Stage


class QueueFull(RuntimeError):
    """The waiting queue has reached its bound; try again later."""


class Scheduler:
    """Chooses the segments of each step and keeps the books of pages.

    Args:
        pages: the page allocator.
        max_num_seqs: requests that run at the same time.
        max_num_batched_tokens: positions in one step.
        max_queue: requests that may wait.
        read_at_base: prompts to be scored are read by the base tier.
        prefix_caching: reuse pages of known prefixes.
        has_probe: whether a known page carries what the difficulty head read up to its end.
    """

    def __init__(
        self,
        pages: PageAllocator,
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        max_queue: int = 1024,
        read_at_base: bool = False,
        prefix_caching: bool = True,
        has_probe: Callable[[int], bool] = lambda page: False,
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: {max_num_batched_tokens} must be at least max_num_seqs "
                f"({max_num_seqs})"
            )
        self.pages = pages
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_queue = max_queue
        self.read_at_base = read_at_base
        self.prefix_caching = prefix_caching
        self.num_preemptions = 0
        self.num_prompt_tokens = self.num_cached_tokens = 0  # of admitted requests
        self.running: list[Request] = []  # in the order of admission
        self._has_probe = has_probe
        self._preempted: deque[Request] = deque()
        self._sessions: OrderedDict[str | None, deque[Request]] = OrderedDict()
        self._followers: dict[str, list[Request]] = {}  # by the leader's id

    # -- the queue --------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests that do not run."""
        return sum(1 for _ in self.waiting())

    @property
    def load(self) -> float:
        """Share of the waiting queue in use, 0 .. 1."""
        return min(self.num_waiting / self.max_queue, 1.0)

    def waiting(self) -> Iterator[Request]:
        """Requests that do not run, preempted ones first."""
        yield from self._preempted
        for queue in self._sessions.values():
            yield from queue
        for followers in self._followers.values():
            yield from followers

    def check_room(self, count: int) -> None:
        """QueueFull if `count` more requests would not fit into the queue."""
        if self.num_waiting + count > self.max_queue:
            raise QueueFull(f"queue: {self.num_waiting} of {self.max_queue} places are taken")

    def add(self, request: Request) -> None:
        """Queue a request; one with a leader waits until the leader has read their prompt."""
        if request.leader is not None and request.leader.finish_reason is None:
            self._followers.setdefault(request.leader.request_id, []).append(request)
        else:
            self._sessions.setdefault(request.params.session_id, deque()).append(request)

    def release_followers(self, leader: Request) -> list[Request]:
        """The leader has read the prompt (or ended): its followers may be admitted."""
        followers = self._followers.pop(leader.request_id, [])
        for request in followers:
            self._sessions.setdefault(request.params.session_id, deque()).append(request)
        return followers

    def finish(self, request: Request) -> None:
        """The request ends, wherever it is; its pages are free at once."""
        if request.is_running:
            self.running.remove(request)
            request.is_running = False
        else:
            self._unqueue(request)
        self._drop_pages(request)

    def expired(self, now: float) -> list[Request]:
        """Requests past their deadline, running or not."""
        return [r for r in (*self.running, *self.waiting()) if now >= r.deadline]

    # -- one step ---------------------------------------------------------------------------------

    def schedule(self) -> tuple[list[Segment], list[Request]]:
        """The segments of the next step, and the requests that lost their pages for it."""
        chosen: dict[Request, Segment] = {}
        preempted: list[Request] = []
        decoding = [r for r in self.running if r.stage is Stage.DECODING]
        reading = [r for r in self.running if r.stage is not Stage.DECODING]
        budget = self.max_num_batched_tokens
        for request in (*decoding, *reading):
            if not request.is_running or budget == 0:
                continue
            segment = self._next_segment(request, budget)
            if segment is not None and self._reserve(request, segment.end, chosen, preempted):
                chosen[request] = segment
                budget = self.max_num_batched_tokens - sum(s.length for s in chosen.values())
        while budget > 0 and not preempted and len(self.running) < self.max_num_seqs:
            admitted = self._admit_next()
            if admitted is None:
                break
            segment = self._next_segment(admitted, budget)
            assert segment is not None, "nothing is drafted yet"
            self._grow(admitted, segment.end)
            chosen[admitted] = segment
            budget -= segment.length
        return list(chosen.values()), preempted

    def commit(self, segment: Segment, end: int | None = None) -> None:
        """The segment's rows up to `end` (default: all) are computed and will stay as they are."""
        request = segment.request
        end = segment.end if end is None else end
        if segment.part is Part.PROBE:
            request.num_probed = end
            return
        before = request.num_computed
        assert segment.start == before
        request.position_tiers[before:end] = segment.tiers[: end - before]
        request.num_computed = end
        if self.prefix_caching:
            full = end // self.pages.page_size
            for page in range(before // self.pages.page_size, full):
                self.pages.register(request.pages[page], request.keys(full)[page])

    def settle(self, request: Request, tier: int) -> bool:
        """The scored request goes on at `tier`, over what its probe left; False: preempted for it.

        The probe of a request that stays at the base tier is kept as it is. Otherwise shared pages,
        which hold base-tier rows, make room for pages of its own or known ones of its tier. A
        prompt that the base tier has read to its end is read again.
        """
        shared, prompt = request.num_computed, len(request.prompt_token_ids)
        if shared < prompt:
            request.kept_from, request.kept_to = shared, prompt
        if tier == 0:
            return True
        request.rewind(0, tier)
        matched = self._match(request)
        self.pages.hold(matched)
        num_fresh = max(shared // self.pages.page_size - len(matched), 0)
        if num_fresh > self.pages.num_available:
            self.pages.release(matched)
            self._preempt(request)
            return False
        replaced = request.pages[: len(matched) + num_fresh]
        request.pages[: len(replaced)] = matched + self.pages.allocate(num_fresh)
        self.pages.release(replaced)
        self._take_known(request, len(matched))
        return True

    def _next_segment(self, request: Request, budget: int) -> Segment | None:
        prompt = len(request.prompt_token_ids)
        if request.stage is Stage.SCORING:
            probing = not self.read_at_base
            start = request.num_probed if probing else request.num_computed
            end = min(prompt, start + budget)
            return Segment(
                request,
                start,
                request.tokens(start, end),
                [0] * (end - start),
                Part.PROBE if probing else Part.WHOLE,
                num_logits=0 if probing else _num_logits(request, start, end),
            )
        # What a lower tier drafts for is never sampled from plainly, whatever was preempted.
        last = request.num_tokens - (request.speculates and request.stage is Stage.READING)
        start, end = request.num_computed, min(last, request.num_computed + budget)
        part = Part.WHOLE
        if start < request.kept_from < request.kept_to:
            end = min(end, request.kept_from)
        elif start < request.kept_to:  # nothing is generated yet: the prompt's end is the end
            part = Part.AFTER_PROBE if request.tier == 0 else Part.AFTER_TRUNK
        elif request.speculates and request.stage is Stage.DECODING:
            return self._speculation(request, budget)
        return Segment(
            request,
            start,
            request.tokens(start, end),
            request.tiers(start, end),
            part,
            _num_logits(request, start, end),
        )

    def _speculation(self, request: Request, budget: int) -> Segment | None:
        """One more draft token at the draft tier, or the verification of all at the request's.

        How many are drafted depends on the request alone: a seeded output must not depend on load.
        So where the budget is too small to verify them all, it waits (None).
        """
        start, draft = request.num_computed, request.draft_token_ids
        last = request.tokens(start, start + 1)
        # The verification itself gives one token more.
        room = min(request.max_total_tokens - request.num_tokens, self.max_num_batched_tokens)
        if len(draft) < min(request.num_draft, room - 1):
            at = start + len(draft)
            token = [*last, *draft][-1:]
            return Segment(request, at, token, [request.draft_tier], num_logits=1, is_draft=True)
        if len(draft) >= budget:
            return None
        tiers = [request.tier] * (len(draft) + 1)
        return Segment(request, start, [*last, *draft], tiers, num_logits=len(tiers))

    # -- pages ------------------------------------------------------------------------------------

    def _reserve(
        self,
        request: Request,
        end: int,
        chosen: dict[Request, Segment],
        preempted: list[Request],
    ) -> bool:
        """Pages up to `end`, if need be those of requests admitted later."""
        while self.pages.pages_for(end) - len(request.pages) > self.pages.num_available:
            victim = self.running[-1]
            self._preempt(victim)
            preempted.append(victim)
            chosen.pop(victim, None)
            if victim is request:
                return False
        self._grow(request, end)
        return True

    def _grow(self, request: Request, end: int) -> None:
        missing = self.pages.pages_for(end) - len(request.pages)
        if missing > 0:
            request.pages += self.pages.allocate(missing)

    def _admit_next(self) -> Request | None:
        queue = self._preempted or next(iter(self._sessions.values()), self._preempted)
        if not queue:
            return None
        request = queue[0]
        matched = self._match(request)
        self.pages.hold(matched)
        # One page to grow for each request that runs, or admission would only cause preemption.
        missing = self.pages.pages_for(request.num_tokens + 1) - len(matched)
        if missing + len(self.running) > self.pages.num_available and self.running:
            self.pages.release(matched)
            return None
        queue.popleft()
        if queue is not self._preempted:
            session, rest = self._sessions.popitem(last=False)
            if rest:
                self._sessions[session] = rest
        request.pages = list(matched)
        self._take_known(request, len(matched))
        self.num_prompt_tokens += len(request.prompt_token_ids)
        self.num_cached_tokens += request.num_computed
        request.num_probed = request.num_computed
        request.is_running = True
        self.running.append(request)
        return request

    def _match(self, request: Request) -> list[int]:
        if not self.prefix_caching or request.params.prompt_logprobs is not None:
            return []
        # The last position is always computed: its logits are wanted.
        keys = request.keys((request.num_tokens - 1) // self.pages.page_size)
        if request.stage is Stage.SCORING:
            return self.pages.match(keys, self._has_probe)
        return self.pages.match(keys)

    def _take_known(self, request: Request, num_pages: int) -> None:
        end = num_pages * self.pages.page_size
        request.position_tiers[:end] = request.tiers(0, end)
        request.num_computed = end
        request.cached_tokens = max(request.cached_tokens, end)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        request.is_running = False
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._drop_pages(request)
        self._preempted.appendleft(request)

    def _drop_pages(self, request: Request) -> None:
        self.pages.release(request.pages)
        request.pages = []
        request.num_computed = request.num_probed = 0
        request.kept_from = request.kept_to = 0
        request.draft_token_ids.clear()

    def _unqueue(self, request: Request) -> None:
        if request in self._preempted:
            self._preempted.remove(request)
        for queue in (*self._sessions.values(), *self._followers.values()):
            if request in queue:
                queue.remove(request)
        session = request.params.session_id
        if not self._sessions.get(session, True):
            del self._sessions[session]


def _num_logits(request: Request, start: int, end: int) -> int:
    """All of the segment's where the prompt's log-probabilities are wanted, else its last one's."""
    if request.params.prompt_logprobs is not None and start < len(request.prompt_token_ids):
        return end - start
    return int(end == request.num_tokens)
