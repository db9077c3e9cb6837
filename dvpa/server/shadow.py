"""Shadow outcomes: now and then, how every tier would have done on a request just answered.

The top tier answers the prompt greedily, then each tier scores that answer in one pass, which tells
its nll and whether the tier would have said the same. What is kept is a `ShadowRecord` in the
access log, never a prompt or an answer; `dvpa calibrate --on-logs` reads it.

One request at a time, beside the clients' and by the same queue: one that comes meanwhile, or finds
no room, is skipped, and counted. That makes the sample a little thinner under load, not biased by
difficulty.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import aclosing

from dvpa.engine import Piece, QueueFull, SamplingParams
from dvpa.engine.outputs import TokenLogprob
from dvpa.server.backend import Backend
from dvpa.server.telemetry import Telemetry
from dvpa.tiers.record import ShadowRecord

logger = logging.getLogger(__name__)
ENDED_WELL = ("stop", "length")


class Shadows:
    """Chooses requests and runs them; used from the event loop.

    Args:
        share: of the requests that the policy routed, in (0, 1].
        draw: a number in [0, 1) for each of them.
    """

    def __init__(
        self, backend: Backend, telemetry: Telemetry, share: float, seed: int | None = None
    ) -> None:
        self._backend, self._telemetry, self._share = backend, telemetry, share
        self._draw = random.Random(seed).random
        self._running: asyncio.Task[None] | None = None
        self._count = 0

    def offer(self, prompt: Sequence[int], params: SamplingParams, piece: Piece) -> None:
        """A completion has ended; `piece` is its last."""
        record = piece.telemetry
        is_routed = params.tier == "auto" and record is not None and record.difficulty is not None
        if not is_routed or piece.index or piece.finish_reason not in ENDED_WELL:
            return
        if self._draw() >= self._share:
            return
        if self._running is not None and not self._running.done():
            self._telemetry.shadowed("skipped")
            return
        assert record is not None and record.difficulty is not None
        work = self._run(list(prompt), params.max_tokens, record.request_id, record.difficulty)
        self._running = asyncio.ensure_future(work)

    async def close(self) -> None:
        """Give up the one that runs."""
        if self._running is not None and not self._running.done():
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._telemetry.shadowed("skipped")

    async def _run(
        self, prompt: list[int], max_tokens: int | None, request_id: str, difficulty: float
    ) -> None:
        try:
            record = await self._record(prompt, max_tokens, request_id, difficulty)
        except (QueueFull, ValueError):  # no room in the queue, or in the context
            self._telemetry.shadowed("skipped")
        except Exception as error:
            logger.warning("shadow of a request failed: %s", type(error).__name__)
            self._telemetry.shadowed("failed")
        else:
            self._telemetry.shadowed("done", record)

    async def _record(
        self, prompt: list[int], max_tokens: int | None, request_id: str, difficulty: float
    ) -> ShadowRecord:
        num_tiers = self._backend.info.config.num_tiers
        pieces = await self._pieces(prompt, _params(num_tiers - 1, max_tokens=max_tokens))
        answer = [token for piece in pieces for token in piece.token_ids]
        if not answer:
            raise ValueError("the top tier answered nothing")
        agreement, nll = [], []
        for tier in range(num_tiers):
            scoring = _params(tier, max_tokens=1, prompt_logprobs=1)
            last = (await self._pieces([*prompt, *answer], scoring))[-1]
            assert last.prompt_logprobs is not None
            tokens = [t for t in last.prompt_logprobs[len(prompt) :] if t is not None]
            nll.append(-sum(token.logprob for token in tokens) / len(tokens))
            agreement.append(float(all(map(_is_likeliest, tokens))))
        agreement[-1] = 1.0  # with itself, whatever the last bits of a tie say
        return ShadowRecord(
            request_id, difficulty, len(prompt), len(answer), tuple(agreement), tuple(nll)
        )

    async def _pieces(self, token_ids: list[int], params: SamplingParams) -> list[Piece]:
        self._count += 1
        self._backend.check(token_ids, params)
        stream = self._backend.stream(token_ids, params, f"shadow-{id(self)}-{self._count}")
        async with aclosing(stream):
            pieces = [piece async for piece in stream]
        if not pieces or pieces[-1].finish_reason not in ENDED_WELL:
            raise RuntimeError("a shadow request ended early")
        return pieces


def _params(
    tier: int, max_tokens: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    return SamplingParams(
        tier=tier,
        temperature=0.0,
        max_tokens=max_tokens,
        prompt_logprobs=prompt_logprobs,
        allow_escalation=False,
        allow_degradation=False,
    )


def _is_likeliest(token: TokenLogprob) -> bool:
    return token.logprob >= max(token.top.values(), default=token.logprob)
