"""The body of `/v1/chat/completions`: messages, tools, and what the answer may look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llmctl_serve.bodies import FIRST, MAX_TOKENS, Object, Strict, Text, lacking
from llmctl_serve.guides import ResponseFormat, guide_of
from llmctl_serve.requests import CommonRequest

ROLES = {"developer": "system"}
SAID = ("refusal", "function_call", "audio", "annotations", "reasoning_content", "reasoning")
"""Fields of a message that clients send back as they received them; accepted where empty."""
NAME = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")


class Part(Strict):
    """One part of a message's content; only text is understood."""

    type: Literal["text"]
    text: Text


class CalledFunction(Strict):
    """Which function was called, and with what."""

    name: Annotated[Text, NAME]
    arguments: Text


class ToolCall(Strict):
    """A call that the assistant made in an earlier turn."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], FIRST] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], FIRST] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if key not in SAID or value not in (None, [])}

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("`content` is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("`tool_calls` belong to the assistant")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("`tool_call_id` and the role `tool` go together")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        found: dict[str, Any] = {"role": ROLES.get(self.role, self.role), "content": text}
        if self.tool_calls:
            found["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        if self.role == "tool" and self.name is not None:
            found["name"] = self.name
        return found


class Function(Strict):
    """A function that the model may call."""

    name: Annotated[Text, NAME]
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Strict):
    """The function that must be called."""

    name: Annotated[Text, NAME]


class ToolChoice(Strict):
    """Call this one."""

    type: Literal["function"]
    function: ChosenFunction


class Retrieval(Strict):
    """How an answer uses the server's documents (an extension; needs a server with an index)."""

    top_k: int | None = Field(default=None, ge=1, le=20)
    refuse_below: float | None = Field(default=None, ge=0, le=1)


class ChatRequest(CommonRequest):
    """Body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    retrieval: Retrieval | bool | None = Field(default=None, description="How to use the server's documents.")
    functions: lacking("functions") = None  # type: ignore[valid-type]
    function_call: lacking("function_call") = None  # type: ignore[valid-type]
    modalities: lacking("modalities") = None  # type: ignore[valid-type]
    audio: lacking("audio") = None  # type: ignore[valid-type]
    prediction: lacking("prediction") = None  # type: ignore[valid-type]
    reasoning_effort: lacking("reasoning_effort") = None  # type: ignore[valid-type]
    verbosity: lacking("verbosity") = None  # type: ignore[valid-type]
    web_search_options: lacking("web_search_options") = None  # type: ignore[valid-type]

    @field_validator("tools")
    @classmethod
    def _distinct(cls, tools: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in tools or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two tools are called {min(twice)}")
        return tools or None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ValueError("`max_tokens` and `max_completion_tokens` contradict each other")
        if isinstance(self.tool_choice, ToolChoice):
            name = self.tool_choice.function.name
            if name not in [tool.function.name for tool in self.tools or ()]:
                raise ValueError(f"`tool_choice` asks for {name}, which is none of the tools")
        elif self.tool_choice == "required" and not self.tools:
            raise ValueError("`tool_choice` is required, but there are no tools")
        if self.callable_tools and guide_of(self, self.response_format) is not None:
            raise ValueError("`tools` and a form for the answer cannot be combined; set tool_choice to none")
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that this answer may call."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens, if the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def scored(self) -> int | None:
        """How many alternatives per token to score, None for no scores."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def draws(self) -> int:
        """Answers to generate."""
        return self.n
