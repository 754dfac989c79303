"""The HTTP application: its routes, and the form of its errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from llmctl import LlmctlError, __version__
from llmctl_serve.admin import admin_routes
from llmctl_serve.answers import Answer, answer_stream, answer_whole, chat_answer, completion_answer
from llmctl_serve.conversations import ChatRequest
from llmctl_serve.embeddings import embedding_routes
from llmctl_serve.errors import ApiError, from_validation, to_api
from llmctl_serve.guard import Guard
from llmctl_serve.models import Models
from llmctl_serve.operations import model_routes, operation_routes
from llmctl_serve.pages import mount_page
from llmctl_serve.requests import CompletionRequest
from llmctl_serve.schemas import ChatCompletion, Completion, chunk_schemas, errors, streamed
from llmctl_serve.tokens import token_routes

Warn = Callable[[str], None]


def create_app(models: Models, guard: Guard, warn: Warn, page: bool = False) -> FastAPI:
    """The application, with its guard around it; `page`: with the chat page."""
    # Traces are our own, and /docs would load scripts from elsewhere.
    app = FastAPI(
        title="llmctl",
        version=__version__,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        docs_url=None,
        redoc_url=None,
    )
    _add_generation(app, models, warn)
    app.include_router(embedding_routes(models))
    app.include_router(token_routes(models))
    app.include_router(model_routes(models))
    app.include_router(operation_routes(models, guard.metrics))
    app.include_router(admin_routes(models))
    if page:
        mount_page(app)
    _add_errors(app, warn)
    guard.protect(app)
    _describe_truly(app)
    return app


def _describe_truly(app: FastAPI) -> None:
    """FastAPI describes a 422 of its own for every route; here a wrong field is a 400 in OpenAI's form.

    Of the events of a stream it knows nothing.
    """
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        components = schema["components"]["schemas"]
        schema["components"]["schemas"] = {**chunk_schemas(), **components}
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_generation(app: FastAPI, models: Models, warn: Warn) -> None:
    refusals = errors(400, 404, 413, 415)

    @app.post("/v1/chat/completions", response_model=None, responses={**streamed(ChatCompletion), **refusals})
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        return await _respond(await chat_answer(models, body, request), request, warn)

    @app.post("/v1/completions", response_model=None, responses={**streamed(Completion), **refusals})
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text."""
        return await _respond(await completion_answer(models, body, request), request, warn)


async def _respond(answer: Answer, request: Request, warn: Warn) -> Response:
    artifact = answer.service.artifact.id
    headers = {"x-llmctl-model": artifact} if artifact else {}
    if answer.body.stream:
        return Events(answer, headers, warn)
    return JSONResponse(await answer_whole(answer, request), headers=headers)


class Events(StreamingResponse):
    """An answer as server-sent events. It is given up however the response ends, even before its first byte."""

    def __init__(self, answer: Answer, headers: Mapping[str, str], warn: Warn) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(answer_stream(answer, warn), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  # ASGI
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


def _add_errors(app: FastAPI, warn: Warn) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(LlmctlError)
    async def expected(_: Request, error: LlmctlError) -> Response:
        return to_api(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if _compressed(request):
            return COMPRESSED.response()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method in ("POST", "PUT", "PATCH") and kind != "application/json":
            message = "the body must be JSON, sent with `Content-Type: application/json`"
            return ApiError(415, message, code="unsupported_media_type").response()
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400 and _compressed(request):  # bytes that are no text are no JSON either
            return COMPRESSED.response()
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        warn(f"{request.method} {request.url.path} failed: {type(error).__name__}: {error}")
        return ApiError(500, "the server failed on this request; its log says why").response()


COMPRESSED = ApiError(415, "the body may not be compressed", code="unsupported_media_type")


def _compressed(request: Request) -> bool:
    """Whether a body that could not be read is said to be compressed."""
    coding = request.headers.get("content-encoding", "").strip().lower()
    return request.method == "POST" and coding not in ("", "identity")
