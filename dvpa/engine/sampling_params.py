"""What a client may ask of one request: vLLM's sampling fields, then dvpa's own. No torch."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from dvpa.tiers.policy import tier_index

MAX_N = 1024
MAX_LOGPROBS = 20
MAX_DRAFT_LENGTH = 32
_MIN_TEMPERATURE = 1e-5  # below it, as in vLLM, a temperature means greedy

# field -> lowest, highest (None: no bound of its own), whether None is allowed
_WHOLE: dict[str, tuple[int, int | None, bool]] = {
    "n": (1, MAX_N, False),
    "top_k": (-1, None, False),
    "seed": (-(2**63), 2**63 - 1, True),
    "max_tokens": (1, None, True),
    "min_tokens": (0, None, False),
    "logprobs": (0, MAX_LOGPROBS, True),
    "prompt_logprobs": (0, MAX_LOGPROBS, True),
}
# The bounds vLLM leaves open (temperature, repetition_penalty) are here what fp32 can carry.
_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
}
_SWITCHES = (
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "allow_escalation",
    "allow_degradation",
)


@dataclass(frozen=True, kw_only=True)
class SpeculateParams:
    """Tier self-speculation: `draft_tier` (name or index) guesses `length` tokens per step.

    Raises:
        ValueError: a field is out of range.
    """

    draft_tier: int | str = 0
    length: int = 3

    def __post_init__(self) -> None:
        """Check both fields."""
        _check_tier("speculate.draft_tier", self.draft_tier)
        _check_whole("speculate.length", self.length, 1, MAX_DRAFT_LENGTH, False)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled, stopped and given its tier. Immutable and hashable.

    Names, meanings and defaults are vLLM's up to `skip_special_tokens`. `temperature` 0 is greedy
    (with n > 1: n equal copies), `top_k` 0 or -1 keeps all tokens, `max_tokens` None runs to the
    end of the context, `logprobs` and `prompt_logprobs` count the top alternatives, `logit_bias`
    maps a token id to what is added to its logit. `stop` may be given as one string.

    dvpa's own: `tier`, `max_tier` and `min_tier` are names or indices, `tier` "auto" leaves the
    choice to the policy; `quality` then asks for the cheapest tier with at least that share of the
    top tier's calibrated success (None: the tier map as fitted). `timeout_s`: deadline in seconds
    after arrival. `session_id`: the unit of affinity and fairness.

    Raises:
        ValueError: the first field that is wrong, with its value and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    # Out of the hash (a mapping has none), not out of ==.
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    skip_special_tokens: bool = True

    tier: int | str = "auto"
    max_tier: int | str | None = None
    min_tier: int | str | None = None
    quality: float | None = None
    allow_escalation: bool = True
    allow_degradation: bool = True
    timeout_s: float | None = None
    session_id: str | None = None
    speculate: SpeculateParams | None = None

    def __post_init__(self) -> None:
        """Freeze the collections, then check every field."""
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        for name, (low, high, optional) in _WHOLE.items():
            _check_whole(name, getattr(self, name), low, high, optional)
        for name, (lowest, highest) in _NUMBERS.items():
            value = getattr(self, name)
            if not (_is_number(value) and lowest <= value <= highest):
                raise ValueError(f"{name}: {value!r} must be a number in {lowest:g} .. {highest:g}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} must be true or false")
        if not (_is_number(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise ValueError(f"top_p: {self.top_p!r} must be a number above 0, at most 1")
        if self.quality is not None and not (
            _is_number(self.quality) and 0.0 <= self.quality <= 1.0
        ):
            raise ValueError(f"quality: {self.quality!r} must be null or a number in 0 .. 1")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: {self.min_tokens} must be in 0 .. max_tokens = {self.max_tokens}"
            )
        if self.timeout_s is not None and not (_is_number(self.timeout_s) and self.timeout_s > 0):
            raise ValueError(f"timeout_s: {self.timeout_s!r} must be a number of seconds above 0")
        if self.session_id is not None and not (
            isinstance(self.session_id, str) and self.session_id
        ):
            raise ValueError(f"session_id: {self.session_id!r} must be null or a non-empty string")
        _check_tier("tier", self.tier)
        for name in ("max_tier", "min_tier"):
            if getattr(self, name) is not None:
                _check_tier(name, getattr(self, name))
        if not isinstance(self.speculate, SpeculateParams | None):
            raise ValueError(f"speculate: {self.speculate!r} must be null or a SpeculateParams")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy through the constructor: the frozen mapping has no pickle of its own."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return _rebuild, ({**values, "logit_bias": dict(self.logit_bias)},)

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.temperature < _MIN_TEMPERATURE

    def check(self, vocab_size: int, tier_names: Sequence[str]) -> None:
        """What only the model can tell: token ids below `vocab_size`, and its tiers, base first.

        Raises:
            ValueError: a token id outside the vocabulary, an unknown tier, min_tier above
                max_tier, or a draft tier that no tier lies above.
        """
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise ValueError(
                        f"{name}: token id {token_id} must be in 0 .. {vocab_size - 1}"
                    )
        if self.tier != "auto":
            tier_index(self.tier, tier_names)
        highest, lowest = len(tier_names) - 1, 0
        if self.max_tier is not None:
            highest = tier_index(self.max_tier, tier_names, "max_tier")
        if self.min_tier is not None:
            lowest = tier_index(self.min_tier, tier_names, "min_tier")
        if lowest > highest:
            raise ValueError(
                f"min_tier: {self.min_tier!r} must not be above max_tier {self.max_tier!r}"
            )
        if self.speculate is not None:
            draft = tier_index(self.speculate.draft_tier, tier_names, "speculate.draft_tier")
            if draft == len(tier_names) - 1:
                raise ValueError(
                    f"speculate.draft_tier: {self.speculate.draft_tier!r} must be below the top "
                    f"tier ({tier_names[-1]}), or there is nothing to verify with"
                )


def _rebuild(values: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**values)


def _is_number(value: Any) -> bool:
    # Compared, not isfinite(): a whole number too large for a float is a wrong value, not a crash.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -sys.float_info.max <= value <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_whole(name: str, value: Any, low: int, high: int | None, optional: bool) -> None:
    if value is None and optional:
        return
    if not _is_whole(value) or value < low or (high is not None and value > high):
        span = f"{low} or more" if high is None else f"in {low} .. {high}"
        null = "null or " if optional else ""
        raise ValueError(f"{name}: {value!r} must be {null}a whole number, {span}")


def _check_tier(name: str, value: Any) -> None:
    if not (isinstance(value, str) and value) and not (_is_whole(value) and value >= 0):
        raise ValueError(f"{name}: {value!r} must be a tier's name or its index, 0 or more")


def _strings(name: str, value: Any) -> tuple[str, ...]:
    values = _as_tuple(name, (value,) if isinstance(value, str) else value, "strings")
    for text in values:
        if not (isinstance(text, str) and text):
            raise ValueError(f"{name}: {text!r} must be a non-empty string")
    return values


def _token_ids(value: Any) -> tuple[int, ...]:
    values = _as_tuple("stop_token_ids", value, "token ids")
    for token_id in values:
        _check_whole("stop_token_ids", token_id, 0, None, False)
    return values


def _as_tuple(name: str, value: Any, of_what: str) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name}: {value!r} must be a sequence of {of_what}")
    return tuple(value)


def _biases(value: Any) -> Mapping[int, float]:
    """A frozen copy; ids may come as decimal strings, the only keys JSON has."""
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias: {value!r} must map token ids to numbers")
    frozen: dict[int, float] = {}
    for key, bias in value.items():
        is_text = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10
        token_id = int(key) if is_text else key
        _check_whole("logit_bias", token_id, 0, None, False)
        if not (_is_number(bias) and -100.0 <= bias <= 100.0):
            raise ValueError(
                f"logit_bias: {bias!r} of token {token_id} must be a number in -100 .. 100"
            )
        frozen[token_id] = float(bias)
    return MappingProxyType(frozen)
