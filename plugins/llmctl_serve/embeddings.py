"""Vectors of texts over HTTP: `/v1/embeddings`, by a bundle of an encoder with the pooling that it carries."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from llmctl import UsageError
from llmctl_serve.answers import until_gone
from llmctl_serve.bodies import Harmless, Id, Strict, Text
from llmctl_serve.errors import ApiError
from llmctl_serve.exchange import exchange_of
from llmctl_serve.models import Models, Served
from llmctl_serve.schemas import EmbeddingList, errors

MOST = 2048
"""Inputs of one request, as with OpenAI."""


class EmbeddingRequest(Strict):
    """Body of `/v1/embeddings`: one text or several, or their token ids."""

    model: Text | None = None
    input: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=MOST, fail_fast=True)]
        | Annotated[list[Id], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[Id], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=MOST, fail_fast=True),
        ]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, description="Only the model's own size is possible.")
    user: Harmless = None

    @model_validator(mode="after")
    def _not_too_many(self) -> EmbeddingRequest:
        if not self.rows:
            raise ValueError("`input` is empty")
        return self

    @property
    def rows(self) -> list[str | list[int]]:
        """The inputs as a list."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [[token for token in self.input if isinstance(token, int)]]
        return [row for row in self.input if not isinstance(row, int)]


def embedding_routes(models: Models) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/embeddings", response_model=EmbeddingList, responses=errors(400, 404, 413, 415, 429, 503))
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """Turn texts into vectors. A text is cut where the model's `max_seq_length` says so; else, and of token ids,
        more than the context is refused."""
        model = models.use(body.model)
        try:
            ids = await asyncio.to_thread(_ids, model, body)
            _check_size(model, body)
            exchange = exchange_of(request)
            exchange.asked(
                model=model.service.model_id,
                artifact=model.service.artifact.id,
                prompt_tokens=sum(map(len, ids)),
                operation="embeddings",
            )
            vectors = await _embed(model, ids, request)
        finally:
            model.release()
        _check_size(model, body, vectors.shape[1])
        return JSONResponse(_response(model, body, vectors, sum(map(len, ids))))

    return router


def _ids(model: Served, body: EmbeddingRequest) -> list[list[int]]:
    service = model.service
    encoder = service.encoder
    if encoder is None:
        message = f"the model `{service.model_id}` gives no embeddings; serve the bundle of a sentence encoder"
        raise ApiError(400, message, param="model")
    if not {"sentence_embedding", "last_hidden_state"} & set(encoder.outputs):
        message = f"the model `{service.model_id}` gives {', '.join(encoder.outputs)}, and no embeddings"
        raise ApiError(400, message, param="model")
    rows = []
    for at, row in enumerate(body.rows):
        if isinstance(row, str):
            framed = service.tokenizer.frame(row)
            ids = framed.ids if encoder.longest is None else framed.within(encoder.longest).ids
        else:
            ids = service.checked(row, "input")
        if len(ids) > encoder.context_length:
            message = f"input {at} has {len(ids)} tokens, the model's context is {encoder.context_length}"
            raise ApiError(400, message, param="input", code="context_length_exceeded")
        rows.append(ids)
    return rows


def _check_size(model: Served, body: EmbeddingRequest, size: int | None = None) -> None:
    """ApiError 400 for a size of vectors that the model does not have; before the work, where the model says it."""
    encoder = model.service.encoder
    if size is None and encoder is not None:
        size = encoder.embedding_size
    if body.dimensions is not None and size is not None and body.dimensions != size:
        message = f"this model's vectors have {size} numbers; it was not trained to be cut shorter"
        raise ApiError(400, message, param="dimensions")


async def _embed(model: Served, ids: list[list[int]], request: Request) -> Any:
    """The vectors, `(len(ids), H)`; the client's departure gives up its place in the queue."""
    assert model.encoder is not None
    exchange = exchange_of(request)
    work = asyncio.ensure_future(model.encoder.embed(ids, exchange))
    gone = asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            exchange.cut = exchange.cut or "client_left"
            raise ApiError(499, "the client has left")
        return await work
    except UsageError as error:
        raise ApiError(400, error.message, param="input") from error
    finally:
        for task in (work, gone):
            task.cancel()


def _response(model: Served, body: EmbeddingRequest, vectors: Any, tokens: int) -> dict[str, Any]:
    if body.encoding_format == "base64":  # little-endian float32, as OpenAI's clients ask for by default
        found: list[Any] = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    else:
        found = vectors.tolist()
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": at, "embedding": one} for at, one in enumerate(found)],
        "model": model.service.model_id,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
