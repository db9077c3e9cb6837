"""`create_app`: the FastAPI application over a backend. What runs it is in main.py."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from dvpa import __version__
from dvpa.server import errors, generation, routes
from dvpa.server.backend import Backend
from dvpa.server.config import ServeConfig
from dvpa.server.lifecycle import Server
from dvpa.server.limits import Limits, is_open

STATIC = Path(__file__).resolve().parent / "static"
Startup = Callable[[Server], None]


def create_app(
    backend: Backend | None = None,
    config: ServeConfig | None = None,
    *,
    tier_map_file: Path | None = None,
    on_startup: Startup | None = None,
) -> FastAPI:
    """The application.

    Args:
        backend: what runs the model; None: `on_startup` sees to `app.state.server.ready(backend)`,
            and until then requests are answered with 503. The application closes it at its end.
        tier_map_file: what a reload reads.
        on_startup: called in the event loop once it runs.
    """
    config = config or ServeConfig()
    logging.getLogger("sse_starlette").setLevel(logging.INFO)  # its DEBUG shows what is sent
    server = Server(config, tier_map_file)
    if backend is not None:
        server.ready(backend)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if on_startup is not None:
            on_startup(server)
        yield
        await server.close()

    app = FastAPI(
        title="dvpa",
        version=__version__,
        description="OpenAI-compatible inference at the tier a request needs.",
        lifespan=lifespan,
        docs_url=None,  # it would load its scripts from elsewhere
        redoc_url=None,
    )
    app.state.server = server
    errors.install(app)
    app.include_router(generation.router)
    app.include_router(routes.router)
    if config.dashboard:
        app.mount("/static", StaticFiles(directory=STATIC), name="static")

        @app.get("/", include_in_schema=False)
        async def dashboard() -> FileResponse:
            return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    app.add_middleware(Limits, server=server, config=config)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-dvpa-session-id"],
            expose_headers=["x-dvpa-*", "x-request-id", "retry-after"],
        )
    _document(app, config)
    return app


def _document(app: FastAPI, config: ServeConfig) -> None:
    """OpenAPI as it is: validation errors are 400s of ours, keys are bearer tokens."""
    make, has_keys = app.openapi, bool(config.api_keys)

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            schema = make()
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if has_keys and not is_open(path, config):
                        operation["security"] = [{"bearer": []}]
            components = schema.setdefault("components", {})
            for name in ("HTTPValidationError", "ValidationError"):
                components.get("schemas", {}).pop(name, None)
            if has_keys:
                components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
