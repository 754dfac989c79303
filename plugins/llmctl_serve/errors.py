"""Errors as OpenAI's clients expect them: a status, and a body `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llmctl import InputError, LlmctlError, UsageError
from llmctl_serve.exchange import SCOPE

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = message.encode("utf-8", "backslashreplace").decode()  # it may quote what is no character
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response."""
        return ErrorResponse(self)

    def event(self) -> bytes:
        """As the last event of a stream."""
        return b"data: " + json.dumps(self.body(), ensure_ascii=False).encode() + b"\n\n"


class ErrorResponse(JSONResponse):
    """An error as HTTP, noted in the request's exchange for the access log."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.body(), error.status, dict(error.headers or {}))
        self._code = error.code or f"status_{error.status}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  # ASGI
        exchange = scope.get(SCOPE)
        if exchange is not None:
            exchange.failed(self._code)
        await super().__call__(scope, receive, send)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 that names the field of the first mistake; later ones are usually its consequences."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    # Names of alternatives in a union ("list[…]", "str") are no part of the request.
    place = [part for part in place if part.isidentifier() or part.isdigit()]
    while place and place[-1] in ("str", "ChatMessage", "Part", "Retrieval", "bool"):
        place.pop()
    param = ".".join(place)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "missing" and not param:
        return ApiError(400, "the request has no body; send a JSON object")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field `{param}`", param=param)
    if first["type"] == "value_error":
        named = message.split("`")
        return ApiError(400, message, param=param or (named[1] if len(named) > 2 else None))
    return ApiError(400, f"`{param}`: {message}" if param else message, param=param or None)


def to_api(error: LlmctlError) -> ApiError:
    """The HTTP error for one that generation raised: what the client can change is a 400."""
    if isinstance(error, UsageError | InputError):
        hint = f" ({error.hint})" if error.hint else ""
        code = "context_length_exceeded" if "context" in error.message else None
        return ApiError(400, error.message + hint, code=code)
    return ApiError(500, "the server failed on this request; its log says why")
