"""From a request to tokens: the model, its tokenizer, the index, and how a request becomes choices to generate."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llmctl.generator import Generator, Sampling
from llmctl.text.grounding import Grounds, find_grounds, grounded_prompt
from llmctl.text.retrieval import Index, Passage
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.errors import ApiError
from llmctl_serve.params import ServeParams
from llmctl_serve.requests import ChatRequest, CommonRequest, CompletionRequest, Retrieval
from llmctl_serve.worker import Choice

SEEDS = 2**63


@dataclass(frozen=True)
class Grounding:
    """What a chat answer rests on. Without `choices` it is settled already: quoted, or refused."""

    grounds: Grounds
    passages: list[Passage]
    refused: bool


@dataclass(frozen=True)
class Service:
    """Everything that answers requests, apart from HTTP."""

    generator: Generator
    tokenizer: Tokenizer
    model_id: str
    params: ServeParams
    default: Sampling
    index: Index | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """404 for a model that this server does not have."""
        if name is not None and name != self.model_id:
            message = f"the model `{name}` does not exist; this server has `{self.model_id}`"
            raise ApiError(404, message, param="model", code="model_not_found")

    def chat_choices(self, request: ChatRequest) -> tuple[list[Choice], Grounding | None]:
        """The answers to generate, and what they rest on if the server has documents."""
        self.check_model(request.model)
        messages = [message.plain() for message in request.messages]
        wanted = self._retrieval(request.retrieval)
        if wanted is None:
            prompt = self.tokenizer.encode_chat(messages, add_generation_prompt=True).ids
            return self._choices([prompt], request), None
        grounding, prompt = self._ground(messages, wanted)
        return (self._choices([prompt], request) if prompt else []), grounding

    def _retrieval(self, asked: Retrieval | bool | None) -> Retrieval | None:
        if self.index is None:
            if asked:
                raise ApiError(400, "this server has no documents to retrieve from", param="retrieval")
            return None
        if asked is False:
            return None
        return asked if isinstance(asked, Retrieval) else Retrieval()

    def _ground(self, messages: Sequence[dict[str, str]], wanted: Retrieval) -> tuple[Grounding, list[int]]:
        """What was found for the last message, and the prompt that holds it; no prompt if nothing is to be written."""
        assert self.index is not None
        question = messages[-1]["content"]
        top_k = self.params.top_k_passages if wanted.top_k is None else wanted.top_k
        refuse_below = self.params.refuse_below if wanted.refuse_below is None else wanted.refuse_below
        grounds = find_grounds(self.index, question, top_k, refuse_below)
        if grounds.refused or self.params.answers == "extractive":
            return Grounding(grounds, grounds.passages, grounds.refused), []
        if self.params.answers == "closed-book":
            prompt_ids = self.tokenizer.encode_chat(messages, add_generation_prompt=True).ids
            return Grounding(grounds, grounds.passages, False), prompt_ids
        room = self.generator.context_length - min(self.params.max_new_tokens, self.generator.context_length // 4)
        prompt = grounded_prompt(messages, grounds.passages, self.tokenizer, room)
        return Grounding(grounds, prompt.passages, not prompt.passages), prompt.ids

    def completion_choices(self, request: CompletionRequest) -> list[Choice]:
        """The continuations to generate, `n` for each prompt. Text is framed as a training document begins."""
        self.check_model(request.model)
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        whole = self.generator.encoder_decoder

        def framed(text: str) -> list[int]:
            return self.tokenizer.encode_document(text) if whole else bos + self.tokenizer.encode(text)

        prompts = [framed(p) if isinstance(p, str) else list(p) for p in request.prompts]
        for prompt in prompts:
            if any(not 0 <= token < self.generator.vocab_size for token in prompt):
                raise ApiError(400, f"a token id is outside the vocabulary of {self.generator.vocab_size}", "prompt")
        return self._choices(prompts, request)

    def _choices(self, prompts: Sequence[Sequence[int]], request: ChatRequest | CompletionRequest) -> list[Choice]:
        for prompt in prompts:
            self.generator.room(prompt)
        seed = random.randrange(SEEDS) if request.seed is None else request.seed
        return [
            Choice(
                index=at * request.n + number,
                prompt=prompt,
                sampling=self.sampling(request, (seed + number) % SEEDS, request.limit),
                stop=request.stops,
                scored=request.scored,
            )
            for at, prompt in enumerate(prompts)
            for number in range(request.n)
        ]

    def sampling(self, request: CommonRequest, seed: int, limit: int | None) -> Sampling:
        """What the request says, else the model's `generation_config.json`, beams included.

        A request that filters tokens without giving a temperature means OpenAI's default of 1, as greedy decoding
        would make its filter idle.
        """
        temperature = self.default.temperature if request.temperature is None else request.temperature
        if request.temperature is None and temperature == 0 and (request.top_p is not None or request.top_k):
            temperature = 1.0
        max_new_tokens = limit or self.params.max_new_tokens
        if self.default.beams > 1 and temperature == 0:
            return replace(self.default, max_new_tokens=max_new_tokens, seed=seed)
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=self.default.top_k if request.top_k is None else request.top_k,
            top_p=self.default.top_p if request.top_p is None else request.top_p,
            seed=seed,
        )
