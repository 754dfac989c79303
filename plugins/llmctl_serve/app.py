"""The HTTP application: routes, errors, authorisation and limits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from llmctl import InputError, LlmctlError, UsageError, __version__
from llmctl_serve.answers import answer_stream, answer_whole, chat_answer, completion_answer
from llmctl_serve.errors import ApiError, from_validation
from llmctl_serve.metrics import ServerMetrics
from llmctl_serve.middleware import ApiKey, BodyLimit, Observed
from llmctl_serve.pages import mount_page
from llmctl_serve.requests import ChatRequest, CompletionRequest
from llmctl_serve.service import Service
from llmctl_serve.worker import QueueFullError, Worker

Warn = Callable[[str], None]


def create_app(service: Service, worker: Worker, metrics: ServerMetrics, api_key: str, warn: Warn) -> FastAPI:
    """The application; with an `api_key` every path under /v1 asks for it."""
    app = FastAPI(title="llmctl", version=__version__, telemetry={"tracing": False, "metrics": False, "logs": False})
    _add_models(app, service)
    _add_operations(app, service, worker, metrics)
    _add_generation(app, service, worker, metrics)
    if service.params.page:
        mount_page(app)
    _add_errors(app, warn)
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, limit=service.params.max_request_bytes)
    if api_key:
        app.add_middleware(ApiKey, key=api_key)
    app.add_middleware(Observed, metrics=metrics)
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    described = {
        "id": service.model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "llmctl",
        "max_model_len": service.generator.context_length,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models of this server: one."""
        return {"object": "list", "data": [described]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One model."""
        service.check_model(model)
        return described


def _add_operations(app: FastAPI, service: Service, worker: Worker, metrics: ServerMetrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether the server can answer."""
        return {
            "status": "ok",
            "model": service.model_id,
            "backend": service.generator.backend,
            "queue_depth": worker.depth,
        }

    @app.get("/metrics")
    async def exposition() -> Response:
        """Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_generation(app: FastAPI, service: Service, worker: Worker, metrics: ServerMetrics) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        answer = await chat_answer(service, worker, metrics, body)
        if body.stream:
            return _events(answer_stream(answer, body.include_usage))
        return JSONResponse(await answer_whole(answer, request))

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text."""
        answer = await completion_answer(service, worker, metrics, body)
        if body.stream:
            return _events(answer_stream(answer, body.include_usage))
        return JSONResponse(await answer_whole(answer, request))


def _events(parts: AsyncIterator[bytes]) -> StreamingResponse:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(parts, media_type="text/event-stream", headers=headers)


def _add_errors(app: FastAPI, warn: Warn) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(QueueFullError)
    async def queue_full(_: Request, error: QueueFullError) -> Response:
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)}).response()

    @app.exception_handler(LlmctlError)
    async def expected(_: Request, error: LlmctlError) -> Response:
        return to_api(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "")
        if not kind.startswith("application/json"):
            return ApiError(400, "the body must be JSON, sent with `Content-Type: application/json`").response()
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        warn(f"{request.method} {request.url.path} failed: {type(error).__name__}: {error}")
        return ApiError(500, "the server failed on this request; its log says why").response()


def to_api(error: BaseException) -> ApiError:
    """The HTTP error for one that generation raised: what the client can change is a 400."""
    if isinstance(error, UsageError | InputError):
        hint = f" ({error.hint})" if error.hint else ""
        code = "context_length_exceeded" if "context" in error.message else None
        return ApiError(400, error.message + hint, param="messages" if code is None else None, code=code)
    return ApiError(500, "the server failed on this request; its log says why")
