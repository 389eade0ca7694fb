"""The HTTP server: OpenAI's images API, the playground page, health, metrics and lineage, around an Engine."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.errors import ConfigError
from tasks.serving.config import ServeConfig
from tasks.serving.engine import Engine
from tasks.serving.models import CHAMPION, Models, Served, describe
from tasks.serving.pictures import pictures
from tasks.serving.schema import ImagesRequest, problem

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page.html"
LOOPBACK = ["localhost", "127.0.0.1", "[::1]", "testserver"]
HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
POLICY = (
    "default-src 'none'; img-src data: blob:; connect-src 'self'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Metrics:
    """What /metrics shows."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("t2i_requests", "Requests for pictures", ["status"], registry=self.registry)
        self.seconds = Histogram(
            "t2i_request_seconds", "Time from request to answer", registry=self.registry,
            buckets=(0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10, 30, 60),
        )  # fmt: skip
        for name, about, value in (
            ("t2i_queue", "Pictures waiting", lambda: engine.waiting),
            ("t2i_pictures", "Pictures drawn", lambda: engine.num_drawn),
            ("t2i_calls", "Calls that drew them", lambda: engine.num_calls),
            ("t2i_busy_seconds", "Time spent drawing", lambda: engine.busy_seconds),
        ):
            Gauge(name, about, registry=self.registry).set_function(value)


class Api:
    """The handlers, around one engine."""

    def __init__(self, engine: Engine, config: ServeConfig, key: str | None) -> None:
        self.engine, self.config, self.key = engine, config, key
        self.metrics = Metrics(engine)

    def allowed(self, request: Request) -> None:
        """Refuse a request without the bearer key, where there is one."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise HTTPException(401, "the bearer key is missing or wrong", {"WWW-Authenticate": "Bearer"})

    async def page(self) -> HTMLResponse:
        """The playground."""
        nonce = secrets.token_urlsafe(16)
        text = _page().render(nonce=nonce, locked=self.key is not None)
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY.format(nonce=nonce)})

    async def health(self) -> JSONResponse:
        """200 while requests are taken, 503 while the server ends."""
        ending = self.engine.ending
        about = {"status": "ending" if ending else "ok", "run": self.engine.models.run, "waiting": self.engine.waiting}
        return JSONResponse(about, 503 if ending else 200)

    async def measured(self) -> Response:
        """Prometheus text."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def listed(self) -> dict[str, Any]:
        """Every model, as OpenAI lists them."""
        models = self.engine.models
        data = [describe(models, model) for model in models.served.values()]
        return {"object": "list", "data": data, "default": models.default, "run": models.run,
                "enhances": models.enhancer is not None}  # fmt: skip

    async def one(self, name: str) -> dict[str, Any]:
        """One model."""
        models = self.engine.models
        return describe(models, _find(models, name))

    async def lineage(self, name: str) -> dict[str, Any]:
        """Where a model comes from; `t2i lineage` has the rest."""
        artifact = _find(self.engine.models, name).artifact
        facts = {field: artifact.facts.get(field) for field in ("function", "inputs", "steps", "finished")}
        return {"stage": artifact.stage, "digest": artifact.digest, "parents": list(artifact.parents), **facts}

    async def generate(self, asked: ImagesRequest, request: Request) -> JSONResponse:
        """Draw."""
        began = time.monotonic()
        try:
            answer = await pictures(self.engine, self.config, asked, request)
        except HTTPException as error:
            self.metrics.requests.labels(str(error.status_code)).inc()
            raise
        self.metrics.requests.labels("200").inc()
        self.metrics.seconds.observe(time.monotonic() - began)
        return JSONResponse(answer)


def create_app(
    engine: Engine,
    config: ServeConfig,
    key: str | None = None,
    follow: Callable[[], Models | None] | None = None,
    hosts: list[str] | None = None,
) -> FastAPI:
    """The application; `key` is the bearer key, `follow` gives new models when the served run has changed."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_follow(engine, follow, config.follow_seconds)) if follow else None
        yield
        if task is not None:
            task.cancel()
        await run_in_threadpool(engine.end)

    app = FastAPI(title="t2i", docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    app.add_middleware(SafeHeaders)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts or LOOPBACK)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    api = Api(engine, config, key)
    app.get("/")(api.page)
    app.get("/healthz")(api.health)
    locked: Any = {"dependencies": [Depends(api.allowed)]}
    app.get("/metrics", **locked)(api.measured)
    app.get("/v1/models", **locked)(api.listed)
    app.get("/v1/models/{name}", **locked)(api.one)
    app.get("/lineage/{name}", **locked)(api.lineage)
    app.post("/v1/images/generations", **locked)(api.generate)
    return app


class SafeHeaders:
    """Adds headers to every answer (plain ASGI: starlette's own wrapper would hide that a client has gone)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(problem(str(error.detail)), error.status_code, headers=error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return JSONResponse(problem(f"{param or 'body'}: {first['msg']}", param=param), 400)


def _find(models: Models, name: str) -> Served:
    try:
        return models.find(name)
    except ConfigError as error:
        raise HTTPException(404, str(error)) from error


def _page() -> jinja2.Template:
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE.read_text("utf-8"))


async def _follow(engine: Engine, follow: Callable[[], Models | None], seconds: float) -> None:
    """Swap to the run's new models when there are any; a failed look changes nothing and is said once."""
    said = ""
    while True:
        await asyncio.sleep(seconds)
        try:
            models = await run_in_threadpool(follow)
            if models is not None:
                await run_in_threadpool(_warm, models)
                engine.swap(models)
                log.info("now serving run %s, champion %s", models.run, (models.champion or "none")[:12])
        except Exception as error:
            if str(error) != said:
                log.warning("new models are not served: %s; those loaded stay", error)
            said = str(error)


def _warm(models: Models) -> None:
    """Load the default model and the champion before they are asked for."""
    for name in (None, CHAMPION) if models.champion else (None,):
        models.generator(models.find(name), ())
