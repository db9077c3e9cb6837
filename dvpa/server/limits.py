"""What a request must pass before any route sees it: API key, size and speed of its body.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide disconnects from streaming answers. The body
is read here, whole, since a limit that strikes while FastAPI reads would come out as a 400.
"""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dvpa.engine.trace import trace
from dvpa.server.config import ServeConfig
from dvpa.server.errors import error_response
from dvpa.server.lifecycle import Server

logger = logging.getLogger(__name__)
OPEN_PATHS = {"/", "/health", "/ready", "/openapi.json"}
OPEN_PREFIX = "/static/"
GENERATING = {"/v1/completions", "/v1/chat/completions", "/v1/dvpa/route"}
METRICS, HEALTH = "/metrics", "/health"
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


def is_open(path: str, config: ServeConfig) -> bool:
    """Whether a path is answered without a key."""
    if path == METRICS:
        return not config.metrics_need_key
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


class Keys:
    """The API keys, as digests: comparing takes as long whatever was sent."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether exactly one Authorization header is there, with a bearer token we know."""
        sent = [value for name, value in headers if name == b"authorization"]
        if len(sent) != 1:
            return False
        scheme, _, token = sent[0].partition(b" ")
        digest, found = _digest(token), False
        for known in self._digests:  # all of them, whichever it is
            found |= hmac.compare_digest(digest, known)
        return found and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Limits:
    """ASGI middleware, outside of everything but CORS."""

    def __init__(self, app: ASGIApp, server: Server, config: ServeConfig) -> None:
        self._app = app
        self._server = server
        self._config = config
        self._keys = Keys(config.api_keys)
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        self._num_open += 1
        try:
            if self._num_open > self._config.max_connections and scope["path"] != HEALTH:
                text = "too many requests are open; try again later"
                await self._refuse(scope, receive, answer, 503, "too_many", text)
                return
            await self._admit(scope, receive, answer)
        except Exception as error:
            logger.error("internal error: %s", trace(error))
            if answer.has_begun:  # it must not look as if it were whole
                raise BrokenOff(type(error).__name__) from None
            text = f"internal error: {type(error).__name__}"
            await self._refuse(scope, receive, answer, 500, "internal_error", text)
        finally:
            self._num_open -= 1

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            self._keys
            and not is_open(scope["path"], self._config)
            and not self._keys.allow(scope["headers"])
        ):
            await self._refuse(scope, receive, send, 401, "unauthorized", "no valid API key")
            return
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        body = await self._read(scope, receive, send)
        if body is None:
            return
        # Parsing and checking what will be refused anyway would take time from what runs.
        if self._server.is_full and scope["path"] in GENERATING:
            text = "the server is at its limit, try again later"
            await self._refuse(scope, receive, send, 429, "queue_full", text)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> bytes | None:
        """The whole body; None once it has been refused, or the client has gone."""
        limit = self._config.max_body_bytes
        too_large = f"the body must be at most {limit} bytes"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            await self._refuse(scope, receive, send, 413, "too_large", too_large)
            return None
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > limit:
                        await self._refuse(scope, receive, send, 413, "too_large", too_large)
                        return None
                    chunks.append(chunk)
                    more = message.get("more_body", False)
        except TimeoutError:
            text = f"the body must come within {self._config.body_timeout_s:g} s"
            await self._refuse(scope, receive, send, 408, "timeout", text)
            return None
        return b"".join(chunks)

    async def _refuse(
        self, scope: Scope, receive: Receive, send: Send, status: int, reason: str, text: str
    ) -> None:
        self._server.rejected("other", reason, status)
        headers = {"www-authenticate": "Bearer"} if status == 401 else {}
        if status in (408, 413):  # what is left of the body is not read
            headers["connection"] = "close"
        if status in (429, 503):
            headers["retry-after"] = str(self._config.retry_after_s)
        response = error_response(status, text, code=reason, headers=headers)
        await response(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then whatever comes: the disconnect."""
    is_sent = False

    async def replayed() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


class BrokenOff(RuntimeError):
    """An answer could not be finished; the server closes the connection."""


class _Answer:
    """What is sent, with the security headers; knows whether any of it has been."""

    def __init__(self, send: Send) -> None:
        self.has_begun = False
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)
