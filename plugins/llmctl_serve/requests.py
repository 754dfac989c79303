"""What clients may ask, as strict models of OpenAI's request bodies.

Everything is either honoured, harmless, or refused by name; nothing is silently ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

HARMLESS = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)
"""Accepted and without effect: they change nothing about the answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
}
"""Fields of OpenAI's API that this server lacks, with the values that ask for nothing."""
SAID = ("refusal", "tool_calls", "function_call", "audio", "annotations")
"""Fields of a message that clients send back as they received them; accepted where empty."""
ROLES = {"developer": "system"}


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half of a surrogate pair, which is no character") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1)]


class Strict(BaseModel):
    """No conversion of types, no unknown keys, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Part(Strict):
    """One part of a message's content; only text is understood."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if key not in SAID or value not in (None, [])}

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": ROLES.get(self.role, self.role), "content": content}


class StreamOptions(Strict):
    """What a stream carries besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Retrieval(Strict):
    """How an answer uses the server's documents (an extension; needs a server with an index)."""

    top_k: int | None = Field(default=None, ge=1, le=20)
    refuse_below: float | None = Field(default=None, ge=0, le=1)


class CommonRequest(Strict):
    """What both kinds of request share. `top_k` is an extension that vLLM and others know too."""

    model: Text | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    n: int = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_lacking(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        own = cls.model_fields
        for name, neutral in NEUTRAL.items():
            if name in data and name not in own and not any(_same(data[name], value) for value in neutral):
                raise ValueError(f"`{name}` is not supported by this server")
        return {key: value for key, value in data.items() if not cls._empty(key, value)}

    @classmethod
    def _empty(cls, name: str, value: Any) -> bool:
        """A field that asks for nothing: harmless, neutral, or the null that clients send for what they leave open."""
        if name in cls.model_fields:
            return value is None and not cls.model_fields[name].is_required()
        return name in NEUTRAL or name in HARMLESS

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> CommonRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream: true`")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(CommonRequest):
    """Body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    retrieval: Retrieval | bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        if self.logprobs and self.stream:
            raise ValueError("`logprobs` is not supported together with `stream`")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise ValueError("`max_tokens` and `max_completion_tokens` contradict each other")
        return self

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens, if the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def scored(self) -> int | None:
        """How many alternatives per token to score, None for no scores."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(CommonRequest):
    """Body of `/v1/completions`: text or token ids to continue, one or several."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.logprobs is not None and self.stream:
            raise ValueError("`logprobs` is not supported together with `stream`")
        if len(self.prompts) > 64:
            raise ValueError("`prompt` holds more than 64 prompts")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens, if the request says so."""
        return self.max_tokens

    @property
    def scored(self) -> int | None:
        """How many alternatives per token to score, None for no scores."""
        return self.logprobs


def _same(value: Any, neutral: Any) -> bool:
    """Equal and of one type: `false` is not the penalty 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
