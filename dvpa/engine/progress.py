"""What a step's result means for its requests: tiers, tokens, text, ends.

Between scheduler and runner this is the only place that changes requests. Each request goes through
it once a step; whatever fails, fails for that request alone.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dvpa.engine.detokenizer import Detokenizer
from dvpa.engine.escalation import Doubt, EscalationParams
from dvpa.engine.outputs import Piece, TokenLogprob
from dvpa.engine.request import Part, Request, Segment
from dvpa.engine.runner import Runner, StepResult
from dvpa.engine.sampler import Sampled, Sampler, SampleRow, logprobs
from dvpa.engine.sampling_params import SamplingParams
from dvpa.engine.scheduler import Scheduler
from dvpa.engine.speculation import draft_token, verify
from dvpa.engine.trace import trace
from dvpa.pricing import ModelPrice
from dvpa.tiers.policy import Decision

logger = logging.getLogger(__name__)
NOT_FINITE = "the model's state became non-finite (NaN or infinity) at tier {tier}"


@dataclass
class Live:
    """What a request has beside the scheduler's view of it."""

    detokenizer: Detokenizer | None
    doubt: Doubt | None = None
    max_tier: int = 0
    proposals: list[Tensor | None] = field(default_factory=list)  # of the drafted tokens
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)  # news since the last piece
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    is_announced: bool = False  # a piece has gone out


class Progress:
    """Applies step results.

    Args:
        decide: the policy: request and difficulty -> decision.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        sampler: Sampler,
        price: ModelPrice,
        eos_token_ids: frozenset[int],
        escalation: EscalationParams | None,
        decide: Callable[[Request, float | None], Decision],
        clock: Callable[[], float],
    ) -> None:
        self.live: dict[Request, Live] = {}
        self.num_failed = 0
        self.num_escalations = 0
        self.num_degraded = 0  # requests for which an expert group could not be read
        self.num_drafted = self.num_accepted = 0
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._price = price
        self._eos = eos_token_ids
        self._escalation = escalation
        self._decide = decide
        self._clock = clock

    def begin(
        self, request: Request, tokenizer: PreTrainedTokenizerBase | None, max_tier: int
    ) -> None:
        """Start keeping track of a request."""
        detokenizer = None if tokenizer is None else Detokenizer(tokenizer, request.params)
        self.live[request] = Live(detokenizer, max_tier=max_tier)

    def apply(self, segments: Sequence[Segment], result: StepResult) -> None:
        """Take in one step."""
        plain: list[tuple[Segment, int]] = []  # segments that sample one token, row of its logits
        for i, segment in enumerate(segments):
            request = segment.request
            self._charge(segment)
            if request.cancel_wanted:
                self.end(request, "cancelled")
                continue
            if i in result.failed:
                self._fail(request, max(segment.tiers))
                continue
            rows = result.rows.get(i, slice(0, 0))
            logits = result.logits[rows]
            if request.params.prompt_logprobs is not None:
                self._take_prompt_logprobs(segment, logits)
            if request.scores and request.decision is None:
                if self._take_score(segment, result.difficulties.get(i)):
                    plain.append((segment, rows.stop - 1))
            elif segment.is_draft:
                self._take_draft(segment, logits[0])
            elif segment.end < request.num_tokens:
                self._scheduler.commit(segment)
            elif request.draft_token_ids:
                self._take_verified(segment, logits)
            else:
                plain.append((segment, rows.stop - 1))
        self._take_tokens(plain, result)
        for segment in segments:
            request = segment.request
            if request.kept_to and request.num_computed >= request.kept_to:
                request.kept_from = request.kept_to = 0
                self._runner.forget(request)

    def end(self, request: Request, reason: str, error: str | None = None) -> None:
        """The request ends, whatever it was doing; its pages are free at once."""
        request.finish_reason, request.error = reason, error
        request.finished = self._clock()
        self._scheduler.finish(request)
        self._runner.forget(request)
        self._scheduler.release_followers(request)
        live = self.live[request]
        if live.detokenizer is not None:
            live.text += live.detokenizer.finish()
        live.proposals.clear()

    def _fail(self, request: Request, tier: int) -> None:
        self.num_failed += 1
        self.end(request, "error", NOT_FINITE.format(tier=tier))

    def abandon(self, segments: Sequence[Segment], error: Exception) -> None:
        """The step came to nothing: its requests end, the engine goes on."""
        logger.error("step abandoned: %s", trace(error))
        for segment in segments:
            if segment.request.finish_reason is None:
                self.num_failed += 1
                self.end(segment.request, "error", f"internal error: {type(error).__name__}")

    def degrade(
        self,
        segments: Sequence[Segment],
        tier: int,
        reason: str,
        may_degrade: Callable[[SamplingParams, int], bool],
    ) -> None:
        """No tier above this one can be had: the step's requests go on at it, or end.

        Nothing of the step counts; it is scheduled again.
        """
        for segment in segments:
            request, wanted = segment.request, max(segment.tiers)
            if wanted <= tier:
                continue
            if not may_degrade(request.params, tier):
                self.num_failed += 1
                self.end(request, "error", f"tier {self._price.tiers[wanted].name}: {reason}")
                continue
            self.num_degraded += not request.is_degraded
            request.is_degraded = True
            request.lower(tier)
            self.live[request].proposals.clear()

    def lost_pages(self, request: Request) -> None:
        """The request was preempted: what was kept for it is void."""
        self._runner.forget(request)
        self.live[request].proposals.clear()

    def piece(self, request: Request) -> Piece | None:
        """The news of a request since the last call; None without any. Its last piece ends it."""
        live = self.live.get(request)
        if live is None:  # a listener has cancelled it
            return None
        if not live.token_ids and not live.text and request.finish_reason is None:
            return None
        prompt_logprobs = None
        if request.finish_reason is not None:
            del self.live[request]
            if request.params.prompt_logprobs is not None:
                positions = range(len(request.prompt_token_ids))
                prompt_logprobs = tuple(live.prompt_logprobs.get(i) for i in positions)
        piece = Piece(
            request.request_id,
            request.index,
            text=live.text,
            token_ids=tuple(live.token_ids),
            logprobs=tuple(live.logprobs),
            finish_reason=request.finish_reason,
            error=request.error,
            decision=None if live.is_announced else request.decision,
            prompt_logprobs=prompt_logprobs,
        )
        live.text, live.token_ids, live.logprobs, live.is_announced = "", [], [], True
        return piece

    # -- one segment ------------------------------------------------------------------------------

    def _charge(self, segment: Segment) -> None:
        """Count the FLOPs of the segment's rows, prices without attention over the context."""
        tiers, request = self._price.tiers, segment.request
        if segment.part is Part.PROBE:
            request.flops += self._price.probe_flops_per_token * segment.length
            return
        saved = 0
        if segment.part is Part.AFTER_PROBE:
            saved = self._price.probe_flops_per_token
        elif segment.part is Part.AFTER_TRUNK:
            saved = self._price.trunk_flops_per_token
        request.flops += sum(tiers[tier].flops_per_token - saved for tier in segment.tiers)

    def _take_score(self, segment: Segment, difficulty: float | None) -> bool:
        """More of a prompt was read for scoring. True: its logits are those of the chosen tier."""
        request = segment.request
        if difficulty is None:
            self._scheduler.commit(segment)
            return False
        request.flops += self._price.head_flops_per_request
        if self._runner.knows_lens(segment):
            request.flops -= self._price.shared_lens_flops
        request.scored = self._clock()
        decision = request.decision = self._decide(request, difficulty)
        if request.only_routes:
            request.tier = decision.tier
            self.end(request, "stop")
            return False
        if segment.part is Part.WHOLE:
            self._runner.forget(request)
            if decision.tier == 0:
                return True
            # Without a usable score the tier that answers reads the prompt, too (`model.answer`).
            if decision.decided_by != "fallback":
                self._redo_last(segment, decision.tier)
                return False
        self._scheduler.commit(segment)
        if not self._scheduler.settle(request, decision.tier):
            self.lost_pages(request)
        return False

    def _take_tokens(self, plain: Sequence[tuple[Segment, int]], result: StepResult) -> None:
        """One new token for each of these segments, or another try at a higher tier."""
        doubts = self._doubts(plain, result)
        certain: list[tuple[Segment, int]] = []
        for (segment, row), doubt in zip(plain, doubts, strict=True):
            request = segment.request
            if doubt is not None and self._doubt_of(request).is_too_much(doubt):
                request.num_escalations += 1
                self.num_escalations += 1
                self._redo_last(segment, self._next_tier(request))
            else:
                certain.append((segment, row))
        if not certain:
            return
        rows = [row for _, row in certain]
        whole = rows == list(range(result.logits.shape[0]))
        logits = result.logits if whole else result.logits[rows]
        sampled = self._sampler.sample(logits, [_row(segment.request) for segment, _ in certain])
        for (segment, _), token in zip(certain, sampled, strict=True):
            request = segment.request
            self._scheduler.commit(segment)
            if token is None:
                self._fail(request, request.tier)
            else:
                self._append(request, token)

    def _doubts(
        self, plain: Sequence[tuple[Segment, int]], result: StepResult
    ) -> list[float | None]:
        """1 - p of the likeliest token, where the request may still go up."""
        doubts: list[float | None] = [None] * len(plain)
        if self._escalation is None:
            return doubts
        able = [i for i, (segment, _) in enumerate(plain) if self._may_escalate(segment.request)]
        if able:
            logits = result.logits[[plain[i][1] for i in able]].float()
            top = (logits.amax(-1) - logits.logsumexp(-1)).exp()
            for i, p in zip(able, top.tolist(), strict=True):
                doubts[i] = 1 - p
        return doubts

    def _may_escalate(self, request: Request) -> bool:
        decision = request.decision
        return (
            request.params.allow_escalation
            and decision is not None
            and decision.decided_by != "override"
            and not request.is_degraded
            and request.num_draft == 0
            and request.tier < self.live[request].max_tier
        )

    def _next_tier(self, request: Request) -> int:
        assert self._escalation is not None
        if self._escalation.step == "highest":
            return self.live[request].max_tier
        return request.tier + 1

    def _doubt_of(self, request: Request) -> Doubt:
        live = self.live[request]
        if live.doubt is None:
            assert self._escalation is not None
            live.doubt = Doubt(self._escalation)
        return live.doubt

    def _redo_last(self, segment: Segment, tier: int) -> None:
        """Compute the segment's last position again at another tier, all before it kept."""
        request = segment.request
        self._scheduler.commit(segment, segment.end - 1)
        request.rewind(segment.end - 1, tier)
        request.kept_from = request.kept_to = 0
        self._runner.forget(request)

    def _take_draft(self, segment: Segment, logits_V: Tensor) -> None:
        request, live = segment.request, self.live[segment.request]
        drafted = draft_token(self._sampler, logits_V, _row(request, request.draft_token_ids))
        if drafted is None:
            self._fail(request, request.draft_tier)
            return
        request.draft_token_ids.append(drafted[0])
        live.proposals.append(drafted[1])

    def _take_verified(self, segment: Segment, logits_KV: Tensor) -> None:
        request, live = segment.request, self.live[segment.request]
        draft = list(request.draft_token_ids)
        kept = verify(self._sampler, logits_KV, _row(request), draft, live.proposals)
        if kept is None:
            self._fail(request, request.tier)
            return
        self.num_drafted += len(draft)
        self.num_accepted += len(kept) - 1
        request.draft_token_ids.clear()
        live.proposals.clear()
        sampled = [Sampled(token) for token in kept]
        if request.params.logprobs is not None:
            found = logprobs(logits_KV[: len(kept)], kept, request.params.logprobs)
            sampled = [Sampled(token, *pair) for token, pair in zip(kept, found, strict=True)]
        for token in sampled:
            self._append(request, token)
            if request.finish_reason is not None:
                return
        self._scheduler.commit(segment, segment.start + len(kept))

    def _take_prompt_logprobs(self, segment: Segment, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens after each of the segment's positions."""
        request, live = segment.request, self.live[segment.request]
        num_top = request.params.prompt_logprobs
        assert num_top is not None
        token_ids = request.prompt_token_ids[segment.start + 1 : segment.end + 1]
        if not token_ids or not segment.num_logits:
            return
        found = logprobs(logits[: len(token_ids)], token_ids, num_top)
        for i, (token_id, (logprob, top)) in enumerate(zip(token_ids, found, strict=True)):
            position = segment.start + 1 + i
            live.prompt_logprobs[position] = TokenLogprob(token_id, logprob, top)

    # -- tokens -----------------------------------------------------------------------------------

    def _append(self, request: Request, sampled: Sampled) -> None:
        """Take in one generated token; ends the request where it is the last."""
        token, params, live = sampled.token_id, request.params, self.live[request]
        if request.first_token is None:
            request.first_token = self._clock()
            self._let_followers_go(request)
        request.output_token_ids.append(token)
        request.tier_tokens[request.tier] += 1
        live.token_ids.append(token)
        if sampled.logprob is not None:
            live.logprobs.append(TokenLogprob(token, sampled.logprob, sampled.top_logprobs or {}))
        may_stop = len(request.output_token_ids) >= params.min_tokens
        is_eos = token in self._eos and not params.ignore_eos
        stops = may_stop and (is_eos or token in params.stop_token_ids)
        if live.detokenizer is not None and not stops:
            live.text += live.detokenizer.push(token)
            stops = may_stop and live.detokenizer.stopped is not None
        if stops:
            self.end(request, "stop")
        elif request.num_tokens >= request.max_total_tokens:
            self.end(request, "length")

    def _let_followers_go(self, leader: Request) -> None:
        """The prompt is read: the other completions of it may start, at the same tier."""
        prompt = len(leader.prompt_token_ids)
        for follower in self._scheduler.release_followers(leader):
            follower.decision = leader.decision
            if follower.scores and leader.decision is not None:
                follower.tier = leader.decision.tier
                follower.position_tiers = leader.position_tiers[: prompt - 1]


def _row(request: Request, draft: Sequence[int] = ()) -> SampleRow:
    output = request.output_token_ids
    return SampleRow(
        params=request.params,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=[*output, *draft] if draft else output,
        seed=request.seed,
        position=len(output) + len(draft),
    )
