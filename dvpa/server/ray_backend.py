"""`RayBackend`: what the gateway's HTTP side asks, answered by engine replicas elsewhere.

It knows the model's config, tokenizer and tier map, and of the replicas what they report. Ray
Serve chooses the replica of each request and replaces the ones that die.

* A replica lost before a request's first piece: the request is tried once more, elsewhere.
* Lost after it: the answer ends there with an error, since its beginning cannot be taken back.
* A session's tier is kept here: its requests may reach any replica.
"""

import asyncio
import hashlib
import logging
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dvpa.checkpoint.export import read_config
from dvpa.engine import Piece, QueueFull, SamplingParams
from dvpa.engine.admission import MAX_SESSIONS, Admission
from dvpa.model.causal_lm import TIER_MAP_FILE
from dvpa.pricing import price
from dvpa.server.backend import After, EngineStats, ModelInfo
from dvpa.server.config import ServeConfig
from dvpa.server.errors import ApiError
from dvpa.server.reports import find_report, read_report
from dvpa.tiers.policy import Decision, Policy, tier_index
from dvpa.tiers.record import TelemetryRecord
from dvpa.tiers.tier_map import TierMap

logger = logging.getLogger(__name__)
REPORT_S = 1.0  # how often a replica reports
ABSENT_S = 10.0  # one that has not for so long no longer counts
ADOPT_S = 5.0  # how long a reload waits for the replicas to take it over
LOST = "the engine replica that was answering is gone"
_NOW = ("running", "waiting", "max_queue", "kv_pages_used", "kv_pages")
_SINCE_START = (
    *("preemptions", "prefix_queries", "prefix_hits", "steps", "failed"),
    *("escalations", "degraded", "drafted", "accepted"),
)


@dataclass(frozen=True)
class Report:
    """How a replica is. `tier_map`: the digest of the one it decides by."""

    replica: str
    pid: int
    stats: EngineStats
    tier_map: str


@dataclass(frozen=True)
class Orders:
    """What a replica is told: which gateway there is, to decide by another map, to end everything.

    Requests of an earlier gateway are to be ended, too: Ray does not do so when a caller dies.
    """

    gateway: str
    tier_map: TierMap | None = None
    cancels: bool = False


def digest(tier_map: TierMap) -> str:
    """The same for equal maps."""
    return hashlib.sha256(tier_map.to_json().encode()).hexdigest()


async def batches(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[list[Piece], None]:
    """All pieces that have come since the last time: a message between processes costs far more."""
    waiting: list[Piece] = []
    news = asyncio.Event()

    async def pump() -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    waiting.append(piece)
                    news.set()
        finally:
            news.set()

    task = asyncio.ensure_future(pump())
    try:
        while True:
            if waiting:
                batch = list(waiting)
                waiting.clear()
                yield batch
            elif task.done():
                task.result()  # raises what ended it
                return
            else:
                news.clear()
                await news.wait()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def model_info(checkpoint: Path, config: ServeConfig) -> ModelInfo:
    """Everything about a checkpoint but its weights.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one that is not sound.
    """
    model_config = read_config(checkpoint)
    cost = price(model_config)
    costs = [float(tier.activated_params) for tier in cost.tiers]
    tier_map = TierMap.untrained(model_config.tier_names, costs)
    if (checkpoint / TIER_MAP_FILE).is_file():
        tier_map = TierMap.load(checkpoint / TIER_MAP_FILE)
    tokenizer = None
    if (checkpoint / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, split_special_tokens=True)
    report = find_report(checkpoint, config.report)
    return ModelInfo(
        name=config.model_name or checkpoint.name,
        config=model_config,
        price=cost,
        tier_map=tier_map,
        tokenizer=tokenizer,
        report=None if report is None else read_report(report),
    )


class RayBackend:
    """A `Backend` over the replicas behind a Ray Serve handle.

    Args:
        engines: handle of the `EngineReplica` deployment.
    """

    def __init__(self, engines: Any, info: ModelInfo, config: ServeConfig) -> None:
        self.info = info
        self._engines = engines
        self._name = uuid.uuid4().hex
        self._config = config
        self._policy = Policy(info.tier_map)
        self._admission: Admission | None = None
        self._reports: dict[str, tuple[float, Report]] = {}  # of dead replicas, too: for the sums
        self._to_cancel: set[str] = set()
        self._sessions: OrderedDict[str, int] = OrderedDict()
        self._num_running = 0  # completions
        self._num_lost = 0

    # -- replicas ---------------------------------------------------------------------------------

    def hear(self, report: Report) -> Orders:
        """Take in a report; what the replica is to do."""
        self._reports[report.replica] = (time.monotonic(), report)
        if self._admission is None:
            engine = self._config.engine
            self._admission = Admission(
                self.info.config,
                engine,
                self._policy,
                self.info.tokenizer,
                report.stats.kv_pages * engine.page_size,
                lambda: 0.0,
            )
        cancels = report.replica in self._to_cancel
        self._to_cancel.discard(report.replica)
        is_current = report.tier_map == digest(self.info.tier_map)
        return Orders(self._name, None if is_current else self.info.tier_map, cancels)

    def live(self) -> list[Report]:
        """Reports of the replicas that have been heard of lately."""
        since = time.monotonic() - ABSENT_S
        return [report for when, report in self._reports.values() if when >= since]

    @property
    def capacity(self) -> int:
        """Completions that may run or wait, over all replicas."""
        engine = self._config.engine
        return len(self.live()) * (engine.max_num_seqs + engine.max_queue)

    # -- Backend ----------------------------------------------------------------------------------

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        if self._admission is None:
            raise self._unavailable("no engine replica has started yet")
        self._admission.pair([list(token_ids)], params)

    async def stream(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str,
        after: After | None = None,
    ) -> AsyncGenerator[Piece, None]:
        from ray.exceptions import RayError, RayTaskError

        params, begin = self._keep_session(params), time.monotonic()
        made, open_choices = [0] * params.n, set(range(params.n))
        decision: Decision | None = None
        first: float | None = None

        def end(index: int, reason: str, error: str | None = None) -> Piece:
            record = self._record_of_lost(
                request_id, params, decision, len(token_ids), made[index], begin, first
            )
            return Piece(request_id, index, finish_reason=reason, error=error, telemetry=record)

        with self._admitted(params.n):
            for is_last_try in (False, True):
                answer = self._engines.options(stream=True).stream.remote(
                    list(token_ids), params, request_id, self._name
                )
                try:
                    async for pieces in answer:
                        first = first or time.monotonic()
                        for piece in pieces:
                            decision = piece.decision or decision
                            made[piece.index] += len(piece.token_ids)
                            if piece.finish_reason is not None:
                                open_choices.discard(piece.index)
                                self._remember(params, piece.telemetry)
                            yield piece
                    return
                except RayTaskError as error:
                    raise error.cause from None
                except RayError as error:
                    logger.warning("request %s: %s", request_id, type(error).__name__)
                    if first is None and is_last_try:
                        self._num_lost += 1
                        raise self._unavailable(LOST) from None
                    if first is not None:
                        break
                except (GeneratorExit, asyncio.CancelledError):
                    for index in sorted(open_choices if after is not None else ()):
                        after(end(index, "cancelled"))  # type: ignore[misc]
                    raise
                finally:
                    answer.cancel()  # of no effect on one that has ended
            self._num_lost += 1
            for index in sorted(open_choices):
                yield end(index, "error", LOST)

    async def route(
        self, token_ids: Sequence[int], params: SamplingParams, request_id: str
    ) -> TelemetryRecord:
        from ray.exceptions import RayError, RayTaskError

        with self._admitted(1):
            for _ in range(2):
                answer = self._engines.route.remote(list(token_ids), params, request_id)
                try:
                    record: TelemetryRecord = await answer
                    return record
                except RayTaskError as error:
                    raise error.cause from None
                except RayError as error:
                    logger.warning("request %s: %s", request_id, type(error).__name__)
                finally:
                    answer.cancel()
            raise self._unavailable(LOST)

    async def stats(self) -> EngineStats:
        live = [report.stats for report in self.live()]
        ever = [report.stats for _, report in self._reports.values()]
        sums = {name: sum(getattr(one, name) for one in live) for name in _NOW}
        sums |= {name: sum(getattr(one, name) for one in ever) for name in _SINCE_START}
        sums["failed"] += self._num_lost
        decisions: Counter[str] = Counter()
        for one in ever:
            decisions.update(one.decisions)
        resident = [one.resident_bytes for one in live if one.resident_bytes is not None]
        return EngineStats(
            **sums, decisions=dict(decisions), resident_bytes=sum(resident) if resident else None
        )

    async def set_tier_map(self, tier_map: TierMap) -> None:
        names = self.info.config.tier_names
        if list(tier_map.tier_names) != list(names):
            raise ValueError(
                f"tier_map: its tiers {list(tier_map.tier_names)} are not the model's {names}"
            )
        self.info = replace(self.info, tier_map=tier_map)
        self._policy.tier_map = tier_map
        wanted, end = digest(tier_map), time.monotonic() + ADOPT_S
        while any(report.tier_map != wanted for report in self.live()):
            if time.monotonic() > end:
                logger.warning("not every replica has taken over the tier map yet")
                break
            await asyncio.sleep(REPORT_S / 10)

    async def cancel_all(self) -> None:
        self._to_cancel = {report.replica for report in self.live()}

    async def close(self) -> None:
        """Nothing to give back: the replicas belong to Ray Serve."""

    # -- inside -----------------------------------------------------------------------------------

    @contextmanager
    def _admitted(self, count: int) -> Iterator[None]:
        """Places for `count` completions. QueueFull: all taken; ApiError 503: no replica."""
        capacity = self.capacity
        if not capacity:
            raise self._unavailable("no engine replica is alive")
        if self._num_running + count > capacity:
            raise QueueFull(f"queue: {self._num_running} of {capacity} places are taken")
        self._num_running += count
        try:
            yield
        finally:
            self._num_running -= count

    def _keep_session(self, params: SamplingParams) -> SamplingParams:
        """With the tier that the session has had as the lowest, up to the highest allowed."""
        session, names = params.session_id, self.info.config.tier_names
        if session is None or params.tier != "auto" or not self._config.engine.session_affinity:
            return params
        lowest = self._sessions.get(session, 0)
        if params.min_tier is not None:
            lowest = max(lowest, tier_index(params.min_tier, names))
        if params.max_tier is not None:
            lowest = min(lowest, tier_index(params.max_tier, names))
        return replace(params, min_tier=lowest) if lowest else params

    def _remember(self, params: SamplingParams, record: TelemetryRecord | None) -> None:
        session = params.session_id
        if session is None or params.tier != "auto" or record is None:
            return
        self._sessions[session] = max(self._sessions.pop(session, 0), record.tier)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)

    def _record_of_lost(
        self,
        request_id: str,
        params: SamplingParams,
        decision: Decision | None,
        prompt_tokens: int,
        made: int,
        begin: float,
        first: float | None,
    ) -> TelemetryRecord:
        """What is known of a completion whose replica has died; its FLOPs are estimated."""
        tiers, now = self.info.price.tiers, time.monotonic()
        tier = self.info.tier_map.default_tier if decision is None else decision.tier
        tier_tokens = [0] * len(tiers)
        tier_tokens[tier] = made
        return TelemetryRecord(
            request_id=request_id,
            tier=tier,
            tier_name=tiers[tier].name,
            difficulty=None if decision is None else decision.difficulty,
            success_by_tier=() if decision is None else decision.success_by_tier,
            decided_by="fallback" if decision is None else decision.decided_by,
            thresholds=() if decision is None else decision.thresholds,
            activated_params=tiers[tier].activated_params,
            flops=float(tiers[tier].flops_per_token * (prompt_tokens / params.n + made)),
            prompt_tokens=prompt_tokens,
            completion_tokens=made,
            tier_tokens=tuple(tier_tokens),
            escalations=0,
            queue_ms=0.0,
            score_ms=0.0,
            ttft_ms=1000 * ((first or now) - begin),
            total_ms=1000 * (now - begin),
        )

    def _unavailable(self, why: str) -> ApiError:
        return ApiError(
            503,
            f"{why}; try again later",
            code="no_replica",
            reason="no_replica",
            headers={"Retry-After": str(self._config.retry_after_s)},
        )
