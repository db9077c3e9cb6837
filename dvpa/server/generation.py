"""/v1/completions and /v1/chat/completions, whole and streamed."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

from anyio import CancelScope
from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from dvpa.server.answers import ChatCompletion, Completion
from dvpa.server.errors import ApiError, sse_error
from dvpa.server.job import Disconnected, Job, Numbered, unless_gone
from dvpa.server.lifecycle import Server
from dvpa.server.openapi import ERRORS, STREAM
from dvpa.server.options import SESSION_HEADER, sampling_params
from dvpa.server.schemas import ChatCompletionRequest, CompletionRequest, StreamOptions
from dvpa.server.shapes import ChatShape, CompletionShape, Shape

router = APIRouter(tags=["inference"])
DONE = b"data: [DONE]\n\n"
PING_S = 15
SEND_TIMEOUT_S = 60.0  # a client that reads nothing for so long is gone
CLIENT_GONE = 499  # nginx's word for it; nobody receives it
SessionId = Annotated[
    str | None,
    Header(
        alias=SESSION_HEADER,
        min_length=1,
        max_length=128,
        pattern=r"^[\x21-\x7e]+$",
        description="requests of a session never go below a tier it has had",
    ),
]


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses={**ERRORS, 200: {"model": Completion, **STREAM}},
)
async def completions(
    body: CompletionRequest, request: Request, session_id: SessionId = None
) -> Response:
    """Complete one prompt or several. Stream: one chunk per step, then `[DONE]`."""
    server: Server = request.app.state.server
    async with AsyncExitStack() as stack:
        stack.enter_context(server.working())
        params = sampling_params(body, server.backend.info, server.config, session_id)
        given = body.prompt
        many = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        prompts = [
            await server.prompts.encode(one) if isinstance(one, str) else one for one in many
        ]
        if body.stream and body.echo and body.logprobs is not None:
            raise ApiError(400, "echo: with logprobs it cannot be streamed", param="echo")
        job = _job(server, request, body, prompts, params, "cmpl")
        shape = CompletionShape(
            job,
            server.prompts,
            logprobs=body.logprobs,
            echo=[one if isinstance(one, str) else None for one in many] if body.echo else None,
            drops_output=body.max_tokens == 0,
            skip_special_tokens=params.skip_special_tokens,
        )
        return await _answer(job, shape, body.stream_options, request, stack.pop_all())


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={**ERRORS, 200: {"model": ChatCompletion, **STREAM}},
)
async def chat_completions(
    body: ChatCompletionRequest, request: Request, session_id: SessionId = None
) -> Response:
    """Answer a conversation. Stream: one chunk per step, then `[DONE]`."""
    server: Server = request.app.state.server
    async with AsyncExitStack() as stack:
        stack.enter_context(server.working())
        params = sampling_params(body, server.backend.info, server.config, session_id)
        prompt = await server.prompts.encode_chat(body.messages)
        job = _job(server, request, body, [prompt], params, "chatcmpl")
        shape = ChatShape(job, server.prompts, body.top_logprobs or 0 if body.logprobs else None)
        return await _answer(job, shape, body.stream_options, request, stack.pop_all())


def _job(
    server: Server,
    request: Request,
    body: CompletionRequest | ChatCompletionRequest,
    prompts: list[Any],
    params: Any,
    prefix: str,
) -> Job:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: needs stream: true", param="stream_options")
    options = body.dvpa
    return Job(
        server=server,
        request_id=f"{prefix}-{uuid.uuid4().hex}",
        endpoint=request.scope["route"].path,
        model=body.model or server.backend.info.name,
        prompts=prompts,
        params=params,
        is_stream=bool(body.stream),
        explains=options is not None and options.explain,
    )


async def _answer(
    job: Job, shape: Shape, options: StreamOptions | None, request: Request, held: AsyncExitStack
) -> Response:
    """The whole answer, or one that streams; `held` is let go when it has been sent."""
    async with held:
        job.check()
        pieces = job.pieces()
        held.push_async_callback(pieces.aclose)
        try:
            if not job.is_stream:
                await unless_gone(request, _gather(pieces, shape))
                return JSONResponse(shape.whole(int(time.time())), headers=job.headers())
            # With the first piece the tier is known, and so is what comes of the request at all.
            first = await unless_gone(request, anext(pieces))
        except Disconnected:
            return Response(status_code=CLIENT_GONE)
        has_usage = options is not None and options.include_usage
        return _Stream(_chunks(job, shape, first, pieces, has_usage), job.headers(), held.pop_all())


async def _gather(pieces: AsyncIterator[Numbered], shape: Shape) -> None:
    async for choice, piece in pieces:
        shape.take(choice, piece)


async def _chunks(
    job: Job, shape: Shape, first: Numbered, rest: AsyncIterator[Numbered], has_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events. A failure after the first of them is an event, too, and the last."""
    created = int(time.time())
    try:
        for chunk in shape.opening(created):
            yield _event(chunk)
        yield _event(shape.chunk(*first, created))
        async for choice, piece in rest:
            if piece.text or piece.logprobs or piece.finish_reason is not None:
                yield _event(shape.chunk(choice, piece, created))
    except ApiError as error:
        if not error.is_counted:
            job.server.rejected(job.endpoint, error.reason, error.status)
        yield f"data: {sse_error(error.status, error.message)}\n\n".encode()
    else:
        if has_usage:
            yield _event(shape.closing(created))
    yield DONE


class _Stream(EventSourceResponse):
    """Lets go of the request when the answer has been sent, or will not be: also unstarted."""

    def __init__(
        self, chunks: AsyncIterator[bytes], headers: dict[str, str], held: AsyncExitStack
    ) -> None:
        super().__init__(
            chunks,
            headers={**headers, "Cache-Control": "no-store"},
            ping=PING_S,
            send_timeout=SEND_TIMEOUT_S,
        )
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):  # a client that has left must not leave its request
                await self._held.aclose()


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
