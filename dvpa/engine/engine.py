"""`Engine`: requests in, text and telemetry out; continuous batching of all tiers in one batch.

`add` queues a request, `step` moves all running ones on, `cancel` ends one; `generate` does a whole
list, `stream` is the asynchronous way. No knowledge of HTTP. A step is: schedule, run, apply.

One step runs at a time, in whatever thread asks for it. Requests may be added and cancelled from
any thread at any time.
"""

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dvpa.engine.admission import Admission, Prompt
from dvpa.engine.cache import make_cache
from dvpa.engine.config import EngineConfig
from dvpa.engine.group_cache import GroupUnavailable
from dvpa.engine.loading import load_model
from dvpa.engine.outputs import Gathering, Piece, RequestOutput
from dvpa.engine.progress import Progress
from dvpa.engine.request import Request, Segment
from dvpa.engine.runner import Runner, StepResult
from dvpa.engine.sampler import Sampler
from dvpa.engine.sampling_params import SamplingParams
from dvpa.engine.scheduler import QueueFull, Scheduler
from dvpa.engine.streams import Listener, Streams
from dvpa.engine.telemetry import record
from dvpa.engine.trace import trace
from dvpa.model.causal_lm import DvpaForCausalLM
from dvpa.pricing import price
from dvpa.tiers.policy import Policy
from dvpa.tiers.tier_map import TierMap

logger = logging.getLogger(__name__)


class Engine:
    """Serves one checkpoint.

    Args:
        model: a checkpoint folder, or a loaded model.
        tokenizer: needed for text; read from the folder where there is one.
        dtype: "bfloat16", "float16", "float32", a torch.dtype, or "auto" (as stored).
        device: "cpu", "cuda", ...; default: where the model is, CUDA if there is one.
        config: all settings at once, or single ones by name (see `EngineConfig`).

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one that is not sound; bad settings.
    """

    def __init__(
        self,
        model: str | Path | DvpaForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        config: EngineConfig | None = None,
        **settings: Any,
    ) -> None:
        self.config = replace(config or EngineConfig(), **settings)
        loaded = load_model(model, tokenizer, dtype, device, self.config.max_resident_bytes)
        self.model, self.tokenizer, self.store = loaded.model, loaded.tokenizer, loaded.store
        self.policy = Policy(
            self.model.tier_map,
            allow_degradation=self.config.allow_degradation,
            degrade_from=self.config.degrade_from,
        )
        self._price = price(self.model.config)
        eos = self.model.generation_config.eos_token_id
        eos_token_ids = frozenset([eos] if isinstance(eos, int) else eos or ())
        self.pages, cache = make_cache(
            self.model.config, self.config, self.model.dtype, self.model.device
        )
        self.runner = Runner(self.model, cache, None if self.store is None else self.store.experts)
        self.pages.on_allocate = self.runner.drop_page
        self.scheduler = Scheduler(
            self.pages,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            max_queue=self.config.max_queue,
            read_at_base=self.config.read_prompt == "base",
            prefix_caching=self.config.prefix_caching,
            has_probe=self.runner.has_reading,
        )
        self.admission = Admission(
            self.model.config,
            self.config,
            self.policy,
            self.tokenizer,
            self.pages.num_pages * self.pages.page_size,
            lambda: self.scheduler.load,
            (lambda tier: None) if self.store is None else self.store.prefetch,
        )
        self.progress = Progress(
            self.scheduler,
            self.runner,
            Sampler(sorted(eos_token_ids)),
            self._price,
            eos_token_ids,
            self.config.escalation,
            self.admission.decide,
            time.monotonic,
        )
        self.num_steps = 0
        self._requests: dict[str, list[Request]] = {}  # the n completions of each prompt
        self._listeners: dict[str, Listener] = {}
        self._in_flight: set[Request] = set()
        self._is_closed = False
        self._books = threading.RLock()  # scheduler, requests, listeners; never held for a pass
        self._one_step = threading.Lock()
        self._streams = Streams(self)

    # -- requests ---------------------------------------------------------------------------------

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        listener: Listener | None = None,
        only_routes: bool = False,
    ) -> str:
        """Queue a prompt (text or token ids) and return the request's id.

        `listener` is called with every `Piece`, from the thread that runs the step. With
        `only_routes` the request ends, with its telemetry, once its tier is decided.

        Raises:
            ValueError: an empty prompt or one that does not fit, an unknown token or tier, a
                request_id in use.
            QueueFull: the waiting queue is at its bound.
            RuntimeError: the engine is closed.
        """
        request_id = request_id or uuid.uuid4().hex
        [(token_ids, params)] = self.admission.pair([prompt], params)
        if only_routes:
            params = replace(params, n=1)
        with self._books:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            if request_id in self._requests:
                raise ValueError(f"request_id: {request_id!r} is in use")
            self.scheduler.check_room(params.n)
            requests: list[Request] = []
            for index in range(params.n):
                leader = requests[0] if requests else None
                requests.append(
                    self.admission.make_request(request_id, index, token_ids, params, leader)
                )
            self._requests[request_id] = requests
            if listener is not None:
                self._listeners[request_id] = listener
            for request in requests:
                self.progress.begin(request, self.tokenizer, self.admission.highest(params))
                self.scheduler.add(request)
                request.only_routes = only_routes
            if only_routes and not requests[0].scores:  # there is nothing to run
                self.progress.end(requests[0], "stop")
                self._deliver(requests)
        return request_id

    def cancel(self, request_id: str) -> bool:
        """End a request; its pages are free at once (after the step in flight, if it is in it).

        Returns False for one that has ended or never was.
        """
        with self._books:
            requests = list(self._requests.get(request_id, ()))
            for request in requests:
                if request.finish_reason is not None:
                    continue
                if request in self._in_flight:
                    request.cancel_wanted = True
                else:
                    self.progress.end(request, "cancelled")
            self._deliver(requests)
            return bool(requests)

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue; safe from any thread."""
        with self._books:
            return self.scheduler.num_waiting

    def step(self) -> list[Piece]:
        """Move all running requests on by one pass; the news of those that have any."""
        with self._one_step:
            with self._books:
                late = self.scheduler.expired(time.monotonic())
                for request in late:
                    self.progress.end(request, "timeout", "the deadline has passed")
                segments, preempted = self.scheduler.schedule()
                for request in preempted:
                    self.progress.lost_pages(request)
                now = time.monotonic()
                for segment in segments:
                    if segment.request.admitted is None:
                        segment.request.admitted = now
                in_step = [segment.request for segment in segments]
                self._in_flight = set(in_step)
            outcome: StepResult | Exception | None = None
            try:
                if segments:
                    outcome = self.runner.run(segments)
            except Exception as error:
                outcome = error
            except BaseException:
                with self._books:
                    self._in_flight = set()
                raise
            with self._books:
                self._in_flight = set()
                self.num_steps += 1
                self._conclude(segments, outcome)
                return self._deliver([*late, *in_step])

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete all prompts; one output per prompt, in order (`choices` has all `n`).

        params: one for all, or one for each. More prompts than the queue holds are queued as places
        become free.

        Raises:
            ValueError: as in `add`, or the numbers of prompts and params differ; nothing has run.
        """
        gatherings = [Gathering(ids, p) for ids, p in self.admission.pair(prompts, params)]
        waiting, unfinished, added = deque(gatherings), deque(gatherings), list[str]()
        # A backlog of our own is not load: it must not lower anyone's tier.
        few = int(self.config.degrade_from * self.config.max_queue)
        few = max(1, min(self.config.max_num_seqs, few))
        try:
            while unfinished:
                with suppress(QueueFull):  # the step makes room
                    while waiting and self.num_waiting < few:
                        first = waiting[0]
                        added.append(
                            self.add(first.prompt_token_ids, first.params, listener=first.take)
                        )
                        waiting.popleft()
                self.step()
                while unfinished and unfinished[0].is_done:
                    unfinished.popleft()
        except BaseException:
            for request_id in added:
                self.cancel(request_id)
            raise
        return [gathering.output() for gathering in gatherings]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        only_routes: bool = False,
        after: Listener | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of a completion as they come; leaving the loop early cancels the request.

        Any number of streams share the steps, which run in a thread of the engine's own. With
        `only_routes` there is one piece, whose telemetry says what the policy decided. `after` is
        called, in the event loop, with what comes once the loop has been left: the last pieces.

        Raises:
            ValueError, QueueFull: as in `add`.
        """

        def add(listener: Listener) -> tuple[str, int]:
            added = self.add(
                prompt, params, request_id=request_id, listener=listener, only_routes=only_routes
            )
            return added, 1 if only_routes or params is None else params.n

        return self._streams.stream(add, after)

    def set_tier_map(self, tier_map: TierMap) -> None:
        """Decide by this map from now on; requests that have their tier keep it.

        Raises:
            ValueError: its tiers are not the model's.
        """
        self.model.tier_map = tier_map
        self.policy.tier_map = tier_map

    def close(self) -> None:
        """Cancel everything and give back threads and files; the engine is not usable after it."""
        with self._books:
            self._is_closed = True
            for request_id in list(self._requests):
                self.cancel(request_id)
        self._streams.close()
        with self._one_step:
            if self.store is not None:
                self.store.close()

    # -- inside -----------------------------------------------------------------------------------

    def _conclude(
        self, segments: Sequence[Segment], outcome: StepResult | Exception | None
    ) -> None:
        """Take in a step. Whatever goes wrong ends the requests in it, and nothing else."""
        try:
            if isinstance(outcome, GroupUnavailable):
                config = self.model.config
                reach = [config.tier_units(tier) for tier in range(config.num_tiers)]
                self.progress.degrade(
                    segments,
                    max(tier for tier, units in enumerate(reach) if units <= outcome.group),
                    f"layer {outcome.layer}, expert group {outcome.group} cannot be read",
                    self.admission.may_degrade,
                )
            elif isinstance(outcome, Exception):
                self.progress.abandon(segments, outcome)
            elif outcome is not None:
                self.progress.apply(segments, outcome)
        except Exception as error:
            self.progress.abandon(segments, error)

    def _deliver(self, touched: Sequence[Request]) -> list[Piece]:
        """Pieces of these requests, to their listeners too; forgets the ones that have ended."""
        pieces = []
        for request in dict.fromkeys(touched):
            piece = self.progress.piece(request)
            if piece is None:
                continue
            if request.finish_reason is not None:
                piece = replace(piece, telemetry=record(request, self._price))
                self._forget(request)
            pieces.append(piece)
            self._tell(piece)
            if request.request_id not in self._requests:
                self._listeners.pop(request.request_id, None)
        return pieces

    def _tell(self, piece: Piece) -> None:
        """Call the listener; one that fails is not called again, and its request is given up."""
        listener = self._listeners.get(piece.request_id)
        try:
            if listener is not None:
                listener(piece)
        except Exception as error:
            logger.error("listener of request %s: %s", piece.request_id, trace(error))
            del self._listeners[piece.request_id]
            for request in self._requests.get(piece.request_id, ()):
                request.cancel_wanted = True

    def _forget(self, request: Request) -> None:
        siblings = self._requests[request.request_id]
        siblings.remove(request)
        if not siblings:
            del self._requests[request.request_id]
        self.admission.remember(request)
