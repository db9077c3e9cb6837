"""What the HTTP side asks of whatever runs the model: an engine here, or replicas elsewhere."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from dvpa.config import DvpaConfig
from dvpa.engine import Engine, Piece, SamplingParams
from dvpa.engine.admission import Admission
from dvpa.pricing import ModelPrice, price
from dvpa.server.reports import read_report
from dvpa.tiers.record import TelemetryRecord
from dvpa.tiers.tier_map import TierMap

After = Callable[[Piece], None]


@dataclass(frozen=True)
class ModelInfo:
    """The served model, as far as a server without its weights has to know it.

    `report` is the calibration's report.json, where there is one.
    """

    name: str
    config: DvpaConfig
    price: ModelPrice
    tier_map: TierMap
    tokenizer: PreTrainedTokenizerBase | None = None
    report: dict[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class EngineStats:
    """Numbers of a running engine (or the sums over several); counts are since its start."""

    running: int = 0
    waiting: int = 0
    max_queue: int = 0
    kv_pages_used: int = 0
    kv_pages: int = 0
    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens asked for
    prefix_hits: int = 0  # prompt tokens found in the cache
    steps: int = 0
    failed: int = 0
    escalations: int = 0
    degraded: int = 0
    drafted: int = 0
    accepted: int = 0
    decisions: dict[str, int] = field(default_factory=dict)
    resident_bytes: int | None = None


class Backend(Protocol):
    """Runs requests. Prompts are token ids that have been checked against the model."""

    info: ModelInfo

    @property
    def capacity(self) -> int:
        """Requests it can hold, running and waiting; 0 while nothing can run."""
        ...

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """ValueError naming the field that the model cannot do."""
        ...

    def stream(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str,
        after: After | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Pieces as they come; closing it cancels. QueueFull if there is no room.

        `after` is told of what comes once it has been closed early: each completion's end.
        """
        ...

    async def route(
        self, token_ids: Sequence[int], params: SamplingParams, request_id: str
    ) -> TelemetryRecord:
        """The policy's decision, without generating."""
        ...

    async def stats(self) -> EngineStats:
        """Numbers as of now."""
        ...

    async def set_tier_map(self, tier_map: TierMap) -> None:
        """Decide by this map from now on; ValueError if it is another model's."""
        ...

    async def cancel_all(self) -> None:
        """End every request that runs or waits."""
        ...

    async def close(self) -> None:
        """Give everything back."""
        ...


class RouteFailed(RuntimeError):
    """A request for a decision ended without one."""


class LocalBackend:
    """An engine in this process.

    Args:
        engine: it belongs to the backend from now on.
        name: the model's name.
        report: a calibration report, see `read_report`.
    """

    def __init__(self, engine: Engine, name: str, report: str | Path | None = None) -> None:
        self.engine = engine
        self.info = ModelInfo(
            name=name,
            config=engine.model.config,
            price=price(engine.model.config),
            tier_map=engine.policy.tier_map,
            tokenizer=engine.tokenizer,
            report=None if report is None else read_report(report),
        )
        self._admission: Admission = engine.admission
        self._running: dict[str, None] = {}

    @property
    def capacity(self) -> int:
        return self.engine.config.max_num_seqs + self.engine.config.max_queue

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        self._admission.pair([list(token_ids)], params)

    async def stream(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str,
        after: After | None = None,
    ) -> AsyncGenerator[Piece, None]:
        pieces = self.engine.stream(list(token_ids), params, request_id=request_id, after=after)
        self._running[request_id] = None
        try:
            async with aclosing(pieces):  # closed now, not when it is collected: that cancels
                async for piece in pieces:
                    yield piece
        finally:
            del self._running[request_id]

    async def route(
        self, token_ids: Sequence[int], params: SamplingParams, request_id: str
    ) -> TelemetryRecord:
        last: Piece | None = None
        pieces = self.engine.stream(
            list(token_ids), params, request_id=request_id, only_routes=True
        )
        async with aclosing(pieces):
            async for piece in pieces:
                last = piece
        if last is None or last.telemetry is None or last.finish_reason != "stop":
            reason = "no answer" if last is None else last.error or last.finish_reason
            raise RouteFailed(f"no decision: {reason}")
        return last.telemetry

    async def stats(self) -> EngineStats:
        engine = self.engine
        scheduler, progress, pages = engine.scheduler, engine.progress, engine.pages
        return EngineStats(
            running=len(scheduler.running),
            waiting=engine.num_waiting,
            max_queue=scheduler.max_queue,
            kv_pages_used=pages.num_held,
            kv_pages=pages.num_pages,
            preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.num_prompt_tokens,
            prefix_hits=scheduler.num_cached_tokens,
            steps=engine.num_steps,
            failed=progress.num_failed,
            escalations=progress.num_escalations,
            degraded=progress.num_degraded,
            drafted=progress.num_drafted,
            accepted=progress.num_accepted,
            decisions=dict(engine.policy.counters),
            resident_bytes=None if engine.store is None else engine.store.stats.resident_bytes,
        )

    async def set_tier_map(self, tier_map: TierMap) -> None:
        self.engine.set_tier_map(tier_map)
        self.info = replace(self.info, tier_map=tier_map)

    async def cancel_all(self) -> None:
        for request_id in list(self._running):
            self.engine.cancel(request_id)

    async def close(self) -> None:
        self.engine.close()
