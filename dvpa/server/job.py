"""One HTTP request's completions: all its prompts through the backend, as one stream of pieces.

Also the only place that tells the telemetry what ended, how and when.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import Request

from dvpa.engine import Piece, QueueFull, SamplingParams
from dvpa.server.errors import ApiError, bad_field, queue_full
from dvpa.server.lifecycle import Server
from dvpa.server.options import explain, tier_headers
from dvpa.server.telemetry import Finished
from dvpa.tiers.policy import Decision
from dvpa.tiers.record import TelemetryRecord

T = TypeVar("T")
# Of the errors' texts: a group that cannot be read, a replica that is gone.
PASSING = ("cannot be read", "replica")
Numbered = tuple[int, Piece]  # choice of the answer, piece


@dataclass
class Job:
    """`prompts` x `params.n` completions. Choice i is completion i % n of prompt i // n."""

    server: Server
    request_id: str
    endpoint: str
    model: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    is_stream: bool
    explains: bool = False
    records: dict[int, TelemetryRecord] = field(default_factory=dict)
    decision: Decision | None = None
    _last_token: dict[int, float] = field(default_factory=dict)

    def check(self) -> None:
        """ApiError for what the model cannot do; nothing has run."""
        try:
            for prompt in self.prompts:
                self.server.backend.check(prompt, self.params)
        except ValueError as error:
            raise bad_field(error) from None

    @property
    def num_choices(self) -> int:
        """Completions in all."""
        return len(self.prompts) * self.params.n

    async def pieces(self) -> AsyncGenerator[Numbered, None]:
        """Pieces of every choice as they come; closing it cancels what still runs.

        Raises:
            ApiError: 429 for no room in the queue, 4xx and 5xx for a choice that has come to
                nothing.
        """
        try:
            async with aclosing(self._merged()) as merged:
                async for number, piece in merged:
                    choice = number * self.params.n + piece.index
                    self._note(choice, piece)
                    self._raise_for(choice, piece)
                    yield choice, piece
        except QueueFull as error:
            raise queue_full(error, self.server.config.retry_after_s) from None
        except ValueError as error:
            raise bad_field(error) from None

    async def _merged(self) -> AsyncGenerator[Numbered, None]:
        """The number of a prompt with each piece."""
        streams = [
            self.server.backend.stream(
                prompt,
                self.params,
                self.request_id if number == 0 else f"{self.request_id}-{number}",
                partial(self._note_late, number),
            )
            for number, prompt in enumerate(self.prompts)
        ]
        if len(streams) == 1:
            async with aclosing(streams[0]) as stream:
                async for piece in stream:
                    yield 0, piece
            return
        news = asyncio.Queue[Numbered | BaseException | None]()

        async def pump(number: int, stream: AsyncGenerator[Piece, None]) -> None:
            try:
                async with aclosing(stream):
                    async for piece in stream:
                        news.put_nowait((number, piece))
            except Exception as error:
                news.put_nowait(error)
            else:
                news.put_nowait(None)

        pumps = [asyncio.ensure_future(pump(i, s)) for i, s in enumerate(streams)]
        try:
            left = len(pumps)
            while left:
                item = await news.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _note_late(self, number: int, piece: Piece) -> None:
        """The client has left: the books still want the end of each choice."""
        self._note(number * self.params.n + piece.index, piece)

    def _note(self, choice: int, piece: Piece) -> None:
        now = time.perf_counter()
        if piece.decision is not None and self.decision is None:
            self.decision = piece.decision
        if piece.token_ids:
            before = self._last_token.get(choice)
            if before is not None and self.decision is not None:
                self.server.telemetry.inter_token(self.decision.tier_name, now - before)
            self._last_token[choice] = now
        if piece.telemetry is None or piece.finish_reason is None:
            return
        self.records[choice] = piece.telemetry
        self.server.shadow(self.prompts[choice // self.params.n], self.params, piece)
        self.server.finished(
            Finished(
                record=piece.telemetry,
                finish_reason=piece.finish_reason,
                endpoint=self.endpoint,
                is_stream=self.is_stream,
                model=self.model,
                status=self._status(choice, piece),
                finished_at=time.time(),
                max_tokens=self.params.max_tokens or 0,
                n=self.params.n,
            )
        )

    def headers(self) -> dict[str, str]:
        """The answer's headers, once the first piece is there."""
        shown = self.records.get(0) or self.decision
        assert shown is not None, "the first piece has one of the two"
        return tier_headers(shown, self.request_id)

    def usage(self, completion_tokens: int | None = None) -> dict[str, Any]:
        """Token counts and telemetry of everything that has ended.

        `completion_tokens`: what the client gets, where that is not what was generated.
        """
        records = [self.records[choice].to_dict() for choice in sorted(self.records)]
        prompt = sum(len(prompt) for prompt in self.prompts)
        made = sum(record["completion_tokens"] for record in records)
        given = made if completion_tokens is None else completion_tokens
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": given,
            "total_tokens": prompt + given,
        }
        if records:
            usage["dvpa"] = dict(records[0])
            if len(records) > 1:
                usage["dvpa"]["choices"] = records
            if self.explains:
                usage["dvpa"]["explanation"] = explain(records[0], self.server.backend.info)
        return usage

    def _status(self, choice: int, piece: Piece) -> int:
        """What the client gets; a stream that has begun is a 200, whatever becomes of it."""
        if piece.finish_reason == "error" and not (self.is_stream and self._last_token):
            return self._failure(piece).status
        return 200 if choice in self._last_token or piece.finish_reason == "stop" else 503

    def _raise_for(self, choice: int, piece: Piece) -> None:
        """ApiError for a choice that has come to nothing."""
        reason = piece.finish_reason
        if reason == "error":
            raise self._failure(piece)
        if reason in ("timeout", "cancelled") and choice not in self._last_token:
            raise self._too_late(reason)

    def _failure(self, piece: Piece) -> ApiError:
        # A missing expert group may be there again later; a model that gives NaN will again.
        status = 503 if any(mark in (piece.error or "") for mark in PASSING) else 500
        headers = {"Retry-After": str(self.server.config.retry_after_s)} if status == 503 else {}
        return ApiError(
            status,
            piece.error or "the request failed",
            code="generation_failed",
            reason="error",
            headers=headers,
            is_counted=True,
        )

    def _too_late(self, reason: str) -> ApiError:
        why = "its time ran out in the queue" if reason == "timeout" else "it was cancelled"
        return ApiError(
            503,
            f"nothing was generated: {why}; try again later",
            code=reason,
            reason=reason,
            headers={"Retry-After": str(self.server.config.retry_after_s)},
            is_counted=True,
        )


class Disconnected(Exception):
    """The client has gone; whatever it asked for has been cancelled."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; if the client leaves first, the work is cancelled.

    Raises:
        Disconnected: the client has left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        for future in (task, watch):
            if not future.done():
                future.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await future


async def _gone(request: Request) -> None:
    while True:
        if (await request.receive())["type"] == "http.disconnect":
            return
