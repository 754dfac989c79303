"""Answers to many lines: batches through a model that is opened here, or side by side through a server."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import click

from llmctl import InputError, LlmctlError, StageError, UsageError
from llmctl.console import human_seconds
from llmctl.generator import Candidate, Sampling
from llmctl.text.masking import MaskingTime
from llmctl_serve.candidates import Output, Said, answers
from llmctl_serve.defaults import default_sampling
from llmctl_serve.endpoint import HttpFailure, read_usage, whole_characters
from llmctl_serve.jobs import STDIO, Job, LineError, Results, id_key, read_jobs
from llmctl_serve.remote import RemoteSession, request_fields, score_fields
from llmctl_serve.session import Session

Row = dict[str, Any]
HEARTBEAT = 10.0
TRIES = 4
"""Of a request that a server is too busy for; waits double from half a second, and are as long as the server says."""
MOST_WAIT = 60.0
"""Seconds."""
BUSY = ("status 429", "status 503", "no connection")


class Answerer(Protocol):
    """Answers jobs; the rows come in their order."""

    @property
    def masking(self) -> MaskingTime:
        """What following the form of the answers took here; nothing where a server does it."""

    def answer(self, jobs: Iterator[Job]) -> Iterator[list[Row]]:
        """Rows of answers and errors, some at a time."""


def row_of(job: Job, found: dict[str, Any]) -> Row:
    """A line of the output: the id, what the job carries, and what was found."""
    return {"id": job.id, **job.carried, **found}


def error_row(job: Job, kind: str, message: str) -> Row:
    """A line for a job without an answer."""
    return row_of(job, {"error": {"type": kind, "message": message}})


# -- a model that is opened here --------------------------------------------------------------------------------------


@dataclass
class LocalAnswers:
    """Batches of prompts through one generator; prompts that are chosen alike run side by side."""

    session: Session
    given: dict[str, Any]
    output: Output
    directory: Path
    size: int = 16
    masking: MaskingTime = field(default_factory=MaskingTime)

    def answer(self, jobs: Iterator[Job]) -> Iterator[list[Row]]:
        """Rows of one batch at a time."""
        batch: list[Job] = []
        for job in jobs:
            batch.append(job)
            if len(batch) == self.size:
                yield self._batch(batch)
                batch = []
        if batch:
            yield self._batch(batch)

    def _batch(self, jobs: Sequence[Job]) -> list[Row]:
        rows: dict[int, Row] = {}
        groups: dict[Any, list[tuple[int, list[int]]]] = {}
        for at, job in enumerate(jobs):
            try:
                key, ids = self._prepare(job)
                groups.setdefault(key, []).append((at, ids))
            except LineError as problem:
                rows[at] = error_row(job, problem.kind, problem.message)
        for (sampling, stop, logprobs), asked in groups.items():
            session = replace(self.session, sampling=sampling, stop=stop)
            told = self._tried(session, [ids for _, ids in asked], logprobs)
            for (at, ids), found in zip(asked, told, strict=True):
                if isinstance(found, LineError):
                    rows[at] = error_row(jobs[at], found.kind, f"{jobs[at].where}: {found.message}")
                else:
                    rows[at] = row_of(jobs[at], {**self._described(found, sampling), "prompt_tokens": len(ids)})
        return [rows[at] for at in range(len(jobs))]

    def _prepare(self, job: Job) -> tuple[tuple[Sampling, tuple[str, ...], int | None], list[int]]:
        if job.problem is not None:
            raise job.problem
        overrides = dict(job.overrides)
        stop = tuple(overrides.pop("stop", self.session.stop))
        logprobs = overrides.pop("logprobs", self.output.logprobs)
        if logprobs is not None and not 0 <= logprobs <= 20:
            raise LineError("bad_line", f"{job.where}: `logprobs` is {logprobs}, not 0 to 20")
        try:
            sampling = default_sampling(self.directory, **{**self.given, **overrides})
            if job.messages is not None:
                system = [{"role": "system", "content": self.session.system}] if self.session.system else []
                has_own = job.messages[0]["role"] == "system"
                turns = job.messages if has_own else [*system, *job.messages]
                ids = self.session.tokenizer.encode_chat(turns, add_generation_prompt=True).ids
            else:
                ids = self.session.beginning(job.prompt or "")
            self.session.generator.room(ids)
        except (UsageError, InputError) as error:
            raise LineError("invalid_request", f"{job.where}: {error.message}") from error
        return (sampling, stop, logprobs), ids

    def _tried(self, session: Session, prompts: list[list[int]], logprobs: int | None) -> list[list[Said] | LineError]:
        """What each prompt was answered. Those of a batch that fails are asked one by one: one may be to blame."""
        try:
            return [*self._said(session, prompts, logprobs)]
        except LlmctlError as error:
            problem = LineError("invalid_request", error.message)
        except Exception as error:  # whatever a model raises: its line says so, and the other lines are answered
            problem = LineError("generation_failed", f"{type(error).__name__}: {error}")
        if len(prompts) == 1:
            return [problem]
        return [found for prompt in prompts for found in self._tried(session, [prompt], logprobs)]

    def _said(self, session: Session, prompts: list[list[int]], logprobs: int | None) -> list[list[Said]]:
        spent = MaskingTime()
        try:
            return self._answered(session, prompts, logprobs, spent)
        finally:
            self.masking.add(spent)

    def _answered(
        self, session: Session, prompts: list[list[int]], logprobs: int | None, masking: MaskingTime
    ) -> list[list[Said]]:
        sampling, generator = session.sampling, session.generator
        if sampling.n > 1 or sampling.beams > 1 or logprobs is not None or self.output.best_of:
            return [answers(session, prompt, masking, logprobs) for prompt in prompts]
        from llmctl.text.streaming import completion_of

        found = []
        form = session.followed(masking)
        for prompt, ids in zip(prompts, generator.generate(prompts, sampling, *form), strict=True):
            limit = min(sampling.max_new_tokens, generator.room(prompt))
            ended = len(ids) < limit and not sampling.cuts(len(ids), limit)
            whole = Candidate(ids, [], ended)
            found.append([Said(completion_of(session.tokenizer, whole, session.stop), whole)])
        return found

    def _described(self, found: list[Said], sampling: Sampling) -> dict[str, Any]:
        """One answer's text beside its id, several as a list; without scores where none were asked for."""
        if self.output.best_of:
            found = [max(found, key=lambda said: said.candidate.score)]
        rows = []
        for said in found:
            row = said.to_dict()
            row["tokens"] = len(said.completion.token_ids)
            if not said.candidate.logprobs:
                del row["logprob"], row["score"]
            rows.append(row)
        return rows[0] if sampling.n == 1 or self.output.best_of else {"candidates": rows}


# -- a server ---------------------------------------------------------------------------------------------------------


@dataclass
class RemoteAnswers:
    """So many requests side by side; answers are given back in order."""

    session: RemoteSession
    output: Output
    size: int = 16
    timeout: float = 600.0
    masking: MaskingTime = field(default_factory=MaskingTime)

    def answer(self, jobs: Iterator[Job]) -> Iterator[list[Row]]:
        """Rows as they are ready."""
        from llmctl_serve.http_client import HttpClient

        with asyncio.Runner() as runner:
            client = HttpClient(self.session.endpoint, self.timeout)
            waiting: deque[asyncio.Task[Row]] = deque()
            loop = runner.get_loop()
            left = True
            while left or waiting:
                while left and len(waiting) < FURTHER * self.size and under_way(waiting) < self.size:
                    job = next(jobs, None)
                    if job is None:
                        left = False
                    else:
                        waiting.append(loop.create_task(self._one(client, job)))
                if waiting:
                    runner.run(_one_done([task for task in waiting if not task.done()]))
                    rows = []
                    while waiting and waiting[0].done():
                        rows.append(waiting.popleft().result())
                    if rows:
                        yield rows
            runner.run(client.close())

    async def _one(self, client: Any, job: Job) -> Row:
        try:
            path, body = self._body(job)
            return row_of(job, self._described(await self._post(client, path, body)))
        except LineError as problem:
            return error_row(job, problem.kind, problem.message)
        except HttpFailure as failure:
            return error_row(job, failure.kind, f"{job.where}: {failure.message}")

    @staticmethod
    async def _post(client: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
        for number in range(TRIES):
            try:
                found: dict[str, Any] = await client.post(path, body)
                return found
            except HttpFailure as failure:
                if failure.kind not in BUSY or number == TRIES - 1:
                    raise
                await asyncio.sleep(min(MOST_WAIT, max(0.5 * 2**number, failure.retry_after or 0.0)))
        raise AssertionError("the last try returns or raises")

    def _body(self, job: Job) -> tuple[str, dict[str, Any]]:
        if job.problem is not None:
            raise job.problem
        overrides = dict(job.overrides)
        stop = overrides.pop("stop", self.session.stop)
        logprobs = overrides.pop("logprobs", self.output.logprobs)
        try:
            fields = request_fields({**self.session.settings, **overrides}, stop)
        except UsageError as error:
            raise LineError("invalid_request", f"{job.where}: {error.message}") from error
        body = {"model": self.session.model, **fields, **self.session.form}
        scored = score_fields(logprobs, job.messages is not None)
        if job.messages is None:
            return "/completions", {**body, "prompt": job.prompt, **scored}
        system = [{"role": "system", "content": self.session.system}] if self.session.system else []
        messages = job.messages if job.messages[0]["role"] == "system" else [*system, *job.messages]
        return "/chat/completions", {**body, "messages": messages, **scored}

    def _described(self, found: dict[str, Any]) -> dict[str, Any]:
        choices = found.get("choices")
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
            raise HttpFailure("bad JSON", "the answer has no choices")
        rows = []
        for choice in choices:
            message = choice.get("message") or {}
            if not isinstance(message, dict):
                raise HttpFailure("bad JSON", "the message of the answer is no object")
            text = choice.get("text", message.get("content"))
            text = whole_characters(text) if isinstance(text, str) else None
            row: Row = {"text": text, "finish_reason": choice.get("finish_reason")}
            if message.get("tool_calls"):
                row["tool_calls"] = message["tool_calls"]
            if choice.get("logprobs"):
                scores = choice["logprobs"]
                row["logprobs"] = scores.get("content", scores) if isinstance(scores, dict) else scores
            rows.append(row)
        prompt, new = read_usage(found)
        counts = {"tokens": new, "prompt_tokens": prompt}
        return {**(rows[0] if len(rows) == 1 else {"candidates": rows}), **counts}


FURTHER = 16
"""Answers are given in order: those behind a slow one wait, this many times as many as run side by side at most."""


def under_way(tasks: Iterable[asyncio.Task[Row]]) -> int:
    """How many of them have not ended."""
    return sum(not task.done() for task in tasks)


async def _one_done(tasks: Sequence[asyncio.Task[Row]]) -> None:
    if tasks:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


# -- the whole file ---------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a file is, on stderr: a line that moves on a terminal, else one every ten seconds."""

    total: int | None
    skipped: int = 0
    kept: int = 0
    """Those of the skipped whose line is an error."""
    answered: int = 0
    failed: int = 0
    tokens: int = 0
    first: str = ""
    """The first failure."""
    begun: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)

    def add(self, rows: list[Row]) -> None:
        """Rows that were written."""
        for row in rows:
            if "error" in row:
                self.failed += 1
                self.first = self.first or row["error"]["message"]
            else:
                self.answered += 1
                # A server may count the tokens of all candidates together, or none.
                counts = [row, *row.get("candidates", ())]
                self.tokens += sum(one.get("tokens") or 0 for one in counts)
        now = time.monotonic()
        if sys.stderr.isatty():
            click.echo(f"\r{self.line()}\x1b[K", err=True, nl=False)
        elif now - self._said >= HEARTBEAT:
            self._said = now
            click.echo(self.line(), err=True)

    def skip(self, error: str | None) -> None:
        """A line that an earlier run has answered, or failed to answer with `error`."""
        self.skipped += 1
        if error is not None:
            self.kept += 1
            self.first = self.first or error

    def line(self) -> str:
        """`120 of 400 lines, 2 failed, 310 tokens/s, 12 s left`."""
        done, passed = self.answered + self.failed, time.monotonic() - self.begun
        parts = [f"{done + self.skipped}" + (f" of {self.total}" if self.total else "") + " lines"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if passed > 0:
            parts.append(f"{self.tokens / passed:.3g} tokens/s")
        if self.total and done:
            parts.append(f"{human_seconds(passed / done * (self.total - self.skipped - done))} left")
        return ", ".join(parts)

    def end(self, masking: MaskingTime) -> None:
        """The summary, with the share of masking where answers had a form."""
        passed = time.monotonic() - self.begun
        if sys.stderr.isatty():
            click.echo("\r\x1b[K", err=True, nl=False)
        click.echo(
            f"{self.answered} answered, {self.failed} failed, {self.skipped} there already"
            f"{f' ({self.kept} of them failed)' if self.kept else ''}; "
            f"{self.tokens} tokens in {human_seconds(passed)}"
            f"{f', {masking.line()}, {masking.seconds / passed:.2g} of the time' if masking.masks else ''}",
            err=True,
        )


def answer_file(answerer: Answerer, source: str, target: str, fail_fast: bool, retry_errors: bool) -> None:
    """Answer the lines of `source` into `target`, those that are there already excepted.

    StageError at the end if lines have no answer, those included whose error an earlier run has left in `target`; at
    the first one with `fail_fast`.
    """
    if source != STDIO and target != STDIO and Path(source).resolve() == Path(target).resolve():
        raise UsageError("--input and --output are one file", hint="name another --output")
    # What can be read but once, a pipe or <(…), is not counted first.
    total = sum(1 for job in read_jobs(source)) if source != STDIO and Path(source).is_file() else None
    with Results(target, retry_errors) as results:
        progress = Progress(total)
        if results.repaired:
            click.echo(f"{target}: a last line that was half written is cut off", err=True)

        def wanted() -> Iterator[Job]:
            for job in read_jobs(source):
                key = id_key(job.id)
                if key in results.finished:
                    progress.skip(results.failures.get(key))
                else:
                    yield job

        try:
            for rows in answerer.answer(wanted()):
                if fail_fast:
                    rows = _up_to_failure(rows)
                results.write(rows)
                progress.add(rows)
                if fail_fast and progress.failed:
                    break
        except LlmctlError:
            progress.end(answerer.masking)
            raise
        progress.end(answerer.masking)
    if failed := progress.failed + progress.kept:
        hint = "the same command with --retry-errors asks them again" if target != STDIO else None
        lines = "1 line has" if failed == 1 else f"{failed} lines have"
        raise StageError(f"{lines} no answer; the first: {progress.first}", hint=hint)


def _up_to_failure(rows: list[Row]) -> list[Row]:
    at = next((i for i, row in enumerate(rows) if "error" in row), None)
    return rows if at is None else rows[: at + 1]
