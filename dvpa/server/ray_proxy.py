"""Loaded by Ray Serve's HTTP proxies: one x-request-id per answer, ours. Imports nothing heavy.

Their own middleware adds an id of theirs, after the application's; usage, logs and telemetry know
the application's only.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLBACK = f"{__name__}:middlewares"
HEADER = b"x-request-id"


def middlewares() -> list[Middleware]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is to name."""
    return [Middleware(OneRequestId)]


class OneRequestId:
    """Keeps the first x-request-id of an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.lower(), value) for name, value in message["headers"]]
                first = next((h for h in headers if h[0] == HEADER), None)
                message["headers"] = [h for h in headers if h[0] != HEADER or h is first]
            await send(message)

        await self._app(scope, receive, sending)
