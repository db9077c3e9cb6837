"""loading -> ready -> draining: what the server may do when, and what it holds."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dvpa.engine import Piece, SamplingParams
from dvpa.server.backend import Backend
from dvpa.server.config import ServeConfig
from dvpa.server.errors import ApiError
from dvpa.server.prompts import Prompts
from dvpa.server.shadow import Shadows
from dvpa.server.telemetry import Finished, Telemetry
from dvpa.server.tracing import Tracing
from dvpa.tiers.tier_map import TierMap

LOADING, READY, DRAINING, FAILED = "loading", "ready", "draining", "failed"
POLL_S = 0.05


class Server:
    """State of one server process; used from its event loop only.

    Args:
        tier_map_file: what `reload_tier_map` reads; None: it cannot.
    """

    def __init__(self, config: ServeConfig, tier_map_file: Path | None = None) -> None:
        self.config = config
        self.state = LOADING
        self.started = time.time()
        self.num_active = 0  # requests that are being answered
        self.num_early = 0  # refused before there was a model
        self._tier_map_file = tier_map_file
        self._tracing = Tracing(config.otel_endpoint is not None, config.otel_endpoint)
        self._backend: Backend | None = None
        self._telemetry: Telemetry | None = None
        self._prompts: Prompts | None = None
        self._shadows: Shadows | None = None

    def ready(self, backend: Backend) -> None:
        """The model is there: requests are let in from now on."""
        info = backend.info
        self._backend = backend
        self._telemetry = Telemetry(
            info, size=self.config.telemetry_size, access_log=self.config.access_log
        )
        self._prompts = Prompts(info.tokenizer, info.config.max_position_embeddings)
        if self.config.shadow_share:
            self._shadows = Shadows(backend, self._telemetry, self.config.shadow_share)
        if self.state == LOADING:
            self.state = READY

    @property
    def backend(self) -> Backend:
        """Whatever runs the model. ApiError 503 while there is none."""
        if self._backend is None:
            raise self._not_now("the model is still loading", LOADING)
        return self._backend

    @property
    def telemetry(self) -> Telemetry:
        """ApiError 503 while there is no model to tell of."""
        if self._telemetry is None:
            raise self._not_now("the model is still loading", LOADING)
        return self._telemetry

    @property
    def prompts(self) -> Prompts:
        """ApiError 503 while there is no tokenizer."""
        if self._prompts is None:
            raise self._not_now("the model is still loading", LOADING)
        return self._prompts

    def finished(self, event: Finished) -> None:
        """A completion has ended."""
        self.telemetry.finished(event)
        self._tracing.finished(event)

    def shadow(self, prompt: Sequence[int], params: SamplingParams, piece: Piece) -> None:
        """A routed completion has ended well: perhaps every tier is to answer it again."""
        if self._shadows is not None and self.state == READY:
            self._shadows.offer(prompt, params, piece)

    @property
    def is_full(self) -> bool:
        """Whether one more request would be refused: then it need not even be looked at."""
        capacity = 0 if self._backend is None else self._backend.capacity
        return 0 < capacity <= self.num_active

    def rejected(self, endpoint: str, reason: str, status: int) -> None:
        """Count an answer with an error."""
        if self._telemetry is None:
            self.num_early += 1
        else:
            self._telemetry.rejected(endpoint, reason, status)

    @contextmanager
    def working(self) -> Iterator[None]:
        """A request that drain waits for. ApiError 503 unless the server is ready."""
        if self.state != READY:
            why = {
                LOADING: "the model is still loading",
                DRAINING: "the server is shutting down",
                FAILED: "the model could not be loaded",
            }[self.state]
            raise self._not_now(why, self.state)
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1

    async def drain(self) -> bool:
        """Let in nobody, wait for whoever is in, then cancel the rest. True if nobody was left."""
        self.state = DRAINING
        if self._shadows is not None:
            await self._shadows.close()
        end = time.monotonic() + self.config.drain_s
        while self.num_active and time.monotonic() < end:
            await asyncio.sleep(POLL_S)
        is_clean = self.num_active == 0
        if not is_clean and self._backend is not None:
            await self._backend.cancel_all()
            for _ in range(100):  # their answers still have to be sent
                if not self.num_active:
                    break
                await asyncio.sleep(POLL_S)
        return is_clean

    async def reload_tier_map(self) -> TierMap:
        """Decide by the file as it is now; the old map stays if it is not sound.

        Raises:
            ApiError: 409 for a file that is missing, invalid or another model's.
        """
        backend = self.backend
        if self._tier_map_file is None:
            raise ApiError(409, "this server has no tier_map.json to read", reason="reload_failed")
        try:
            tier_map = await asyncio.to_thread(TierMap.load, self._tier_map_file)
            await backend.set_tier_map(tier_map)
        except (OSError, ValueError) as error:
            # Its name is enough: where it lies is nobody's business.
            reason = str(error).replace(f"{self._tier_map_file}", self._tier_map_file.name)
            raise ApiError(
                409, f"the tier map in use stays: {reason}", reason="reload_failed"
            ) from None
        self.telemetry.set_tier_map(tier_map)
        return tier_map

    async def close(self) -> None:
        """Give the model back."""
        if self._shadows is not None:
            await self._shadows.close()
        if self._backend is not None:
            await self._backend.close()
        await asyncio.to_thread(self._tracing.close)

    def _not_now(self, why: str, reason: str) -> ApiError:
        return ApiError(
            503,
            f"{why}; try again later",
            code=reason,
            reason=reason,
            headers={"Retry-After": str(self.config.retry_after_s)},
        )
