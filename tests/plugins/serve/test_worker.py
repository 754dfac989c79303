"""The engine's thread over engines that fail, stop or are full: nobody is left waiting."""

from __future__ import annotations

import asyncio
import json

import pytest

from llmctl.engine import EngineStats, Event, QueueFullError, Request
from llmctl.generator import GREEDY
from llmctl_serve.answers import completion_answer
from llmctl_serve.exchange import Exchange
from llmctl_serve.requests import CompletionRequest
from llmctl_serve.worker import Job, Prompt, Worker, stopping

QUESTION = [{"role": "user", "content": "?"}]


class Slow:
    """An engine that reads prompts for ever; `places` wait or are read at a time."""

    def __init__(self, places=9, waiting=0):
        self.places, self.waiting, self.taken, self.steps = places, waiting, [], 0
        self.busy = True

    def submit(self, request):
        if len(self.taken) >= self.places:
            raise QueueFullError("full")
        self.taken.append(request.prompt)
        return len(self.taken)

    def cancel(self, ticket, choice=None):
        pass

    def step(self):
        self.steps += 1
        return [Event(self.steps, admitted=12.5)] if self.steps <= len(self.taken) - self.waiting else []

    def stats(self):
        return EngineStats(waiting=self.waiting, slots=1)

    def close(self):
        pass


def job_of(*prompts):
    wanted = [Prompt(Request(prompt=[prompt], sampling=GREEDY), [[at]]) for at, prompt in enumerate(prompts)]
    return Job(wanted, Exchange("r", "POST", "/"))


def turned(worker, *jobs):
    """Whether each job was accepted after one turn, or its refusal."""

    async def turn():
        made = [job_of(*prompts) for prompts in jobs]
        for job in made:
            worker._send(lambda job=job: worker._begin(job))
        worker._turn()
        return made, await asyncio.gather(*(job.accepted for job in made), return_exceptions=True)

    return asyncio.run(turn())


def test_a_prompt_that_is_being_read_has_left_the_queue(byte_tokenizer):
    (job,), accepted = turned(Worker(Slow(), byte_tokenizer, print), [5])
    assert accepted == [None]
    assert job.exchange.admitted_at == 12.5  # the engine's own time
    (first, second), _ = turned(Worker(Slow(waiting=1), byte_tokenizer, print), [5], [6])
    assert first.exchange.admitted_at == 12.5  # although somebody waits
    assert second.exchange.admitted_at is None


def test_further_prompts_of_an_accepted_job_go_before_new_jobs(byte_tokenizer):
    engine = Slow(places=1)
    worker = Worker(engine, byte_tokenizer, print)
    turned(worker, [1, 2])
    assert engine.taken == [[1]]
    engine.places = 2
    _, (refused,) = turned(worker, [7])
    assert engine.taken == [[1], [2]]
    assert refused.code == "queue_full"


def test_further_prompts_leave_places_to_new_jobs(byte_tokenizer):
    class Waiting(Slow):
        def stats(self):
            return EngineStats(waiting=len(self.taken), slots=4)

    engine = Waiting(places=6)
    worker = Worker(engine, byte_tokenizer, print)
    turned(worker, list(range(1, 30)))
    assert engine.taken == [[1], [2]]  # half the slots are waited for: the rest of the queue is others'
    _, accepted = turned(worker, [77], [78])
    assert accepted == [None, None]
    assert engine.taken == [[1], [2], [3], [77], [78]]  # one of the long job, then the new ones


def test_a_job_whose_prompts_all_wait_outside_is_told_of_the_end(byte_tokenizer):
    async def end():
        worker, job = Worker(Slow(), byte_tokenizer, print), job_of(1)
        worker._later.append((job, job.prompts[0]))
        worker._refuse_all(stopping(), "shutdown")
        error = await asyncio.wait_for(job.pieces.get(), 5)
        return error.code, job.exchange.cut

    assert asyncio.run(end()) == ("shutting_down", "shutdown")


@pytest.mark.parametrize("stream", [False, True])
def test_a_thread_that_dies_tells_everybody_and_the_probes(scripted, byte_tokenizer, running, stream):
    generator = scripted(byte_tokenizer, default="x" * 300)
    with running(generator) as server:
        deliver = server.worker._deliver

        def breaks(event):
            if generator.generated > 3:  # what came before has begun the stream
                raise KeyError("broken")
            deliver(event)

        server.worker._deliver = breaks
        body = {"messages": QUESTION, "max_tokens": 200, "stream": stream}
        status, text, _ = server.request("POST", "/v1/chat/completions", body)
        error = json.loads(text.rpartition("data: ")[2] if not stream else [
            line for line in text.splitlines() if '"error"' in line][0].removeprefix("data: "))["error"]  # fmt: skip
        assert (status, error["code"]) == (200 if stream else 503, "engine_failed")
        assert any("the engine's thread has ended: KeyError" in warning for warning in server.warnings)
        status, body, _ = server.post({"messages": QUESTION})
        assert (status, body["error"]["code"]) == (503, "engine_failed")
        for path in ("/healthz", "/readyz"):
            status, text = server.get(path)
            assert (status, json.loads(text)["status"]) == (503, "failed")
        server.models.load("byte-model", "own")  # a new one brings it back
        assert server.get("/readyz")[0] == 200


def test_an_error_of_onnx_runtime_ends_a_stream_with_an_event(scripted, byte_tokenizer, running):
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    assert Fail.__mro__[1] is Exception
    with running(scripted(byte_tokenizer)) as server:
        server.service.engine.step = lambda: [Event(next(iter(server.worker._running)), error=Fail("no memory"))]
        text = server.request("POST", "/v1/chat/completions", {"messages": QUESTION, "stream": True})[1]
        assert json.loads(text.removeprefix("data: "))["error"]["message"] == "generation failed: Fail"


def test_a_request_that_fails_after_it_was_submitted_leaves_no_job(scripted, byte_tokenizer, running, monkeypatch):
    def broken(*_):
        raise MemoryError

    with running(scripted(byte_tokenizer, default="x" * 400, delay=0.01)) as server:
        monkeypatch.setattr("llmctl_serve.answers.Answer.__post_init__", broken)
        body = CompletionRequest(prompt="a", max_tokens=400)

        class Asking:
            scope = {"llmctl.exchange": Exchange("r", "POST", "/")}

        async def ask():
            with pytest.raises(MemoryError):
                await completion_answer(server.models, body, Asking())
            for _ in range(40):  # the answer alone would take four seconds
                if not server.worker._running:
                    return
                await asyncio.sleep(0.05)

        asyncio.run(ask())
        assert not server.worker._running
        assert server.service.generator.generated < 300
