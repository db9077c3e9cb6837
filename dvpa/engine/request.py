"""One request as the scheduler sees it: tokens, pages, tiers, progress. No tensors.

A request's tokens are its prompt and what it has generated; `num_computed` of them have valid cache
rows. `position_tiers[i]` is the tier that computed position i, or is to compute it again: it
outlives preemption, so recomputed rows are those the request had before.

Stages: a request whose tier the policy has yet to choose is `SCORING` (its prompt passes the trunk
and the probe layers at the base tier), then `READING` its prompt, then `DECODING`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from hashlib import blake2b
from math import inf

from dvpa.engine.sampling_params import SamplingParams
from dvpa.tiers.policy import Decision

FINISH_REASONS = ("stop", "length", "cancelled", "timeout", "error")


class Stage(Enum):
    """What a running request does next."""

    SCORING = auto()
    READING = auto()
    DECODING = auto()


class Part(Enum):
    """The layers a segment runs through."""

    WHOLE = auto()  # all of them, from the embedding to the logits
    PROBE = auto()  # trunk and probe layers at the base tier; their output is kept
    AFTER_PROBE = auto()  # the rest, when the chosen tier is the base tier
    AFTER_TRUNK = auto()  # all MoE layers, over the kept trunk output, when it is a higher one


@dataclass(frozen=True)
class Segment:
    """Consecutive positions of one request in one step.

    `tiers` one per position; `num_logits` of the last positions ask for next-token logits.
    """

    request: "Request"
    start: int
    token_ids: Sequence[int]
    tiers: Sequence[int]
    part: Part = Part.WHOLE
    num_logits: int = 0
    is_draft: bool = False  # a lower tier's guess; its cache rows are overwritten on verification

    @property
    def length(self) -> int:
        """Number of positions."""
        return len(self.token_ids)

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + self.length


@dataclass(eq=False)
class Request:
    """One completion in the making. Times are seconds of `time.monotonic`.

    `scores`: the difficulty head is to read the prompt, and the policy to choose the tier; `tier`
    then is only a promise until `decision` is there. `leader` is the request that reads the same
    prompt first, for the second and further of `n` completions. `only_routes`: it ends with the
    policy's decision, nothing is generated.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    page_size: int = 32
    max_total_tokens: int = 2**31  # prompt and output together
    arrival: float = 0.0
    index: int = 0
    scores: bool = False
    leader: "Request | None" = None
    only_routes: bool = False
    tier: int = 0
    decision: Decision | None = None

    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    position_tiers: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_probed: int = 0  # prompt positions that the probe layers have seen
    kept_from: int = 0  # positions kept_from .. kept_to have their trunk (or probe) output kept
    kept_to: int = 0
    draft_token_ids: list[int] = field(default_factory=list)
    draft_tier: int = 0
    num_draft: int = 0  # tokens to draft before verification; 0: no speculation

    admitted: float | None = None
    scored: float | None = None
    first_token: float | None = None
    finished: float | None = None
    finish_reason: str | None = None
    error: str | None = None
    num_escalations: int = 0
    num_preemptions: int = 0
    cached_tokens: int = 0  # prompt positions found in the prefix cache
    tier_tokens: list[int] = field(default_factory=list)  # tokens decoded at each tier
    flops: float = 0.0
    is_running: bool = False
    is_degraded: bool = False  # an expert group that its tier needs cannot be read
    cancel_wanted: bool = False
    page_keys: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def stage(self) -> Stage:
        """What it does next."""
        if self.scores and self.decision is None:
            return Stage.SCORING
        return Stage.READING if self.num_computed < self.num_tokens - 1 else Stage.DECODING

    @property
    def deadline(self) -> float:
        """When it is given up (infinity: never)."""
        return inf if self.params.timeout_s is None else self.arrival + self.params.timeout_s

    @property
    def speculates(self) -> bool:
        """Whether a lower tier drafts for it."""
        return self.num_draft > 0 and self.draft_tier < self.tier and bool(self.output_token_ids)

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids of positions start .. end - 1, prompt and output."""
        prompt = len(self.prompt_token_ids)
        if start >= prompt:
            return self.output_token_ids[start - prompt : end - prompt]
        return self.prompt_token_ids[start:end] + self.output_token_ids[: max(end - prompt, 0)]

    def tiers(self, start: int, end: int) -> list[int]:
        """The tier of each position start .. end - 1: as computed before, else the present one."""
        known = self.position_tiers[start:end]
        return known + [self.tier] * (end - start - len(known))

    def rewind(self, position: int, tier: int | None = None) -> None:
        """Forget the rows from `position` on; with a tier, they are to be computed at that one."""
        self.num_computed = min(self.num_computed, position)
        if tier is not None:
            del self.position_tiers[position:]
            del self.page_keys[position // self.page_size :]
            self.tier = tier

    def lower(self, tier: int) -> None:
        """Compute what is not computed yet at this tier at most."""
        start = self.num_computed
        self.position_tiers[start:] = [min(t, tier) for t in self.position_tiers[start:]]
        del self.page_keys[start // self.page_size :]
        self.draft_token_ids.clear()
        self.tier = min(self.tier, tier)

    def keys(self, num_pages: int) -> list[bytes]:
        """Prefix-cache keys of the first pages: a hash of all tokens and tiers up to each's end."""
        while len(self.page_keys) < num_pages:
            start = len(self.page_keys) * self.page_size
            end = start + self.page_size
            content = (self.tokens(start, end), self.tiers(start, end))
            parent = self.page_keys[-1] if self.page_keys else b""
            digest = blake2b(parent + repr(content).encode(), digest_size=16).digest()
            self.page_keys.append(digest)
        return self.page_keys[:num_pages]
