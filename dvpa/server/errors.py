"""Every error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dvpa.engine import QueueFull
from dvpa.server.backend import RouteFailed

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
MAX_MESSAGE = 500  # what a client sent is quoted in part only


class ApiError(Exception):
    """An answer other than what was asked for. `reason` is what the metrics count it under.

    `is_counted`: a completion has ended this way, and the metrics have it already.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        reason: str = "bad_request",
        headers: Mapping[str, str] | None = None,
        is_counted: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.reason, self.headers = reason, dict(headers or {})
        self.is_counted = is_counted


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error."""
    text = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " ..."
    text, param = _sendable(text), None if param is None else _sendable(param)
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def _sendable(text: str) -> str:
    """Without lone surrogates, which JSON can bring but UTF-8 cannot carry."""
    return text.encode("utf-8", "replace").decode()


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error as an answer."""
    return JSONResponse(error_body(status, message, param, code), status, dict(headers or {}))


def bad_field(error: ValueError) -> ApiError:
    """A ValueError of ours ("field: value must be ...") as a 400 that names the field."""
    message = str(error)
    name = message.split(":", 1)[0]
    is_name = all(part.isidentifier() for part in name.replace(", ", ".").split("."))
    param = name.split(",")[0] if is_name else None
    code = "context_length_exceeded" if "must be fewer than the context" in message else None
    return ApiError(400, message, param=param, code=code)


def queue_full(error: QueueFull, retry_after_s: int) -> ApiError:
    """429, with when to come again."""
    return ApiError(
        429,
        f"the server is at its limit, try again in {retry_after_s} s ({error})",
        code="queue_full",
        reason="queue_full",
        headers={"Retry-After": str(retry_after_s)},
    )


def invalid_fields(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that is wrong with a body, and all unknown fields at once."""
    unknown = [_path(e) for e in errors if e["type"] == "extra_forbidden"]
    if unknown:
        names = ", ".join(sorted(set(unknown))[:20])
        return ApiError(400, f"unknown field {names}", param=unknown[0], code="unknown_field")
    # Of the alternatives of a union, the one that got farthest says most.
    error = max(errors, key=lambda e: len(e["loc"])) if errors else {"type": "", "loc": ()}
    path = _path(error)
    if error["type"] == "none_required":
        return ApiError(400, f"{path}: not supported", param=path, code="unsupported_field")
    if error["type"] == "missing":
        name = path or "body"
        return ApiError(400, f"{name}: must be given", param=name, code="missing_field")
    if error["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    message = str(error.get("msg", "not valid"))
    return ApiError(
        400, f"{path or 'body'}: {message[:1].lower()}{message[1:]}", param=path or None
    )


def _path(error: Mapping[str, Any]) -> str:
    """Where in the body, without the names of a union's alternatives."""
    parts = [part for part in error["loc"] if part != "body"]
    shown = [
        str(part)
        for part in parts
        if isinstance(part, int) or not any(mark in str(part) for mark in "[](),")
    ]
    kinds = {"str", "int", "float", "TextFormat", "constrained-str", "constrained-int", "none"}
    return ".".join(part for part in shown if part not in kinds)[:100]


def install(app: FastAPI) -> None:
    """Handlers for whatever a route raises; each rejection is counted with its reason."""

    def rejected(request: Request, reason: str, status: int) -> None:
        request.app.state.server.rejected(_endpoint(request), reason, status)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        if not error.is_counted:
            rejected(request, error.reason, error.status)
        return error_response(error.status, error.message, error.param, error.code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await api_error(request, invalid_fields(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        reason = {404: "not_found", 405: "not_found"}.get(error.status_code, "bad_request")
        rejected(request, reason, error.status_code)
        message = str(error.detail) if error.detail else HTTPStatus(error.status_code).phrase
        return error_response(error.status_code, message, headers=error.headers)

    @app.exception_handler(RouteFailed)
    async def route_failed(request: Request, error: RouteFailed) -> JSONResponse:
        rejected(request, "error", 503)
        return error_response(503, str(error), headers={"Retry-After": "1"})


def _endpoint(request: Request) -> str:
    """The route's path as declared; a path that is no route is not repeated."""
    route = request.scope.get("route")
    return getattr(route, "path", "other")


def sse_error(status: int, message: str) -> str:
    """An error as the data of a server-sent event."""
    return json.dumps(error_body(status, message))
