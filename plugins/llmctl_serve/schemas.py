"""What the server answers, for its OpenAPI description. The bodies themselves are built in `responses`."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """A body as it is sent; fields that a route adds are stated here too."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetails(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """Every error has this form."""

    error: ErrorDetails


class PromptDetails(Answer):
    """What was saved."""

    cached_tokens: int


class Usage(Answer):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Likely(Answer):
    """A token and its natural log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Likely):
    """A token of an answer with the likeliest at its place."""

    top_logprobs: list[Likely]


class ChatLogprobs(Answer):
    """Scores of an answer."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Answer):
    """Which function the model calls, and with what."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answer):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Citation(BaseModel):
    """A passage that an answer from documents rests on."""

    number: int
    id: str
    document: str


class ChatCompletion(Answer):
    """A whole answer of a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    citations: list[Citation] | None = None
    refused: bool | None = None


class ToolCallChunk(ToolCall):
    """A call in a stream, whole; `index` says which one it is."""

    index: int


class ChatDelta(Answer):
    """What is new: the role, text, or calls of tools."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallChunk] | None = None


class ChatChunkChoice(Answer):
    """What is new of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(Answer):
    """The data of one event of a streamed conversation."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    citations: list[Citation] | None = None
    refused: bool | None = None


class CompletionLogprobs(Answer):
    """Scores of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Answer):
    """Continuations of texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Answer):
    """What is new of one continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(Answer):
    """The data of one event of a streamed continuation."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class ModelEntry(Answer):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: str | None = None


class ModelList(Answer):
    """All of them, the default first."""

    object: Literal["list"]
    data: list[ModelEntry]


class Embedding(Answer):
    """The vector of one input: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Answer):
    """The vectors in the order of the inputs."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokenized(Answer):
    """The ids of a text."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Detokenized(Answer):
    """The text of ids."""

    prompt: str


class Health(BaseModel):
    """That the process answers, and whether its models' engines work."""

    status: Literal["ok", "failed"]
    models: list[str]
    queue_depth: int


class Ready(Answer):
    """Whether requests can be answered."""

    status: Literal["ready", "stopping", "failed"]
    models: list[str]


class Ancestor(Answer):
    """One artifact that a model was made from, or the model."""

    id: str
    type: str
    stage: str
    instance: str
    run: str
    inputs: dict[str, list[str]]


class Provenance(Answer):
    """What is served under one name."""

    id: str
    parent: str | None = None
    artifact: str
    type: str
    backend: str
    tokenizer: str
    system_fingerprint: str
    lineage: list[Ancestor]


class Version(Answer):
    """The software, and where its models come from."""

    llmctl: str
    models: list[Provenance]


class Changed(Answer):
    """A model that was loaded."""

    name: str
    artifact: str
    replaced: str | None


class ChangeList(Answer):
    """Models that were swapped."""

    changes: list[Changed]


class Removed(Answer):
    """A model that is no longer served."""

    name: str
    removed: Literal[True]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route; what is in front of every route (keys, limits, timeouts) is among them."""
    everywhere = {401, 403, 408, 421, 429, 431, 499, 500, 503, 504}
    return {
        status: {
            "model": ErrorBody,
            "description": "The client has left" if status == 499 else HTTPStatus(status).phrase,
        }
        for status in sorted(everywhere | set(statuses))
    }


REFERENCE = "#/components/schemas/{model}"
CHUNKS: dict[type[BaseModel], type[BaseModel]] = {ChatCompletion: ChatChunk, Completion: CompletionChunk}
"""What the events of a stream carry, for each whole answer."""


def streamed(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The good response of a route that answers whole or, with `stream: true`, as server-sent events.

    OpenAPI 3.1 knows no streams; by the convention of its readers, `schema` is that of one event.
    """
    text = "The answer; with `stream: true` chunks as `data: {…}` lines, ended by `data: [DONE]`."
    carried = [{"$ref": REFERENCE.format(model=model.__name__)} for model in (CHUNKS[whole], ErrorBody)]
    chunk = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": carried}}
    data = {"anyOf": [{"const": "[DONE]"}, chunk]}
    events = {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    return {200: {"model": whole, "description": text, "content": {"text/event-stream": events}}}


def chunk_schemas() -> dict[str, Any]:
    """The schemas that `streamed` refers to, by name, for `components` of the description."""
    found: dict[str, Any] = {}
    for model in CHUNKS.values():
        schema = model.model_json_schema(ref_template=REFERENCE)
        found |= {**schema.pop("$defs"), model.__name__: schema}
    return found
