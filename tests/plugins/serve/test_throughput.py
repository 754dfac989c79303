"""What many users at a time cost, through HTTP: forward passes are counted, so no clock decides.

The model was really trained and runs in ONNX Runtime; its tokens are words, so that a prompt is as long as it looks.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from llmctl import Artifact
from llmctl.testing import run_stage
from llmctl_serve.bench.exposition import Watch, describe, parse_exposition
from llmctl_serve.bench.load import Load, Runner
from llmctl_serve.bench.prompts import Prompt
from llmctl_serve.bench.summary import summarise
from llmctl_serve.endpoint import parse_endpoint
from llmctl_serve.http_client import HttpClient

pytest.importorskip("torch")
pytest.importorskip("onnx")
sys.path.insert(0, str(Path(__file__).parents[2] / "ort" / "models"))

NAME = "byte-model"
GREEDY = {"temperature": 0, "logit_bias": {"1": -100}}
"""Answers that do not end before their last token: EOS has id 1."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The model of `trained`, exported, with a tokenizer whose token 17 is the word `t17`."""
    import trained
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    from llmctl_export_onnx import EXPORT_ONNX

    directory = trained.train(tmp_path_factory.mktemp("trained"), 100)
    special = ["<|bos|>", "<|end|>", "<|pad|>"]
    words = [*special, *(f"t{number}" for number in range(3, trained.VOCABULARY))]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<|pad|>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    raw.save(str(directory / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    params = {"parity_prompts": 2, "threads": 1}
    model = Artifact(directory, "model.hf")
    return run_stage(EXPORT_ONNX, tmp_path_factory.mktemp("out"), params, model=model).outputs["model"]


def words(seed: int, length: int) -> str:
    """A prompt of so many tokens, those of a sentence that the model knows."""
    import trained

    return " ".join(f"t{max(3, token)}" for token in trained.sentence(np.random.default_rng(seed), length))


@contextmanager
def held(server):
    """The engine does nothing within the block, so that all that is asked meanwhile begins with the same step."""
    gate = threading.Event()
    server.worker._send(gate.wait)
    try:
        yield
    finally:
        gate.set()


def ask_together(server, bodies, wait_until):
    """The answers to all bodies, which begin with the same step."""
    answers = [None] * len(bodies)

    def ask(number):
        answers[number] = server.post(bodies[number], "/v1/completions")

    with held(server):
        wait_until(lambda: not server.worker._inbox)  # the thread is in the gate
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(server.worker._inbox) == len(bodies))
    for thread in threads:
        thread.join()
    assert [status for status, _, _ in answers] == [200] * len(bodies)
    return [answer for _, answer, _ in answers]


def body(prompt, tokens, **more):
    return {"model": NAME, "prompt": prompt, "max_tokens": tokens, **GREEDY, **more}


def passes(server):
    """(forward passes that advanced an answer, tokens of answers), from the server's /metrics."""
    text = parse_exposition(server.get("/metrics")[1])
    return np.array([text.total("llmctl_batch_size_count"), text.total("llmctl_engine_generated_tokens_total")])


@pytest.mark.parametrize("slots", [16, 1])
def test_passes_per_token_fall_with_concurrency(bundle, serving, wait_until, slots):
    """N answers of 20 tokens take 20 passes if there are slots for all, whatever N is; with one slot, N x 20."""
    seed = 0
    with serving(bundle, slots=slots) as server:
        for users in (1, 2, 4, 8, 16, 32):
            before = passes(server)
            bodies = [body(words(seed + number, 8), 20) for number in range(users)]
            seed += users
            answers = ask_together(server, bodies, wait_until)
            assert all(answer["usage"]["completion_tokens"] == 20 for answer in answers)
            took, tokens = passes(server) - before
            assert tokens == 20 * users
            # Whoever waits for a slot is read in the step in which it falls free: its first token takes no pass more.
            rounds = -(-users // slots)
            assert 20 * rounds - (rounds - 1) <= took <= 20 * rounds, (users, took)


def measure(server, load, prompts):
    """A load as `llmctl bench` runs it: its summary with what the server says, and the records."""

    async def run():
        endpoint = parse_endpoint(server.base)
        client, watch = HttpClient(endpoint, 60), Watch(endpoint)
        try:
            await watch.open()
            async with watch.beside() as watched:
                records = await Runner(client, NAME, False, GREEDY).run(load, prompts, 0, lambda *_: None)
            return records, describe(watched, NAME, records)
        finally:
            await client.close()
            await watch.close()

    records, seen = asyncio.run(run())
    return {**summarise(load, records, {}), "server": seen}, records


class Paced:
    """The engine of a server, which takes a step only when all users have asked again, so that no clock decides."""

    def __init__(self, server, monkeypatch, users, requests):
        self.users, self.requests = users, requests
        self.asked = self.ended = 0
        self._hand_in, self._step = server.worker.submit, server.worker._engine.step
        monkeypatch.setattr(server.worker, "submit", self.hand_in)
        monkeypatch.setattr(server.worker._engine, "step", self.step)

    async def hand_in(self, job):
        self.asked += 1
        await self._hand_in(job)

    def step(self):
        deadline = time.monotonic() + 20
        while self.asked - self.ended < min(self.users, self.requests - self.ended):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        events = self._step()
        self.ended += sum(event.finish_reason is not None for event in events)
        return events


def test_bench_sees_the_batches_and_the_server_counts_what_it_counts(bundle, serving, monkeypatch):
    batches = []
    with serving(bundle) as server:
        for number, users in enumerate((1, 4, 16)):
            prompts = [Prompt(words(1000 * number + n, 12), 40) for n in range(32)]
            with monkeypatch.context() as patch:
                Paced(server, patch, users, 32)
                found, _ = measure(server, Load("closed", users, requests=32), prompts)
            seen = found["server"]
            assert (found["answered"], found["output_tokens"]) == (32, 32 * 40)
            assert seen["requests"] == {"200": 32}
            assert (seen["prompt_tokens"], seen["completion_tokens"]) == (found["prompt_tokens"], 32 * 40)
            assert seen["agrees"] is True
            assert seen["passes"] * seen["mean_batch"] == pytest.approx(32 * 40)
            assert seen["memory"]["largest"] >= seen["memory"]["first"] > 2**20
            batches.append(seen["mean_batch"])
    assert batches[0] == 1
    # Who asks again while the others' step waits for it is a step behind them.
    assert 3.5 < batches[1] <= 4 and 14 < batches[2] <= 16, batches


@pytest.mark.parametrize(
    ("params", "reason"),
    [({"slots": 2, "max_queue": 1}, "queue_full"), ({"requests_per_minute": 20}, "rate_limit_requests")],
)
def test_rejects_are_counted_alike_by_the_client_and_the_server(bundle, serving, params, reason):
    """Twelve users of a server that has too little for them: each request is answered, or rejected with a hint."""
    with serving(bundle, **params) as server:
        prompts = [Prompt(words(number, 12), 60) for number in range(200)]
        found, records = measure(server, Load("closed", 12, requests=200), prompts)
        text = parse_exposition(server.get("/metrics")[1])
    rejected = found["rejected"]["requests"]
    assert found["answered"] + rejected == 200 and found["errors"] == {}
    assert found["answered"] > 2 and rejected > 10
    assert found["server"]["requests"] == {"200": found["answered"], "429": rejected}
    assert found["server"]["agrees"] is True
    assert text.total("llmctl_rejected_total", reason=reason) == rejected
    assert found["server"]["completion_tokens"] == found["output_tokens"] == 60 * found["answered"]
    kind = found["rejected"]["kinds"]["status 429"]
    assert kind["hinted"] == rejected and 0 < kind["retry_after"]["min"] <= kind["retry_after"]["max"] <= 61
    assert all(record.retry_after is not None for record in records if record.rejected)


@pytest.mark.slow
def test_a_planted_slow_worker_shows_in_p99_and_not_in_p50(bundle, serving, monkeypatch):
    """One pass in thirty takes a third of a second."""
    prompts = [Prompt(words(number, 12), 30) for number in range(40)]
    load = Load("closed", 4, requests=40)
    with serving(bundle) as server:
        sound, _ = measure(server, load, prompts)
        step, count = server.worker._engine.step, 0

        def halting():
            nonlocal count
            count += 1
            if count % 30 == 0:
                time.sleep(0.3)
            return step()

        monkeypatch.setattr(server.worker._engine, "step", halting)
        slow, _ = measure(server, load, prompts)
    assert slow["itl"]["p99"] > 0.28 > 0.1 > slow["itl"]["p50"]
    assert slow["e2e"]["p99"] > 0.28
    assert sound["itl"]["p99"] < 0.2


class _Unfair:
    """Ways in which somebody could starve."""

    @staticmethod
    def shortest_first(monkeypatch):
        """The budget of a step goes to whoever has the least left to read."""
        from llmctl.ort.scheduler import OrtEngine

        def read(engine, events):
            budget = engine.options.prefill_tokens
            while budget and engine._reading:
                budget -= engine._read_chunk(min(engine._reading, key=lambda one: one.left), budget, events)

        monkeypatch.setattr(OrtEngine, "_read", read)

    @staticmethod
    def shortest_admitted_first(monkeypatch):
        """Who has the shortest prompt is given the next free slot."""
        from llmctl.ort.waiting import FairQueue

        def add(queue, client, item):
            line = queue._lines.setdefault(client, deque())
            line.append(item)
            queue._lines[client] = deque(sorted(line, key=lambda task: len(task.prompt)))
            queue._count += 1

        monkeypatch.setattr(FairQueue, "add", add)


SHORT, USERS, LONG = 150, 12, 80


class WithLong(Paced):
    """Among the short requests a long one."""

    def __init__(self, server, monkeypatch):
        super().__init__(server, monkeypatch, USERS, SHORT)
        self.steps = 0
        self.ticket = None
        self.begun = self.finished = 0
        """Steps before the long request and up to its end."""
        self.called, self.joined = threading.Event(), threading.Event()
        """It is time for the long request; it is there."""
        self._submit = server.worker._engine.submit
        monkeypatch.setattr(server.worker._engine, "submit", self.submit)

    async def hand_in(self, job):
        if len(job.prompts[0].request.prompt) >= LONG:
            self.joined.set()
        await super().hand_in(job)

    def submit(self, request):
        ticket = self._submit(request)
        if len(request.prompt) >= LONG:
            self.ticket, self.begun = ticket, self.steps
        return ticket

    def step(self):
        if self.steps == 20:
            self.called.set()
            assert self.joined.wait(20)
        events = super().step()
        self.steps += 1
        for event in events:
            if event.ticket == self.ticket and event.finish_reason:
                self.finished = self.steps
        return events


def steps_of_the_long_one(bundle, serving, monkeypatch):
    """Steps from the submission of a long request to its end, among the short ones of twelve users.

    Four slots, sixteen tokens of prompts a step. A short one has 15 tokens to read and one to say, the long one 81 to
    read and 24 to say.
    """
    with serving(bundle, slots=4, prefill_tokens=16, prefix_cache=False) as server:
        paced = WithLong(server, monkeypatch)
        answers = []

        def late():
            assert paced.called.wait(20)
            answers.append(server.post(body(words(9999, LONG), 24), "/v1/completions"))

        asker = threading.Thread(target=late)
        asker.start()
        prompts = [Prompt(words(number, 14), 1) for number in range(SHORT)]
        found, _ = measure(server, Load("closed", USERS, requests=SHORT), prompts)
        asker.join()
    assert (found["answered"], found["prompt_tokens"]) == (SHORT, 15 * SHORT)
    ((status, answer, _),) = answers
    assert (status, answer["usage"]) == (
        200,
        {**answer["usage"], "prompt_tokens": LONG + 1, "completion_tokens": 24},
    )
    assert paced.steps > 15 * SHORT / 16, "the short ones alone take that many"
    return paced.finished - paced.begun


BOUND = 12 + 11 + 24
"""Twelve short ones at most are ahead of it, each a step of the budget; then half of the budget is its own; then it
says a token with every step."""


def test_a_long_request_among_short_ones_is_answered_within_a_bound(bundle, serving, monkeypatch):
    assert steps_of_the_long_one(bundle, serving, monkeypatch) <= BOUND


@pytest.mark.parametrize("fault", ["shortest_first", "shortest_admitted_first"])
def test_an_unfair_engine_lets_it_starve(bundle, serving, monkeypatch, fault):
    getattr(_Unfair, fault)(monkeypatch)
    assert steps_of_the_long_one(bundle, serving, monkeypatch) > 2 * BOUND


def answer_among(server, others, wait_until):
    """(text, log-probabilities) of one request that begins with the same step as others."""
    target = body(words(5, 20), 30, logprobs=1)
    first = ask_together(server, [target, *(body(prompt, 30, **more) for prompt, more in others)], wait_until)[0]
    choice = first["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


MATES = (
    [(words(seed, 20), {}) for seed in (40, 41, 42)],
    [(words(seed, length), {"temperature": 1.5, "seed": seed}) for seed, length in ((50, 3), (51, 60), (52, 33))],
    [(words(5, 20), {})] * 7,
)  # fmt: skip


def test_another_batch_mate_changes_nothing(bundle, serving, wait_until):
    with serving(bundle) as server:
        text, scores = answer_among(server, [], wait_until)
        assert len(text.split()) == 30
        for others in MATES:
            before = passes(server)
            said, found = answer_among(server, others, wait_until)
            took, tokens = passes(server) - before
            assert tokens > 2 * took, "they shared their passes"
            assert said == text
            assert found == pytest.approx(scores, abs=1e-4)


def test_a_batch_that_mixes_lengths_up_is_seen(bundle, serving, wait_until, monkeypatch):
    """Every row is believed as long as the longest one."""
    from llmctl.ort.slots import Slots

    step = Slots.step

    def wrong(slots, tokens):
        slots.lengths[: len(tokens)] = slots.lengths[: len(tokens)].max()
        return step(slots, tokens)

    with serving(bundle) as server:
        alone = answer_among(server, [], wait_until)
        monkeypatch.setattr(Slots, "step", wrong)
        text, scores = answer_among(server, MATES[1], wait_until)
    assert (text, scores) != (alone[0], pytest.approx(alone[1], abs=1e-4))
