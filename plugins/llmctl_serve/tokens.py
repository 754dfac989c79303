"""Text to token ids and back over HTTP: `/v1/tokenize` and `/v1/detokenize`, as vLLM names their fields."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from llmctl_serve.bodies import FIRST, Id, Strict, Text
from llmctl_serve.conversations import ChatMessage
from llmctl_serve.models import Models
from llmctl_serve.schemas import Detokenized, Tokenized, errors


class TokenizeRequest(Strict):
    """Body of `/v1/tokenize`: a text, or a conversation."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = Field(default=True, description="Of a text: frame it as `/v1/completions` does.")
    add_generation_prompt: bool = Field(default=True, description="Of a conversation: end where the answer begins.")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`")
        return self


class DetokenizeRequest(Strict):
    """Body of `/v1/detokenize`."""

    model: Text | None = None
    tokens: Annotated[list[Id], FIRST]
    skip_special_tokens: bool = False


def token_routes(models: Models) -> APIRouter:
    """Both routes."""
    router = APIRouter()
    responses = errors(400, 404, 413, 415)

    @router.post("/v1/tokenize", response_model=Tokenized, responses=responses)
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        """The ids that the model would read."""
        service = models.find(body.model).service

        def encode() -> dict[str, Any]:
            tokenizer = service.tokenizer
            if body.messages is not None:
                messages = [message.plain() for message in body.messages]
                ids = tokenizer.encode_chat(messages, add_generation_prompt=body.add_generation_prompt).ids
            else:
                text = body.prompt or ""
                ids = service.framed(text) if body.add_special_tokens else tokenizer.encode(text)
            found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": service.context_length}
            if body.return_token_strs:
                found["token_strs"] = [tokenizer.decode([token], skip_special=False) for token in ids]
            return found

        return JSONResponse(await asyncio.to_thread(encode))

    @router.post("/v1/detokenize", response_model=Detokenized, responses=responses)
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        """The text of ids."""
        service = models.find(body.model).service
        ids = service.checked(body.tokens, "tokens")
        text = await asyncio.to_thread(service.tokenizer.decode, ids, body.skip_special_tokens)
        return JSONResponse({"prompt": text})

    return router
