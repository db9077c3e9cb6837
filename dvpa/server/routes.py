"""Everything but generation: models, tokens, health, metrics, and what dvpa adds."""

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from dvpa.engine import QueueFull, SamplingParams
from dvpa.server import answers
from dvpa.server.errors import ApiError, bad_field, queue_full
from dvpa.server.job import Disconnected, unless_gone
from dvpa.server.lifecycle import READY, Server
from dvpa.server.openapi import COMMON, ERRORS, NOT_SERVED
from dvpa.server.options import AUTO, alias, explain, tier_fields, tier_of_model
from dvpa.server.reports import frontier, regions
from dvpa.server.schemas import DetokenizeRequest, Message, RouteRequest, TokenizeRequest

router = APIRouter()
MAX_TELEMETRY = 1000


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


# -- health and metrics -------------------------------------------------------------------------


@router.get("/health", tags=["operation"], response_model=answers.Health)
async def health() -> Any:
    """200 as long as the process answers: for liveness checks."""
    return {"status": "ok"}


@router.get(
    "/ready", tags=["operation"], response_model=answers.Health, responses={503: COMMON[503]}
)
async def ready(request: Request) -> Any:
    """200 if requests are let in, 503 while loading or shutting down: for load balancers."""
    with _server(request).working():
        return {"status": READY}


@router.get(
    "/metrics",
    tags=["operation"],
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        503: COMMON[503],
        401: COMMON[401],
    },
)
async def metrics(request: Request) -> Response:
    """Prometheus."""
    server = _server(request)
    stats = await server.backend.stats()
    return Response(server.telemetry.render(stats), media_type=CONTENT_TYPE_LATEST)


# -- models and tokens --------------------------------------------------------------------------


@router.get(
    "/v1/models",
    tags=["inference"],
    response_model=answers.Models,
    responses={401: COMMON[401], 503: COMMON[503]},
)
async def models(request: Request) -> Any:
    """The model by its own name and as dvpa-auto, and one alias for each tier."""
    return {"object": "list", "data": _models(_server(request))}


@router.get(
    "/v1/models/{model}",
    tags=["inference"],
    response_model=answers.Model,
    responses={401: COMMON[401], 503: COMMON[503], **NOT_SERVED},
)
async def model(model: str, request: Request) -> Any:
    """One of them."""
    server = _server(request)
    tier_of_model(model, server.backend.info)
    return next(entry for entry in _models(server) if entry["id"] == model)


def _models(server: Server) -> list[dict[str, Any]]:
    info = server.backend.info
    names: dict[str, int | None] = {info.name: None, alias(AUTO): None}
    for tier, name in enumerate(info.config.tier_names):
        names.setdefault(alias(name), tier)
    return [
        {
            "id": name,
            "object": "model",
            "created": int(server.started),
            "owned_by": "dvpa",
            "tier": tier,
            "max_model_len": info.config.max_position_embeddings,
        }
        for name, tier in names.items()
    ]


@router.post("/tokenize", tags=["inference"], response_model=answers.Tokens, responses=ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> Any:
    """Token ids of a prompt or of a conversation, as generation would see them."""
    server = _server(request)
    tier_of_model(body.model, server.backend.info)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt, messages: one of the two must be given", param="prompt")
    if body.messages is not None:
        tokens = await server.prompts.encode_chat(body.messages)
    else:
        tokens = await server.prompts.encode_plain(body.prompt or "", body.add_special_tokens)
    texts = [server.prompts.token_text(t) for t in tokens] if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": server.backend.info.config.max_position_embeddings,
        "tokens": tokens,
        "token_strs": texts,
    }


@router.post(
    "/detokenize", tags=["inference"], response_model=answers.Detokenized, responses=ERRORS
)
async def detokenize(body: DetokenizeRequest, request: Request) -> Any:
    """Text of token ids."""
    server = _server(request)
    info = server.backend.info
    tier_of_model(body.model, info)
    for token in body.tokens:
        if token >= info.config.vocab_size:
            raise ApiError(
                400,
                f"tokens: {token} must be in 0 .. {info.config.vocab_size - 1}",
                param="tokens",
            )
    return {"prompt": server.prompts.decode(body.tokens)}


# -- dvpa ---------------------------------------------------------------------------------------


@router.post("/v1/dvpa/route", tags=["dvpa"], response_model=answers.RouteAnswer, responses=ERRORS)
async def route(body: RouteRequest, request: Request) -> Any:
    """The tier that a request would get, and why, without generating anything."""
    server = _server(request)
    with server.working():
        info = server.backend.info
        params = SamplingParams(
            **tier_fields(body.model, body.dvpa, info), timeout_s=server.config.request_timeout_s
        )
        prompt = await _prompt_of(server, body.prompt, body.messages)
        request_id = f"route-{uuid.uuid4().hex}"
        try:
            server.backend.check(prompt, params)
            work = server.backend.route(prompt, params, request_id)
            record = (await unless_gone(request, work)).to_dict()
        except QueueFull as error:
            raise queue_full(error, server.config.retry_after_s) from None
        except ValueError as error:
            raise bad_field(error) from None
        except Disconnected:
            return Response(status_code=499)
        wanted = answers.RouteAnswer.model_fields.keys() & record.keys()
        answer = {name: record[name] for name in record if name in wanted}
        answer["model"] = alias(record["tier_name"])
        if body.dvpa is not None and body.dvpa.explain:
            answer["explanation"] = explain(record, info)
        return JSONResponse(answer)


async def _prompt_of(
    server: Server, prompt: str | list[int] | None, messages: list[Message] | None
) -> list[int]:
    if (prompt is None) == (messages is None):
        raise ApiError(400, "prompt, messages: one of the two must be given", param="prompt")
    if messages is not None:
        return await server.prompts.encode_chat(messages)
    return await server.prompts.encode(prompt) if isinstance(prompt, str) else prompt or []


@router.get(
    "/v1/dvpa/telemetry",
    tags=["dvpa"],
    response_model=dict[str, Any],
    responses={400: COMMON[400], 401: COMMON[401], 503: COMMON[503]},
)
async def telemetry(
    request: Request, limit: Annotated[int, Query(ge=0, le=MAX_TELEMETRY)] = 100
) -> Any:
    """Totals, difficulty, savings and the last requests; never a prompt or an answer."""
    if len(request.query_params.getlist("limit")) > 1:
        raise ApiError(400, "limit: given more than once", param="limit")
    return JSONResponse(_server(request).telemetry.snapshot(limit))


@router.get(
    "/v1/dvpa/tiers",
    tags=["dvpa"],
    response_model=dict[str, Any],
    responses={401: COMMON[401], 503: COMMON[503]},
)
async def tiers(request: Request) -> Any:
    """What each tier costs, how the tier map decides, and the frontier it was calibrated to."""
    info = _server(request).backend.info
    tier_map = info.tier_map
    rows = [
        {
            "index": index,
            "name": tier.name,
            "alias": alias(tier.name),
            "num_groups": tier.num_groups,
            "top_k": tier.top_k,
            "activated_params": cost.activated_params,
            "flops_per_token": cost.flops_per_token,
            "weight_bytes": cost.weight_bytes,
            "ratio_to_top": cost.ratio_to_top,
        }
        for index, (tier, cost) in enumerate(zip(info.config.tiers, info.price.tiers, strict=True))
    ]
    return JSONResponse(
        {
            "schema_version": 1,
            "model": info.name,
            "tiers": rows,
            "tier_map": {
                "kind": tier_map.kind,
                "is_fitted": tier_map.is_fitted,
                "thresholds": list(tier_map.thresholds),
                "upper_cut": tier_map.upper_cut,
                "regions": regions(tier_map),
                "default_tier": tier_map.default_tier,
                "budget": tier_map.budget,
                "statistics": tier_map.statistics,
            },
            "frontier": frontier(info.report),
        }
    )


@router.post(
    "/v1/dvpa/reload",
    tags=["dvpa"],
    response_model=answers.Reloaded,
    responses={
        **COMMON,
        403: {"model": answers.ErrorAnswer, "description": "the server has no API keys"},
        409: {"model": answers.ErrorAnswer, "description": "not sound; the map in use stays"},
    },
)
async def reload(request: Request) -> Any:
    """Read tier_map.json again. Only on a server with API keys (elsewhere: SIGHUP)."""
    server = _server(request)
    if not server.config.api_keys:
        raise ApiError(403, "reload: needs a server with API keys; send SIGHUP", reason="forbidden")
    tier_map = await server.reload_tier_map()
    return {
        "status": "reloaded",
        "kind": tier_map.kind,
        "thresholds": list(tier_map.thresholds),
    }
