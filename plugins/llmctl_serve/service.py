"""From a request to tokens: a model, its tokenizer, the index, and how a request becomes prompts for the engine."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmctl import Artifact, UsageError
from llmctl.engine import Constraint, Engine, Request
from llmctl.generator import Generator, Sampling
from llmctl.ort.encoder import OrtEncoder
from llmctl.text.grounding import Grounds, find_grounds, grounded_prompt
from llmctl.text.masking import MaskingTime, TimedConstraint
from llmctl.text.retrieval import Index, Passage
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.constraining import Forms
from llmctl_serve.conversations import ChatRequest, Retrieval
from llmctl_serve.errors import ApiError
from llmctl_serve.guides import guide_of
from llmctl_serve.params import ServeParams
from llmctl_serve.requests import CommonRequest, CompletionRequest
from llmctl_serve.worker import Prompt

SEEDS = 2**62
NEVER = -1e9
"""Added to the logit of an end that is not to come."""


@dataclass(frozen=True)
class Grounding:
    """What a chat answer rests on. Without prompts it is settled already: quoted, or refused."""

    grounds: Grounds
    passages: list[Passage]
    refused: bool


@dataclass(frozen=True)
class Asked:
    """A request made ready: what the engine is given, and what the response needs to know."""

    prompts: Sequence[Prompt]
    draws: int
    """Answers generated for each prompt."""
    texts: Sequence[str] = ()
    """Each prompt's own text, where the response is to repeat it."""
    grounding: Grounding | None = None
    masking: MaskingTime | None = None
    """What following the form of the answers takes, where they have one."""

    at_once: bool = False
    """Whether nothing of some answer is known before its end."""

    @property
    def questions(self) -> list[str]:
        """What was asked of the documents."""
        return [] if self.grounding is None else [self.grounding.grounds.question]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(prompt.request.prompt) for prompt in self.prompts)

    @property
    def max_tokens(self) -> int:
        """Most that could be generated."""
        return sum(0 if p.only_scores else p.request.sampling.max_new_tokens * len(p.choices) for p in self.prompts)


@dataclass(frozen=True)
class Service:
    """What answers requests with one model, apart from HTTP and threads. An encoder has no generator and no engine."""

    model_id: str
    artifact: Artifact
    tokenizer: Tokenizer
    params: ServeParams
    generator: Generator | None = None
    engine: Engine | None = None
    encoder: OrtEncoder | None = None
    default: Sampling = field(default_factory=Sampling)
    index: Index | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    forms: Forms | None = None
    adapter: str | None = None
    """Which adapter answers; None: the model as it is."""
    parent: str | None = None
    """The model that the adapter is of."""

    @property
    def context_length(self) -> int:
        """Most tokens of one sequence."""
        opened = self.engine or self.encoder
        assert opened is not None
        return opened.context_length

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return self.tokenizer.vocab_size if self.engine is None else self.engine.vocab_size

    @property
    def backend(self) -> str:
        """For a human."""
        opened = self.engine or self.encoder
        assert opened is not None
        return opened.backend

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of responses: changes with the model's bytes."""
        return f"fp_{self.artifact.id.removeprefix('sha256:')[:16] or self.model_id}"

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that the model can answer with."""
        return tuple(getattr(self.generator, "adapter_names", ()))

    def adapted(self, name: str) -> Service:
        """The same model with its adapter `name`, under an id of its own, `MODEL:ADAPTER`."""
        return replace(self, model_id=f"{self.model_id}:{name}", adapter=name, parent=self.model_id)

    def _generates(self) -> tuple[Generator, Engine]:
        if self.generator is None or self.engine is None:
            raise ApiError(400, f"the model `{self.model_id}` is an encoder: it gives embeddings", param="model")
        return self.generator, self.engine

    def ask_chat(self, request: ChatRequest, client: str) -> Asked:
        """The prompt of a conversation, and what its answer rests on if the server has documents."""
        self._generates()
        messages = [message.plain() for message in request.messages]
        wanted = self._retrieval(request)
        if wanted is None:
            ids = self.chat_ids(messages, request)
            return self._asked([ids], request, client)
        grounding, ids = self._ground(messages, wanted)
        return replace(self._asked([ids] if ids else [], request, client), grounding=grounding)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], request: ChatRequest | None = None) -> list[int]:
        """The ids of a conversation, up to where the assistant speaks."""
        tools = [] if request is None else [tool.model_dump(exclude_none=True) for tool in request.callable_tools]
        more = {"tools": tools} if tools else {}
        return self.tokenizer.encode_chat(messages, add_generation_prompt=True, **more).ids

    def _retrieval(self, request: ChatRequest) -> Retrieval | None:
        """How the answer uses the documents; None if it does not. ApiError 400 if it is told to and cannot."""
        asked = request.retrieval
        if asked is False or (self.index is None and not asked):
            return None
        why = "this server has no documents to retrieve from"
        if self.index is not None:
            why = ungrounded(request)
        if not why:
            return asked if isinstance(asked, Retrieval) else Retrieval()
        if asked:
            raise ApiError(400, why, param="retrieval")
        return None

    def _ground(self, messages: Sequence[dict[str, Any]], wanted: Retrieval) -> tuple[Grounding, list[int]]:
        """What was found for the last message, and the prompt that holds it; no prompt if nothing is to be written."""
        assert self.index is not None
        question = str(messages[-1]["content"])
        top_k = self.params.top_k_passages if wanted.top_k is None else wanted.top_k
        refuse_below = self.params.refuse_below if wanted.refuse_below is None else wanted.refuse_below
        grounds = find_grounds(self.index, question, top_k, refuse_below)
        if grounds.refused or self.params.answers == "extractive":
            return Grounding(grounds, grounds.passages, grounds.refused), []
        if self.params.answers == "closed-book":
            return Grounding(grounds, grounds.passages, False), self.chat_ids(messages)
        room = self.context_length - min(self.params.max_new_tokens, self.context_length // 4)
        prompt = grounded_prompt(messages, grounds.passages, self.tokenizer, room)
        return Grounding(grounds, prompt.passages, not prompt.passages), prompt.ids

    def ask_completion(self, request: CompletionRequest, client: str) -> Asked:
        """The prompts to continue. Text is framed as a training document begins."""
        generator, _ = self._generates()
        if request.echo and generator.encoder_decoder:
            raise ApiError(400, "the answer of an encoder-decoder does not continue its prompt", param="echo")
        ids = [self.framed(p) if isinstance(p, str) else self.checked(p, "prompt") for p in request.prompts]
        texts = [
            prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) if request.echo else ""
            for prompt in request.prompts
        ]
        return replace(self._asked(ids, request, client), texts=texts)

    def framed(self, text: str) -> list[int]:
        """The ids of a text that begins like a training document; an encoder reads a whole one."""
        if self.generator is None:
            return self.tokenizer.frame(text).ids
        if self.generator.encoder_decoder:
            return self.tokenizer.encode_document(text)
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(text)

    def checked(self, ids: Sequence[int], param: str) -> list[int]:
        """`ids`; ApiError 400 for one outside the vocabulary."""
        if any(not 0 <= token < self.vocab_size for token in ids):
            raise ApiError(400, f"a token id is outside the vocabulary of {self.vocab_size}", param)
        return list(ids)

    def _asked(self, prompts: Sequence[Sequence[int]], request: ChatRequest | CompletionRequest, client: str) -> Asked:
        constraint, masking = self._constraint(request) if prompts else None, None
        if constraint is not None:
            masking = MaskingTime()
            constraint = TimedConstraint(constraint, masking)
        made = self._prompts(prompts, request, client, constraint)
        _, engine = self._generates()
        tells = getattr(engine, "at_once", None)  # a plugin's engine may be older than the question
        at_once = tells is not None and any(tells(prompt.request) for prompt in made)
        return Asked(made, request.draws, masking=masking, at_once=at_once)

    def _prompts(
        self,
        prompts: Sequence[Sequence[int]],
        request: ChatRequest | CompletionRequest,
        client: str,
        constraint: Constraint | None,
    ) -> list[Prompt]:
        generator, engine = self._generates()
        rooms = [self._room(prompt, generator, engine) for prompt in prompts]
        sampling = self.sampling(request, request.limit, request.draws)
        shared = sampling.n == 1 and request.draws > 1
        scored = request.scored
        if scored is None and request.draws > request.n:
            scored = 0  # the likeliest of the draws are wanted
        found = []
        for at, prompt in enumerate(prompts):
            targets = range(at * request.draws, (at + 1) * request.draws)
            asked = Request(
                prompt=prompt,
                # No more is generated, so no more is taken from the client's allowance.
                sampling=replace(sampling, max_new_tokens=min(sampling.max_new_tokens, rooms[at])),
                constraint=constraint,
                logprobs=scored,
                prompt_logprobs=request.scored if getattr(request, "echo", False) else None,
                client=client,
                adapter=self.adapter,
            )
            found.append(
                Prompt(
                    request=asked,
                    choices=[list(targets)] if shared else [[target] for target in targets],
                    stop=request.stops,
                    stop_ids=frozenset(self.checked(request.stop_token_ids or (), "stop_token_ids")),
                    only_scores=request.limit == 0,
                )
            )
        return found

    def _room(self, prompt: Sequence[int], generator: Generator, engine: Engine) -> int:
        """Most tokens of an answer. UsageError for a prompt that cannot be answered, before anything else is done."""
        room = generator.room(prompt)
        if generator.encoder_decoder:
            return room
        if len(prompt) >= engine.context_length:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, the context of this server is {engine.context_length}",
                hint="shorten the prompt",
            )
        return min(room, engine.context_length - len(prompt))

    def _constraint(self, request: ChatRequest | CompletionRequest) -> Constraint | None:
        """What the answer must look like. ApiError 400 names the field that cannot be followed."""
        form = request.response_format if isinstance(request, ChatRequest) else None
        guide = guide_of(request, form)
        tools = request.callable_tools if isinstance(request, ChatRequest) else []
        if guide is None and not tools:
            return None
        assert self.forms is not None
        if guide is not None:
            return self.forms.guided(guide)
        assert isinstance(request, ChatRequest)
        return self.forms.calling(request)

    def sampling(self, request: CommonRequest, limit: int | None, draws: int = 1) -> Sampling:
        """What the request says, else the model's `generation_config.json`, beams included.

        A request that filters tokens without giving a temperature means OpenAI's default of 1, as greedy decoding
        would make its filter idle. Greedy answers are equal, so one is generated however many are wanted.
        """
        filters = request.top_p is not None or request.top_k or request.min_p
        temperature = self.default.temperature if request.temperature is None else request.temperature
        if request.temperature is None and temperature == 0 and (filters or draws > request.n):
            temperature = 1.0
        common: dict[str, Any] = {
            "max_new_tokens": max(1, self.params.max_new_tokens if limit is None else limit),
            "seed": random.randrange(SEEDS) if request.seed is None else request.seed % SEEDS,
            "logit_bias": self._bias(request),
        }
        penalties = {
            name: getattr(self.default if getattr(request, name) is None else request, name)
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        }
        rules = self.default.rules
        if rules is not None and request.ignore_eos:
            rules = replace(rules, forced_eos_token_id=())
        if self.default.beams > 1 and temperature == 0:
            return replace(self.default, **common, **penalties, rules=rules, n=draws)
        return Sampling(
            **common,
            **penalties,
            temperature=temperature,
            top_k=self.default.top_k if request.top_k is None else request.top_k,
            top_p=self.default.top_p if request.top_p is None else request.top_p,
            min_p=self.default.min_p if request.min_p is None else request.min_p,
            rules=rules,
            n=draws if temperature > 0 else 1,
        )

    def _bias(self, request: CommonRequest) -> tuple[tuple[int, float], ...]:
        bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
        self.checked(list(bias), "logit_bias")
        if request.ignore_eos and self.engine is not None:
            bias |= dict.fromkeys(self.engine.eos_ids, NEVER)
        return tuple(sorted(bias.items()))


def ungrounded(request: ChatRequest) -> str:
    """Why a chat cannot be answered from documents; empty if it can.

    Such an answer is prose whose citations are made right, or a refusal, and what is searched for is a question.
    """
    if request.callable_tools or guide_of(request, request.response_format) is not None:
        return "an answer from documents is text with citations: it cannot keep to a form or call tools"
    if request.messages[-1].role != "user":
        return "an answer from documents needs a question of the user as the last message"
    return ""
