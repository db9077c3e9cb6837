"""From a request to sampling parameters, and from a decision to headers: the tier contract."""

from collections.abc import Mapping
from typing import Any

from dvpa.engine import SamplingParams
from dvpa.server.backend import ModelInfo
from dvpa.server.config import ServeConfig
from dvpa.server.errors import ApiError, bad_field
from dvpa.server.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DvpaOptions,
    Sampling,
)
from dvpa.tiers.policy import Decision, tier_index
from dvpa.tiers.record import TelemetryRecord

SCHEMA_VERSION = "1"
AUTO = "auto"
ALIAS = "dvpa-"
SESSION_HEADER = "x-dvpa-session-id"
# Taken over as they are where the client gave them.
_SAME_NAME = (
    *("frequency_penalty", "presence_penalty", "seed", "temperature", "top_p"),
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"),
    *("skip_special_tokens", "include_stop_str_in_output", "logit_bias"),
)
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


def alias(tier_name: str) -> str:
    """The model name that asks for a tier."""
    return ALIAS + tier_name


def tier_of_model(model: str | None, info: ModelInfo) -> int | None:
    """The tier that a model name asks for; None: the policy decides.

    Raises:
        ApiError: 404 for a name that is not served.
    """
    if model is None or model in (info.name, alias(AUTO)):
        return None
    for tier, name in enumerate(info.config.tier_names):
        if model == alias(name):
            return tier
    names = [info.name, alias(AUTO), *map(alias, info.config.tier_names)]
    raise ApiError(
        404,
        f"model: {model[:80]!r} is not served here; there are {', '.join(names)}",
        param="model",
        code="model_not_found",
        reason="not_found",
    )


def tier_fields(model: str | None, options: DvpaOptions | None, info: ModelInfo) -> dict[str, Any]:
    """`tier`, `max_tier`, `min_tier` and `quality` of the sampling parameters.

    Raises:
        ApiError: 400 or 404 for what cannot be had, naming the field.
    """
    names = info.config.tier_names
    options = options or DvpaOptions()
    asked = tier_of_model(model, info)
    try:
        tier: int | None = None
        if options.tier not in (None, AUTO):
            tier = tier_index(options.tier, names, "dvpa.tier")
        if tier is not None and asked is not None and tier != asked:
            raise ValueError(
                f"dvpa.tier: {options.tier!r} is not the tier of the model asked for, {model!r}"
            )
        tier = asked if tier is None else tier
        highest = len(names) - 1
        if options.max_tier is not None:
            highest = tier_index(options.max_tier, names, "dvpa.max_tier")
        if options.budget is not None:
            highest = min(highest, _within(options.budget, info))
        lowest = 0
        if options.min_tier is not None:
            lowest = tier_index(options.min_tier, names, "dvpa.min_tier")
        if lowest > highest:
            raise ValueError(
                f"dvpa.min_tier: {options.min_tier!r} is above what max_tier or budget allow "
                f"({names[highest]})"
            )
        if options.quality is not None and not info.tier_map.calibration:
            raise ValueError(
                f"dvpa.quality: {options.quality} cannot be had, the tier map has no calibration; "
                "use tier, max_tier or budget"
            )
    except ValueError as error:
        raise bad_field(error) from None
    return {
        "tier": AUTO if tier is None else tier,
        "max_tier": None if highest == len(names) - 1 else highest,
        "min_tier": lowest or None,
        "quality": options.quality,
    }


def _within(budget: float, info: ModelInfo) -> int:
    """The highest tier that activates at most this share of the top tier's parameters."""
    fitting = [tier for tier, cost in enumerate(info.price.tiers) if cost.ratio_to_top <= budget]
    if not fitting:
        base = info.price.tiers[0]
        raise ValueError(
            f"dvpa.budget: {budget} is below the {base.name} tier's {base.ratio_to_top:.3f}"
        )
    return max(fitting)


def sampling_params(
    body: Sampling, info: ModelInfo, config: ServeConfig, session_id: str | None = None
) -> SamplingParams:
    """What the engine is asked for. `max_tokens` 0 becomes 1: the caller drops that token.

    Raises:
        ApiError: 400 or 404, naming the field.
    """
    values: dict[str, Any] = {
        name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None
    }
    if body.stop is not None:
        values["stop"] = body.stop
    values |= tier_fields(body.model, body.dvpa, info)
    values["n"] = _at_most("n", body.n or 1, config.max_n)
    values["max_tokens"] = _max_tokens(body, config)
    values["timeout_s"] = config.request_timeout_s
    values["session_id"] = session_id
    if isinstance(body, CompletionRequest):
        values["logprobs"] = body.logprobs
        if body.echo and body.logprobs is not None:
            values["prompt_logprobs"] = body.logprobs
    elif isinstance(body, ChatCompletionRequest):
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
        values["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise bad_field(error) from None


def _max_tokens(body: Sampling, config: ServeConfig) -> int | None:
    wanted = body.max_tokens
    if isinstance(body, ChatCompletionRequest):
        if body.max_completion_tokens is not None:
            if wanted is not None and wanted != body.max_completion_tokens:
                raise ApiError(
                    400, "max_tokens: differs from max_completion_tokens", param="max_tokens"
                )
            wanted = body.max_completion_tokens
        if wanted == 0:
            raise ApiError(400, "max_tokens: 0 must be 1 or more", param="max_tokens")
    else:
        assert isinstance(body, CompletionRequest)
        wanted = COMPLETION_TOKENS if wanted is None else wanted
        if wanted == 0 and not body.echo:
            raise ApiError(400, "max_tokens: 0 needs echo: true", param="max_tokens")
        wanted = max(1, wanted)
    if config.max_output_tokens is None:
        return wanted
    if wanted is None:
        return config.max_output_tokens
    return _at_most("max_tokens", wanted, config.max_output_tokens)


def _at_most(name: str, value: int, highest: int) -> int:
    if value > highest:
        raise ApiError(400, f"{name}: {value} must be at most {highest} here", param=name)
    return value


def tier_headers(record: TelemetryRecord | Decision, request_id: str) -> dict[str, str]:
    """The answer's `x-dvpa-*` headers: numbers and fixed words only, never prose."""
    difficulty = "" if record.difficulty is None else f"{record.difficulty:.4f}"
    return {
        "x-dvpa-schema-version": SCHEMA_VERSION,
        "x-dvpa-tier": record.tier_name,
        "x-dvpa-difficulty": difficulty,
        "x-dvpa-decided-by": record.decided_by,
        "x-request-id": request_id,
    }


def explain(record: Mapping[str, Any], info: ModelInfo) -> str:
    """One sentence for people: why this tier."""
    name, difficulty = record["tier_name"], record["difficulty"]
    score = "no usable difficulty" if difficulty is None else f"difficulty {difficulty:.3f}"
    success = record["success_by_tier"]
    odds = ""
    if success:
        shares = (f"{t} {p:.2f}" for t, p in zip(info.config.tier_names, success, strict=True))
        odds = f"; calibrated success: {', '.join(shares)}"
    reasons = {
        "tier_map": f"{score}: the tier map gives {name}",
        "override": f"the request named {name}",
        "cap": f"{score}: moved to {name} by the request's or the session's bounds",
        "load": f"{score}: lowered to {name}, the server is busy",
        "escalation": f"{score}: raised to {name} while decoding, it was unsure",
        "fallback": f"{score}: {name} is the fallback",
    }
    cuts = record["thresholds"]
    where = f" (cuts {', '.join(f'{cut:.3f}' for cut in cuts)})" if cuts else ""
    return reasons[record["decided_by"]] + where + odds
