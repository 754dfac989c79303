"""What clients may ask to be generated, as strict models of OpenAI's request bodies.

Everything is either honoured, harmless, or refused by name; nothing is silently ignored.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from llmctl.generator import LEAST_PENALTY
from llmctl_serve.bodies import FIRST, MAX_TOKENS, Harmless, Id, Stop, Strict, Text, lacking
from llmctl_serve.guides import Guided, guide_of

HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
"""Fields of OpenAI's that are accepted and without effect on the answer."""


class StreamOptions(Strict):
    """What a stream carries besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class CommonRequest(Guided):
    """What both kinds of request share. Fields that OpenAI lacks are those of vLLM."""

    model: Text | None = Field(default=None, description="Which of the server's models; by default its first.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31, description="Choose among the k likeliest; 0 for all.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=LEAST_PENALTY, le=10)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(default=None, max_length=1024, description="Token id: what is added to its logit.")
    n: int = Field(default=1, ge=1, le=16)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool = Field(default=False, description="Go on where the answer would end, to `max_tokens`.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Harmless = None
    metadata: Harmless = None
    store: Harmless = None
    service_tier: Harmless = None
    safety_identifier: Harmless = None
    prompt_cache_key: Harmless = None
    prompt_cache_retention: Harmless = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> CommonRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream: true`")
        guide_of(self, getattr(self, "response_format", None))  # refuses two forms at once
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(CommonRequest):
    """Body of `/v1/completions`: text or token ids to continue, one or several."""

    prompt: (
        Text
        | Annotated[list[Text], FIRST]
        | Annotated[list[Id], FIRST]
        | Annotated[list[Annotated[list[Id], FIRST]], FIRST]
    )
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS, description="0 only with `echo`.")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = Field(default=False, description="Begin with the prompt; with `logprobs` its tokens are scored too.")
    best_of: int | None = Field(default=None, ge=1, le=20, description="Draw this many, give the n likeliest.")
    suffix: lacking("suffix") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if not 1 <= len(self.prompts) <= 64:
            raise ValueError(f"`prompt` holds {len(self.prompts)} prompts; it may hold 1 to 64")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"`best_of` is {self.best_of}, less than n, which is {self.n}")
        if self.stream and self.best_of is not None and self.best_of > self.n:
            raise ValueError("`best_of` chooses among finished answers, so it cannot go with `stream`")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens` may be 0 only with `echo: true`")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
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

    @property
    def draws(self) -> int:
        """Answers to generate for each prompt."""
        return max(self.n, self.best_of or 1)
