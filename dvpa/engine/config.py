"""Settings of the engine. No torch."""

from dataclasses import dataclass

from dvpa.engine.escalation import EscalationParams

READ_PROMPT = ("tier", "base")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine runs; every field has a default that suits one CPU.

    Raises:
        ValueError: a field is out of range.
    """

    max_num_seqs: int = 32  # requests that run at the same time
    max_num_batched_tokens: int = 512  # positions in one step; longer prompts come in chunks
    max_queue: int = 1024  # requests that may wait; one more is refused
    page_size: int = 32  # positions in a page of the latent cache
    cache_bytes: int = 2**30  # room for the latent cache; less is taken where less is ever needed
    prefix_caching: bool = True  # keep pages of known prefixes until room is needed
    # Who reads a prompt that the policy routes: the chosen tier (only the probe layers read it at
    # the base tier too), or the base tier all of it, the chosen tier going on at its last token.
    read_prompt: str = "tier"
    session_affinity: bool = True  # a session never goes below the tier it has had
    allow_degradation: bool = True  # load may lower tiers, a missing expert group too
    degrade_from: float = 0.8  # share of the queue above which load does
    escalation: EscalationParams | None = None  # None: a running request keeps its tier
    max_resident_bytes: int | None = None  # experts beyond it stay on disk until they are needed

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_queue", "page_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {value!r} must be a whole number, 1 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} must be at least "
                f"max_num_seqs ({self.max_num_seqs})"
            )
        if self.cache_bytes < 1:
            raise ValueError(f"cache_bytes: {self.cache_bytes} must be 1 or more")
        if self.read_prompt not in READ_PROMPT:
            raise ValueError(
                f"read_prompt: {self.read_prompt!r} must be one of {', '.join(READ_PROMPT)}"
            )
        if not 0.0 <= self.degrade_from < 1.0:
            raise ValueError(f"degrade_from: {self.degrade_from} must be in [0, 1)")
        if self.max_resident_bytes is not None and self.max_resident_bytes < 1:
            raise ValueError(f"max_resident_bytes: {self.max_resident_bytes} must be 1 or more")
