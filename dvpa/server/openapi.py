"""What every route can answer, for the OpenAPI document."""

from typing import Any

from dvpa.server.answers import ErrorAnswer

Responses = dict[int | str, dict[str, Any]]
_RETRY = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}


def _error(text: str, **more: Any) -> dict[str, Any]:
    return {"model": ErrorAnswer, "description": text, **more}


COMMON: Responses = {
    400: _error("a field is wrong; `param` names it"),
    401: _error("no valid API key"),
    408: _error("the body did not come in time"),
    413: _error("the body is too large"),
    503: _error("loading, shutting down, or the request came to nothing", headers=_RETRY),
}
NOT_SERVED: Responses = {404: _error("no such model")}
ERRORS: Responses = {
    **COMMON,
    **NOT_SERVED,
    429: _error("the queue is full", headers=_RETRY),
    500: _error("the model's state became non-finite, or an internal error"),
}
# One event, OpenAPI 3.2's way to describe a stream: older tools pass over the word.
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {"type": "string", "description": "a chunk as JSON, or [DONE]"},
        "event": {"type": "string"},
    },
}
STREAM: dict[str, Any] = {
    "description": "the completions; with `stream`, server-sent events that end with [DONE]",
    "content": {"text/event-stream": {"itemSchema": EVENT}},
    "headers": {
        name: {"description": text, "schema": {"type": "string"}}
        for name, text in {
            "x-dvpa-schema-version": "version of these headers and of `usage.dvpa`",
            "x-dvpa-tier": "name of the tier that the request starts at",
            "x-dvpa-difficulty": "score in [0, 1]; empty if none was read",
            "x-dvpa-decided-by": "tier_map, override, cap, load, escalation or fallback",
            "x-request-id": "the request's id, as in the telemetry",
        }.items()
    },
}
