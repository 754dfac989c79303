"""One answer over HTTP, whole or as server-sent events; the client's departure ends the generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.requests import Request

from llmctl import LlmctlError
from llmctl.text.grounding import REFUSAL, CitationFilter, citations, missing_citation, quote
from llmctl.text.retrieval import Index
from llmctl.text.streaming import Delta
from llmctl_serve.errors import ApiError
from llmctl_serve.exchange import Exchange
from llmctl_serve.requests import ChatRequest, CompletionRequest
from llmctl_serve.responses import DONE, Answered, Shape, event, grounds_fields, usage_counts
from llmctl_serve.service import Grounding, Service
from llmctl_serve.worker import Choice, Job, Piece, Worker


@dataclass
class Answer:
    """A request that has been accepted: its choices are queued, or its text is settled already."""

    shape: Shape
    count: int
    prompt_tokens: int
    job: Job | None
    cancel: Callable[[Job], None]
    index: Index | None = None
    grounding: Grounding | None = None
    done: list[Answered] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.done = [Answered() for _ in range(self.count)]
        passages = self.grounding.passages if self.grounding else []
        self._filters = [CitationFilter(len(passages)) for _ in range(self.count)]

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(choice, text, finish reason) as they come. Leaving early cancels the generation."""
        if self.job is None:
            for index in range(self.count):
                yield self._take(Piece(index, Delta(self._settled(), [], "stop")))
            return
        try:
            while (item := await self.job.pieces.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield self._take(item)
        finally:
            self.cancel(self.job)

    def _settled(self) -> str:
        assert self.grounding is not None and self.index is not None
        return REFUSAL if self.grounding.refused else quote(self.index, self.grounding.grounds)

    def _take(self, piece: Piece) -> tuple[int, str, str | None]:
        """Note a piece, with citations made right in an answer from documents."""
        answer = self.done[piece.index]
        text = piece.delta.text
        last = piece.delta.finish_reason
        if self.grounding is not None and self.index is not None and self.job is not None:
            cleaner = self._filters[piece.index]
            text = cleaner.add(text) + (cleaner.flush() if last else "")
            if last:
                text += missing_citation(self.index, answer.text + text, self.grounding.passages)
        answer.text += text
        answer.tokens += len(piece.delta.token_ids)
        answer.finish_reason = last
        if last and self.job is not None:
            self.job.exchange.finished(last, piece.index, answer.text)
        answer.scores = piece.scores if last and piece.scores else answer.scores
        return piece.index, text, last

    def usage(self) -> dict[str, int]:
        """Token counts so far."""
        return usage_counts(self.prompt_tokens, sum(answer.tokens for answer in self.done))

    def extension(self) -> dict[str, Any]:
        """Citations, for an answer from documents; those of the first choice."""
        if self.grounding is None:
            return {}
        return grounds_fields(citations(self.done[0].text, self.grounding.passages), self.grounding.refused)


async def chat_answer(service: Service, worker: Worker, exchange: Exchange, body: ChatRequest) -> Answer:
    """Accept a chat request. ApiError, LlmctlError or QueueFullError refuse it before anything is sent."""
    # Tokenizing and searching take milliseconds; the event loop goes on meanwhile.
    choices, grounding = await asyncio.to_thread(service.chat_choices, body)
    return _accept(Shape("chat", service.model_id), service, worker, exchange, choices, body.n, grounding)


async def completion_answer(service: Service, worker: Worker, exchange: Exchange, body: CompletionRequest) -> Answer:
    """Accept a text completion, as `chat_answer`."""
    choices = await asyncio.to_thread(service.completion_choices, body)
    return _accept(Shape("completion", service.model_id), service, worker, exchange, choices, body.n, None)


def _accept(
    shape: Shape,
    service: Service,
    worker: Worker,
    exchange: Exchange,
    choices: Sequence[Choice],
    n: int,
    grounding: Grounding | None,
) -> Answer:
    job = None
    if choices:
        job = Job(choices, asyncio.get_running_loop(), exchange)
    prompt_tokens = sum(len(choice.prompt) for choice in choices[::n])
    exchange.asked(
        model=service.model_id,
        prompt_tokens=prompt_tokens,
        max_tokens=sum(choice.sampling.max_new_tokens for choice in choices),
        operation={"chat": "chat", "completion": "text_completion"}[shape.kind],
        settings=asdict(choices[0].sampling) if choices else {},
        prompts=[{"token_ids": list(choice.prompt)} for choice in choices[::n]],
    )
    if job is not None:
        worker.submit(job)
    return Answer(shape, len(choices) or n, prompt_tokens, job, worker.cancel, service.index, grounding)


async def answer_whole(answer: Answer, request: Request) -> dict[str, Any]:
    """The complete body; the client's departure cancels."""
    collect = asyncio.ensure_future(_collect(answer))
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({collect, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not collect.done():
            raise ApiError(499, "the client has left")
        await collect
    finally:
        for task in (collect, gone):
            task.cancel()
    return answer.shape.whole(answer.done, answer.usage(), **answer.extension())


async def _collect(answer: Answer) -> None:
    async for _ in answer.pieces():
        pass


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def answer_stream(answer: Answer, include_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events, ended by `[DONE]`; an error on the way is an event of its own."""
    extra = {"usage": None} if include_usage else {}
    opened: set[int] = set()
    pieces = answer.pieces()
    try:
        async for index, text, reason in pieces:
            if index not in opened:
                opened.add(index)
                if (opening := answer.shape.opening(index)) is not None:
                    yield event({**opening, **extra})
            for chunk in answer.shape.part(index, text, reason):
                last = bool(reason) and index == answer.count - 1 and chunk["choices"][0]["finish_reason"] is not None
                yield event({**chunk, **extra, **(answer.extension() if last else {})})
        if include_usage:
            yield event(answer.shape.usage(answer.usage()))
        yield DONE
    except ApiError as error:
        yield event(error.body())
    except LlmctlError as error:
        yield event(ApiError(500, error.message).body())
    except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:  # what a model raises
        yield event(ApiError(500, f"generation failed: {type(error).__name__}").body())
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]  # an async generator: its end cancels the job
