"""Admission: from what a client sends to a request that can run, or one clear error.

Prompts become token ids and are held against vocabulary, context and cache; the policy names the
tier where nothing has to be scored first.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from dvpa.config import DvpaConfig
from dvpa.engine.config import EngineConfig
from dvpa.engine.request import Request
from dvpa.engine.sampling_params import SamplingParams
from dvpa.tasks import encoding
from dvpa.tiers.policy import Decision, Policy, tier_index

Prompt = str | Sequence[int]
MAX_SESSIONS = 10_000  # whose tier is remembered


class Admission:
    """Makes requests, and decides tiers by policy and session.

    Args:
        model_config: vocabulary, context, tiers, whether there is a difficulty head.
        num_positions: what the latent cache holds.
        load: share of the waiting queue in use, 0 .. 1.
        prefetch: told of every tier that is decided, before its first token runs.
    """

    def __init__(
        self,
        model_config: DvpaConfig,
        config: EngineConfig,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase | None,
        num_positions: int,
        load: Callable[[], float],
        prefetch: Callable[[int], None] = lambda tier: None,
    ) -> None:
        self.policy = policy
        self._config = config
        self._tokenizer = tokenizer
        self._num_positions = num_positions
        self._load = load
        self._prefetch = prefetch
        self._tier_names = list(model_config.tier_names)
        self._vocab_size = model_config.vocab_size
        self._context = model_config.max_position_embeddings
        self._has_head = model_config.difficulty is not None
        self._sessions: OrderedDict[str, int] = OrderedDict()
        self._seeds = itertools.count(time.time_ns())

    def pair(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[tuple[list[int], SamplingParams]]:
        """Checked token ids and params of each prompt."""
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many = cast("Sequence[Prompt]", [prompts] if single else prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(many)
        if len(each) != len(many):
            raise ValueError(f"params: {len(each)} given for {len(many)} prompts")
        pairs = [(prompt, p or SamplingParams()) for prompt, p in zip(many, each, strict=True)]
        for _, one in pairs:
            one.check(self._vocab_size, self._tier_names)
            if one.quality is not None and one.tier == "auto":
                self.policy.check_quality(one.quality)
            if one.n > self._config.max_queue:
                raise ValueError(f"n: {one.n} must be at most max_queue = {self._config.max_queue}")
        return [(self.encode(prompt, one), one) for prompt, one in pairs]

    def encode(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """Token ids of a prompt that fits.

        Raises:
            ValueError: empty, unknown ids, longer than the context, more than the cache holds.
        """
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("prompt: must be token ids, the checkpoint has no tokenizer")
            if not prompt.strip():
                raise ValueError("prompt: must not be empty")
            token_ids = encoding.encode_prompt(self._tokenizer, prompt)
        else:
            token_ids = list(prompt)
        vocab_size = self._vocab_size
        if not token_ids:
            raise ValueError("prompt: must not be empty")
        for token_id in token_ids:
            if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise ValueError(f"prompt: token id {token_id!r} must be in 0 .. {vocab_size - 1}")
        context = self._context
        if len(token_ids) >= context:
            raise ValueError(
                f"prompt: {len(token_ids)} tokens must be fewer than the context of {context}"
            )
        room = self._num_positions
        if self._limit(len(token_ids), params) > room:
            raise ValueError(
                f"prompt, max_tokens: {len(token_ids)} and {params.max_tokens} tokens must fit the "
                f"cache of {room} positions (cache_bytes)"
            )
        return token_ids

    def _limit(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Prompt and output tokens together, at most."""
        if params.max_tokens is None:
            return self._context
        return min(self._context, num_prompt_tokens + params.max_tokens)

    def make_request(
        self,
        request_id: str,
        index: int,
        token_ids: list[int],
        params: SamplingParams,
        leader: Request | None = None,
    ) -> Request:
        """A request for one completion; its tier is decided unless the prompt is to be scored."""
        seed = next(self._seeds) if params.seed is None else params.seed + index
        request = Request(
            request_id,
            token_ids,
            params,
            seed,
            page_size=self._config.page_size,
            max_total_tokens=self._limit(len(token_ids), params),
            arrival=time.monotonic(),
            index=index,
            leader=leader,
            tier_tokens=[0] * len(self._tier_names),
        )
        if params.tier == "auto" and self._has_head:
            request.scores = True
        else:
            request.decision = self.decide(request, None)
            request.tier = request.decision.tier
        if params.speculate is not None:
            request.draft_tier = tier_index(params.speculate.draft_tier, self._tier_names)
            request.num_draft = params.speculate.length
        return request

    def decide(self, request: Request, difficulty: float | None) -> Decision:
        """The policy's decision, with the session's tier as a lower bound unless one is named."""
        params, names = request.params, self._tier_names
        min_tier = None if params.min_tier is None else tier_index(params.min_tier, names)
        has_session = params.session_id is not None and params.tier == "auto"
        if self._config.session_affinity and has_session:
            min_tier = max(min_tier or 0, self._sessions.get(params.session_id or "", 0))
            min_tier = min(min_tier, self.highest(params))
        # The map may have been replaced by one without calibration while the request waited.
        has_quality = params.tier == "auto" and bool(self.policy.tier_map.calibration)
        decision = self.policy.decide(
            difficulty,
            tier=params.tier,
            max_tier=params.max_tier,
            min_tier=min_tier,
            quality=params.quality if has_quality else None,
            load=self._load() if params.allow_degradation else 0.0,
        )
        self._prefetch(decision.tier)
        return decision

    def remember(self, request: Request) -> None:
        """The session's next request gets no lower tier than this one, which has ended, had."""
        session = request.params.session_id
        if session is None or request.params.tier != "auto" or request.decision is None:
            return
        if request.only_routes:  # asking is not having had
            return
        self._sessions[session] = max(self._sessions.pop(session, 0), request.tier)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)

    def may_degrade(self, params: SamplingParams, tier: int) -> bool:
        """Whether a request may go on at this tier when its own cannot be had."""
        names = self._tier_names
        lowest = 0 if params.min_tier is None else tier_index(params.min_tier, names)
        return self._config.allow_degradation and params.allow_degradation and tier >= lowest

    def highest(self, params: SamplingParams) -> int:
        """The highest tier the client allows."""
        names = self._tier_names
        return len(names) - 1 if params.max_tier is None else tier_index(params.max_tier, names)
