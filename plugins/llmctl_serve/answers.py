"""One answer over HTTP, whole or as server-sent events; the client's departure ends the generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from llmctl import LlmctlError
from llmctl.engine import TokenScores
from llmctl.text.grounding import REFUSAL, CitationFilter, citations, missing_citation, quote
from llmctl_serve.constraining import CallReader
from llmctl_serve.conversations import ChatRequest
from llmctl_serve.errors import ApiError, to_api
from llmctl_serve.exchange import Exchange, exchange_of
from llmctl_serve.logprobs import TokenScore, named, offsets
from llmctl_serve.models import Models, Served
from llmctl_serve.requests import HARMLESS, CompletionRequest
from llmctl_serve.responses import (
    DONE,
    Answered,
    Part,
    Scored,
    Shape,
    event,
    grounds_fields,
    usage_counts,
)
from llmctl_serve.service import Asked, Service
from llmctl_serve.speech import Piece
from llmctl_serve.worker import Job


@dataclass
class Answer:
    """A request that has been accepted: its prompts are queued, or its text is settled already."""

    model: Served
    shape: Shape
    asked: Asked
    body: ChatRequest | CompletionRequest
    exchange: Exchange
    job: Job | None = None
    done: list[Answered] = field(default_factory=list)
    cached: int = 0
    failure: BaseException | None = None
    """What the engine said instead of an answer; it has been warned of."""
    _closed: bool = False
    _begun: set[int] = field(default_factory=set)
    _prompt_scores: dict[int, list[Scored]] = field(default_factory=dict)
    _held: list[Piece] = field(default_factory=list)
    """Pieces that came before the scores of the prompt that they are to follow."""

    def __post_init__(self) -> None:
        count = max(1, len(self.asked.prompts)) * self.asked.draws
        scored = self.body.scored is not None
        self.done = [Answered(scores=[] if scored else None) for _ in range(count)]
        grounding = self.asked.grounding
        self._filters = [CitationFilter(len(grounding.passages) if grounding else 0) for _ in range(count)]
        self._readers: list[CallReader | None] = [self._reader() for _ in range(count)]

    @property
    def service(self) -> Service:
        """The model's service."""
        return self.model.service

    def _reader(self) -> CallReader | None:
        if not isinstance(self.body, ChatRequest) or not self.body.callable_tools or self.job is None:
            return None
        return CallReader(self.body)

    @property
    def _echoes(self) -> bool:
        return isinstance(self.body, CompletionRequest) and self.body.echo

    def close(self) -> None:
        """Give up what still runs, and let the model go. Further calls change nothing."""
        if self._closed:
            return
        self._closed = True
        for index, answer in enumerate(self.done):
            if answer.tokens or answer.finish_reason is not None:
                self.exchange.said(index, answer.text, answer.calls)
        if self.job is not None and self.model.worker is not None:
            self.model.worker.cancel(self.job)
        self.model.release()

    async def parts(self) -> AsyncIterator[Part]:
        """What is new, as it comes; ends when all choices have."""
        if self.job is None:
            text = await asyncio.to_thread(self._settled)  # an encoder may read every sentence of a passage
            for index in range(len(self.done)):
                self.exchange.finished("stop", index)
                yield self._note(Part(index, text, finish_reason="stop"))
            return
        while (item := await self.job.pieces.get()) is not None:
            if isinstance(item, BaseException):
                self.failure = item
                raise item
            for part in await asyncio.to_thread(self._take, item) if self._is_long(item) else self._take(item):
                yield part

    def _is_long(self, piece: Piece) -> bool:
        """Whether taking it holds up everybody's stream: thousands of scores, or an encoder that reads the answer."""
        reads = self.asked.grounding is not None and piece.finish_reason is not None
        return reads or piece.prompt_scores is not None

    def _settled(self) -> str:
        grounding, index = self.asked.grounding, self.service.index
        assert grounding is not None and index is not None
        return REFUSAL if grounding.refused else quote(index, grounding.grounds)

    def _take(self, piece: Piece) -> Sequence[Part]:
        """The parts that a piece makes possible: itself, and what waited for the scores of the prompt."""
        prompt = piece.index // self.asked.draws
        self.cached += piece.cached if piece.index % self.asked.draws == 0 else 0
        if not self._echoes or self.body.scored is None:
            return [self._part(piece)]
        if piece.prompt_scores is not None:
            self._prompt_scores[prompt] = self._scored_prompt(prompt, piece.prompt_scores)
        if prompt not in self._prompt_scores:
            self._held.append(piece)
            return []
        freed = [one for one in self._held if one.index // self.asked.draws == prompt]
        self._held = [one for one in self._held if one not in freed]
        return [self._part(one) for one in [*freed, piece]]

    def _part(self, piece: Piece) -> Part:
        answer = self.done[piece.index]
        answer.tokens += piece.tokens
        text, scores = piece.text, self._scores(piece)
        calls: list[dict[str, Any]] = []
        answer.total += sum(one.logprob for one, _ in piece.scores)
        if piece.finish_reason is not None and piece.end is not None:
            answer.total += piece.end.logprob
        if (reader := self._readers[piece.index]) is not None:
            text, calls = reader.add(text)
            if piece.finish_reason is not None:
                rest, more = reader.flush()
                text, calls = text + rest, [*calls, *more]
        reason: str | None = piece.finish_reason
        if reason == "stop" and (answer.calls or calls):
            reason = "tool_calls"
        part = Part(piece.index, self._cited(piece.index, text, reason is not None), calls, scores, reason)
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            self._open(part)
        if reason is not None:
            self.exchange.finished(reason, piece.index)
        return self._note(part)

    def _open(self, part: Part) -> None:
        """Put the prompt before the first text, where the response is to repeat it."""
        if not self._echoes:
            return
        prompt = part.index // self.asked.draws
        part.text = self.asked.texts[prompt] + part.text
        part.scores = [*self._prompt_scores.get(prompt, ()), *part.scores]

    def _scored_prompt(self, prompt: int, found: Sequence[TokenScores | None]) -> list[Scored]:
        tokenizer, ids = self.service.tokenizer, self.asked.prompts[prompt].request.prompt
        texts = [tokenizer.decode([token], skip_special=False) for token in ids]
        return [
            Scored(TokenScore(text, 0.0), at, known=False) if one is None else Scored(named(tokenizer, one), at)
            for text, one, at in zip(texts, found, offsets(tokenizer, ids), strict=True)
        ]

    def _scores(self, piece: Piece) -> list[Scored]:
        if self.body.scored is None:
            return []
        before = len(self.asked.texts[piece.index // self.asked.draws]) if self._echoes else 0
        tokenizer = self.service.tokenizer
        found = [Scored(named(tokenizer, score), before + at) for score, at in piece.scores]
        if self._echoes and piece.end is not None:
            # Evaluation harnesses ask for one token and drop the last score: an end is one, or a prompt's would go.
            # The text so far begins with the prompt as soon as something has been sent.
            so_far = max(before, len(self.done[piece.index].text))
            found.append(Scored(named(tokenizer, piece.end), so_far + len(piece.text)))
        return found

    def _cited(self, index: int, text: str, last: bool) -> str:
        """Text with citations made right, in an answer from documents."""
        grounding, documents = self.asked.grounding, self.service.index
        if grounding is None or documents is None or self.job is None:
            return text
        cleaner = self._filters[index]
        text = cleaner.add(text) + (cleaner.flush() if last else "")
        if last:
            text += missing_citation(documents, self.done[index].text + text, grounding.passages)
        return text

    def _note(self, part: Part) -> Part:
        self.done[part.index].add(part)
        return part

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        return usage_counts(self.asked.prompt_tokens, sum(answer.tokens for answer in self.done), self.cached)

    def extension(self) -> dict[str, Any]:
        """Citations, for an answer from documents; those of the first choice."""
        if self.asked.grounding is None:
            return {}
        grounding = self.asked.grounding
        return grounds_fields(citations(self.done[0].text, grounding.passages), grounding.refused)

    def chosen(self) -> list[Answered]:
        """The choices to give: of more draws than were asked for, each prompt's likeliest by the mean of its tokens."""
        draws, n = self.asked.draws, self.body.n
        if draws == n:
            return self.done
        chosen = []
        for start in range(0, len(self.done), draws):
            ranked = sorted(self.done[start : start + draws], key=lambda one: -one.total / max(1, one.tokens))
            chosen += ranked[:n]
        if self.body.scored is None:
            for answer in chosen:
                answer.scores = None
        return chosen


async def chat_answer(models: Models, body: ChatRequest, request: Request) -> Answer:
    """Accept a chat request. ApiError or LlmctlError refuse it before anything is sent."""
    return await _accept("chat", models, body, request, lambda service, client: service.ask_chat(body, client))


async def completion_answer(models: Models, body: CompletionRequest, request: Request) -> Answer:
    """Accept a text completion, as `chat_answer`."""
    return await _accept(
        "completion", models, body, request, lambda service, client: service.ask_completion(body, client)
    )


async def _accept(
    kind: Any,
    models: Models,
    body: ChatRequest | CompletionRequest,
    request: Request,
    ask: Callable[[Service, str], Asked],
) -> Answer:
    exchange = exchange_of(request)
    model = models.use(body.model)
    job = None
    try:
        service = model.service
        # Tokenizing and searching take milliseconds; the event loop goes on meanwhile.
        asked = await asyncio.to_thread(ask, service, exchange.key_id or exchange.client)
        exchange.asked(
            model=service.model_id,
            artifact=service.artifact.id,
            prompt_tokens=asked.prompt_tokens,
            max_tokens=asked.max_tokens,
            at_once=asked.at_once,
            operation="chat" if kind == "chat" else "text_completion",
            stream=body.stream,
            settings={**settings(body), "seed": asked.prompts[0].request.sampling.seed if asked.prompts else None},
            prompts=[list(prompt.request.prompt) for prompt in asked.prompts] or asked.questions,
        )
        exchange.masking = asked.masking
        if asked.prompts:
            assert model.worker is not None
            job = Job(asked.prompts, exchange)
            await model.worker.submit(job)
        return Answer(model, Shape(kind, service.model_id, service.fingerprint), asked, body, exchange, job)
    except BaseException:
        if job is not None and model.worker is not None:
            model.worker.cancel(job)  # nobody would read its pieces
        model.release()
        raise


SAID = {"model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens", *HARMLESS}
"""Fields that do not decide what is answered, or that the log has elsewhere."""


def settings(body: ChatRequest | CompletionRequest) -> dict[str, Any]:
    """How the request wants to be answered, as it says so."""
    found = body.model_dump(include=body.model_fields_set - SAID, exclude_none=True, by_alias=True)
    return {**found, **({} if body.limit is None else {"max_tokens": body.limit})}


async def answer_whole(answer: Answer, request: Request) -> dict[str, Any]:
    """The complete body; the client's departure cancels."""
    collect = asyncio.ensure_future(_collect(answer))
    gone = asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait({collect, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not collect.done():
            answer.exchange.cut = answer.exchange.cut or "client_left"
            raise ApiError(499, "the client has left")
        await collect
    finally:
        for task in (collect, gone):
            task.cancel()
        answer.close()
    return answer.shape.whole(answer.chosen(), answer.usage(), **answer.extension())


async def _collect(answer: Answer) -> None:
    async for _ in answer.parts():
        pass


async def until_gone(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def answer_stream(answer: Answer, warn: Callable[[str], None]) -> AsyncIterator[bytes]:
    """Server-sent events, ended by `[DONE]`; an error on the way is an event of its own."""
    extra = {"usage": None} if answer.body.include_usage else {}
    scored = answer.body.scored is not None
    opened: set[int] = set()
    try:
        async for part in answer.parts():
            if part.index not in opened:
                opened.add(part.index)
                if (opening := answer.shape.opening(part.index)) is not None:
                    yield event({**opening, **extra})
            over = part.finish_reason is not None and all(one.finish_reason for one in answer.done)
            for chunk in answer.shape.part(part, scored):
                last = over and chunk["choices"][0]["finish_reason"] is not None
                yield event({**chunk, **extra, **(answer.extension() if last else {})})
        if answer.body.include_usage:
            yield event(answer.shape.usage(answer.usage()))
        yield DONE
    except ApiError as error:
        answer.exchange.failed(error.code or "server_error")
        yield event(error.body())
    except LlmctlError as error:
        answer.exchange.failed("server_error")
        yield event(to_api(error).body())
    except Exception as error:  # whatever a model raises: ONNX Runtime's errors have no narrower base
        if error is not answer.failure:
            warn(f"a stream failed: {type(error).__name__}: {error}")
        answer.exchange.failed("server_error")
        yield event(ApiError(500, f"generation failed: {type(error).__name__}").body())
    finally:
        answer.close()
