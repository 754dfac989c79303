"""A real server under mixed traffic: clients that leave, nonsense, models swapped under load, and the end by a signal.

Every answer is known beforehand from the model alone, so a lost, cut or crossed response shows. A minute of it is a
slow test; half an hour is run by hand: `pytest -m soak tests/e2e/test_soak.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from llmctl import Artifact
from llmctl.generator import Sampling
from llmctl.testing import run_stage

pytest.importorskip("torch")
pytest.importorskip("onnx")

CLIENTS, PROMPTS, NEW, CONTEXT = 12, 24, 24, 128
MARGIN = 1e-3
"""Least gap between the two likeliest tokens of an answer that is known: a batch may round otherwise."""
JSON = {"Content-Type": "application/json", "Authorization": "Bearer soak"}
"""Headers: swapping models takes a key."""
DRIFT = 0.03
"""Most that the memory may grow after the warm-up."""


def write_tokenizer(directory: Path) -> Path:
    """One token per byte after three special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|bos|>", "<|end|>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: number for number, token in enumerate(special + alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    directory.mkdir(parents=True)
    raw.save(str(directory / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return directory


def make_bundle(where: Path, seed: int) -> Path:
    """A random LLaMA of two layers with a tokenizer of bytes."""
    import torch

    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer
    from llmctl_export_onnx import EXPORT_ONNX

    shape = {"arch": "llama", "vocab_size": 259, "dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "context": CONTEXT}
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**shape, bos_id=0, eos_id=1, pad_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    tokenizer = write_tokenizer(where / "tokenizer")
    save_model(model, where / "hf", tokenizer)
    hf = Artifact(where / "hf", "model.hf")
    exported = run_stage(EXPORT_ONNX, where / "out", {"parity_prompts": 2, "threads": 1}, model=hf)
    return exported.outputs["model"].path


@dataclass
class Truth:
    """What each model answers to each prompt, from the generator alone."""

    prompts: list[str]
    answers: dict[str, list[str]] = field(default_factory=dict)
    """By the name of the model's directory."""


def find_truth(bundles: dict[str, Path]) -> Truth:
    """Prompts whose greedy answers no rounding decides, in any of the models."""
    from llmctl.ort import open_bundle
    from llmctl.text.tokenizer import Tokenizer

    opened = {name: (open_bundle(path, "cpu", 1), Tokenizer.load(path)) for name, path in bundles.items()}
    truth = Truth([], {name: [] for name in bundles})
    number = 0
    while len(truth.prompts) < PROMPTS:
        number += 1
        assert number < 50 * PROMPTS, "too few prompts have a clear answer"
        prompt, found = f"question {number}:", {}
        for name, (generator, tokenizer) in opened.items():
            ids = [0, *tokenizer.encode(prompt)]
            answer = list(generator.stream(ids, Sampling(max_new_tokens=NEW)))
            best = np.sort(generator.answer_logits(ids, answer), axis=1)[:, -2:] if answer else np.zeros((1, 2))
            if len(answer) == NEW and (best[:, 1] - best[:, 0]).min() > MARGIN:
                found[name] = tokenizer.decode(answer)
        if len(found) == len(bundles):
            truth.prompts.append(prompt)
            for name, text in found.items():
                truth.answers[name].append(text)
    return truth


class Server:
    """`llmctl serve` as a user starts it."""

    def __init__(self, root: Path, work: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        command = [sys.executable, "-m", "llmctl", "serve", "--model", str(root / "a"), "--model-name", "m"]
        command += ["--port", str(self.port), "--threads", "1", "--device", "cpu", "--slots", "8"]
        command += ["--set", f"models.current={root / 'current'}"]  # a link, which SIGUSR2 follows anew
        command += ["--set", f"model_root={root}", "--set", "max_request_bytes=65536", "--set", "drain_seconds=20"]
        command += ["--set", "api_key_env=LLMCTL_SOAK_KEY"]
        self.log = work / "log"
        with self.log.open("wb") as file:
            own = {"LLMCTL_STORE": str(work / "store"), "LLMCTL_SOAK_KEY": "soak"}
            self.process = subprocess.Popen(command, cwd=work, stdout=file, stderr=file, env={**os.environ, **own})
        deadline = time.monotonic() + 120
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                if self.ask("GET", "/readyz")[0] == 200:
                    return
            except OSError:
                time.sleep(0.1)

    def open(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, str, str]:
        """Status, text, and the artifact that answered."""
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with closing(self.open()) as connection:
            connection.request(method, path, raw, JSON if raw is not None else {})
            response = connection.getresponse()
            return response.status, response.read().decode(), response.getheader("x-llmctl-model") or ""

    def memory(self) -> int:
        """Resident bytes of the process and its children."""
        pids, total = [self.process.pid], 0
        while pids:
            pid = pids.pop()
            tasks = Path(f"/proc/{pid}/task")
            for task in tasks.iterdir():
                with suppress(OSError):  # a thread may end while they are listed
                    pids += map(int, (task / "children").read_text().split())
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return total

    def gauge(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.ask("GET", "/metrics")[1].splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def events(response: http.client.HTTPResponse) -> Iterator[dict | str]:
    """The events of a stream."""
    for line in response:
        if line.startswith(b"data: "):
            text = line[6:].strip().decode()
            yield text if text == "[DONE]" else json.loads(text)


class Traffic:
    """What clients do, at random, and what went wrong."""

    def __init__(self, server: Server, truth: Truth, artifacts: dict[str, str]) -> None:
        self.server, self.truth, self.artifacts = server, truth, artifacts
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()
        self.stop = threading.Event()

    def client(self, seed: int) -> None:
        """One client until the end."""
        rng = random.Random(seed)
        kinds = [self.whole, self.stream, self.stream, self.leave, self.malformed, self.oversized, self.ended]
        while not self.stop.is_set():
            act = rng.choice(kinds)
            try:
                act(rng)
                self.done[act.__name__] += 1
            except Exception as error:  # the test reports it
                self.wrong.append(f"{act.__name__}: {type(error).__name__}: {error}")
                time.sleep(0.05)

    def body(self, number: int, **more: object) -> dict[str, object]:
        return {"model": "m", "prompt": self.truth.prompts[number], "max_tokens": NEW, "temperature": 0, **more}

    def check(self, number: int, artifact: str, text: str) -> None:
        expected = self.truth.answers[self.artifacts[artifact]][number]
        assert text == expected, f"prompt {number}: {text!r} and not {expected!r}"

    def whole(self, rng: random.Random) -> None:
        number = rng.randrange(PROMPTS)
        scored = {"logprobs": 1} if rng.random() < 0.3 else {}
        status, text, artifact = self.server.ask("POST", "/v1/completions", self.body(number, **scored))
        assert status == 200, text
        self.check(number, artifact, json.loads(text)["choices"][0]["text"])

    def stream(self, rng: random.Random) -> None:
        number = rng.randrange(PROMPTS)
        text, artifact, reason, last = read_stream(self.server, self.body(number, stream=True))
        assert (reason, last) == ("length", "[DONE]"), f"a stream ended with {reason}, {last}"
        self.check(number, artifact, text)

    def ended(self, rng: random.Random) -> None:
        """A stop string from the middle of the answer."""
        number = rng.randrange(PROMPTS)
        artifact = self.server.ask("POST", "/v1/completions", self.body(number, max_tokens=1))[2]
        expected = self.truth.answers[self.artifacts[artifact]][number]
        stop = expected[len(expected) // 2 :][:2]
        status, text, answered = self.server.ask("POST", "/v1/completions", self.body(number, stop=[stop]))
        assert status == 200, text
        if answered == artifact and stop:  # else the model was swapped between both
            assert json.loads(text)["choices"][0]["text"] == expected[: expected.index(stop)]

    def leave(self, rng: random.Random) -> None:
        """Go away after some events, or before the first."""
        raw = json.dumps(self.body(rng.randrange(PROMPTS), stream=True, max_tokens=90)).encode()
        own = [f"{name}: {text}" for name, text in JSON.items()]
        lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", *own)
        head = "\r\n".join([*lines, f"Content-Length: {len(raw)}", "", ""]).encode()
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as connection:
            connection.sendall(head + raw[: rng.choice([len(raw), len(raw) // 2])])
            if rng.random() < 0.5 and raw:
                connection.settimeout(0.2)
                with contextlib.suppress(TimeoutError):  # half a body has no answer
                    connection.recv(rng.choice([64, 1024]))

    def malformed(self, rng: random.Random) -> None:
        bad = rng.choice(
            [
                b"{",
                b"[]",
                b'{"prompt": 5}',
                b"\xff\xfe",
                b'{"prompt": "a", "tempreature": 1}',
                b'{"prompt": "a", "n": 0}',
            ]
        )
        status, text, _ = self.server.ask("POST", "/v1/completions", bad)
        assert status == 400 and json.loads(text)["error"]["message"], text

    def oversized(self, rng: random.Random) -> None:
        size, expected = rng.choice([(CONTEXT * 2, 400), (100_000, 413)])
        status, text, _ = self.server.ask("POST", "/v1/completions", self.body(0) | {"prompt": "a" * size})
        assert status == expected and json.loads(text)["error"]["code"], (status, text)


def read_stream(server: Server, body: dict[str, object]) -> tuple[str, str, str | None, dict | str]:
    """Text, artifact, finish reason and last event of a stream."""
    with closing(server.open()) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        text, reason, last = "", None, "nothing"
        for last in events(response):
            if isinstance(last, dict) and last.get("choices"):
                text += last["choices"][0]["text"]
                reason = last["choices"][0]["finish_reason"] or reason
        return text, response.getheader("x-llmctl-model") or "", reason, last


def swap(server: Server, name: str) -> str:
    """Serve another directory under the name `m`; its artifact."""
    status, text, _ = server.ask("POST", "/admin/models", {"name": "m", "ref": name})
    assert status == 200, text
    return json.loads(text)["artifact"]


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to rest"
        time.sleep(0.1)


def soak(server: Server, truth: Truth, seconds: float) -> None:
    """Traffic for so long; then everything is at rest, and the memory is where it was after the warm-up."""
    artifacts = {swap(server, name): name for name in ("b", "a")}
    assert len(artifacts) == 2
    traffic = Traffic(server, truth, artifacts)
    clients = [threading.Thread(target=traffic.client, args=(seed,)) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    begun, memory, swaps = time.monotonic(), [], 0
    try:
        while (passed := time.monotonic() - begun) < seconds:
            if passed > swaps * max(3.0, seconds / 60):
                swap(server, "ba"[swaps % 2])
                swaps += 1
            memory.append((passed, server.memory()))
            time.sleep(0.25)
    finally:
        traffic.stop.set()
        for client in clients:
            client.join()
    assert not traffic.wrong, f"{len(traffic.wrong)} of {traffic.done.total()}: " + "; ".join(traffic.wrong[:5])
    assert len(traffic.done) == 6 and min(traffic.done.values()) > 3, traffic.done
    wait_for(lambda: server.gauge("llmctl_running") == server.gauge("llmctl_queue_depth") == 0)
    wait_for(lambda: server.gauge("llmctl_open_requests") <= 1)  # that which asks
    after = [size for passed, size in memory if passed > seconds / 2]
    quarter = len(after) // 4
    early, late = statistics.median(after[:quarter]), statistics.median(after[-quarter:])
    print(
        f"{seconds:g} s, {traffic.done.total()} requests {dict(traffic.done)}, {swaps} swaps, "
        f"resident {early / 1e6:.1f} MB, then {late / 1e6:.1f} MB ({late / early - 1:+.2%})"
    )
    assert late < early * (1 + DRIFT), f"resident memory went from {early / 1e6:.1f} to {late / 1e6:.1f} MB"


def reload_by_signal(server: Server, truth: Truth, root: Path) -> None:
    """SIGUSR2 swaps in what a name points to by now, while it is asked without a pause."""
    body = {"model": "current", "prompt": truth.prompts[0], "max_tokens": NEW, "temperature": 0}
    said: list[str] = []

    def answer() -> str:
        status, text, _ = server.ask("POST", "/v1/completions", body)
        assert status == 200, text
        said.append(json.loads(text)["choices"][0]["text"])
        return said[-1]

    assert answer() == truth.answers["a"][0]
    (root / "current").unlink()
    (root / "current").symlink_to(root / "b")
    server.process.send_signal(signal.SIGUSR2)
    wait_for(lambda: answer() == truth.answers["b"][0])
    assert set(said) == {truth.answers[name][0] for name in "ab"}


def end_during_streams(server: Server, truth: Truth) -> None:
    """SIGTERM while streams are under way: every one is finished, whole and right; then the process ends well."""
    found: list[tuple[int, str, str | None, dict | str]] = []

    def read(number: int) -> None:
        body = {"model": "m", "prompt": truth.prompts[number], "max_tokens": NEW, "temperature": 0, "stream": True}
        text, artifact, reason, last = read_stream(server, body)
        found.append((number, text, reason, last))

    before = server.gauge("llmctl_engine_steps_total")
    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.gauge("llmctl_open_requests") >= 8 or server.gauge("llmctl_engine_steps_total") > before)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert len(found) == 8, "a response was lost"
    known = {answers[number] for number in range(8) for answers in truth.answers.values()}
    for number, text, reason, last in found:
        assert (reason, last) == ("length", "[DONE]")
        assert text in known
        assert text in {answers[number] for answers in truth.answers.values()}, "a response was crossed"
    assert server.process.wait(30) in (0, 143, -signal.SIGTERM), server.log.read_text()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(60, marks=pytest.mark.slow, id="a minute"),
        pytest.param(1800, marks=[pytest.mark.soak, pytest.mark.timeout(2400)], id="half an hour"),
    ],
)
def test_mixed_traffic_loses_crosses_and_leaks_nothing(seconds, tmp_path, request) -> None:
    if seconds > 60 and "soak" not in (request.config.option.markexpr or ""):
        pytest.skip("half an hour: run by hand with -m soak")
    root = tmp_path / "models"
    root.mkdir()
    bundles = {}
    for seed, name in enumerate("ab"):
        bundles[name] = root / name
        make_bundle(tmp_path / name, seed).rename(root / name)
    (root / "current").symlink_to(root / "a")
    truth = find_truth(bundles)
    assert not set(truth.answers["a"]) & set(truth.answers["b"]), "the models can be told apart"
    server = Server(root, tmp_path)
    try:
        soak(server, truth, float(os.environ.get("LLMCTL_SOAK_SECONDS", seconds)))
        reload_by_signal(server, truth, root)
        end_during_streams(server, truth)
    finally:
        server.process.kill()
        server.process.wait()
