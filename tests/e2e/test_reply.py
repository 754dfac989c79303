"""From one reply that a server has logged back to all that it is made of: model, prompt, data, filters and seeds."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("onnx")

SPEC = """
llmctl: 1
name: traced
sources: {raw: {uri: ./notes, type: files}}
stages:
  data:
    uses: data
    inputs: {files: sources.raw}
    with: {emit: [text], seed: 21, validation_share: 0.25, steps: [{name: length, min_chars: 40}]}
  tokenize: {uses: tokenize, inputs: {text: data}, with: {vocab_size: 300}}
  train:
    uses: train-pretrain
    inputs: {tokens: tokenize, tokenizer: tokenize}
    with: {dim: 32, layers: 1, heads: 2, kv_heads: 1, context: 64, max_steps: 2, batch_size: 2, seed: 22}
  onnx: {uses: export-onnx, inputs: {model: train}, with: {parity_prompts: 2}, output: bundle}
"""
WORDS = "the loom stands by the window and the weaver throws the shuttle through the shed"
ASKED = {"prompt": "the loom", "max_tokens": 6, "temperature": 0.9, "seed": 23, "stop": ["\\0"]}


def ask_a_server(program, work: Path) -> tuple[dict, str]:
    """(the answer, the artifact's id in its header) of `llmctl serve` with a request log."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [*program, "serve", "--model", "bundle", "--port", str(port), "--set", "log_requests=replies.jsonl"]
    with (work / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=work, env=program.env, stdout=log, stderr=log)
    try:
        body = json.dumps(ASKED).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        end = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    return json.load(response), response.headers["x-llmctl-model"]
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < end, (work / "serve.log").read_text()
                time.sleep(0.1)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


class Program(list):
    """How `llmctl` is called, and its environment."""

    env: dict[str, str]


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> tuple[Program, Path]:
    """A directory in which the chain has run."""
    import os

    work = tmp_path_factory.mktemp("traced")
    (work / "notes").mkdir()
    for number in range(12):
        (work / f"notes/{number}.txt").write_text(f"Note {number}. " + WORDS * (1 + number % 3))
    (work / "notes/short.txt").write_text("too short to stay")
    (work / "spec.yaml").write_text(SPEC)
    program = Program([sys.executable, "-m", "llmctl"])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLMCTL_")}
    program.env = {**kept, "LLMCTL_STORE": str(work / "store"), "OMP_NUM_THREADS": "1"}
    done = run(program, work, "run", "spec.yaml")
    assert done.returncode == 0, done.stderr
    return program, work


def run(program: Program, work: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *args], cwd=work, env=program.env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_from_a_logged_reply_back_to_the_data(traced):
    program, work = traced
    answer, header = ask_a_server(program, work)
    (line,) = [json.loads(line) for line in (work / "replies.jsonl").read_text().splitlines()]

    # The model: the id in the line is that of the answer's header, and of the bundle's own manifest.
    assert line["artifact"] == header == json.loads((work / "bundle/llmctl.json").read_text())["id"]
    done = run(program, work, "lineage", line["artifact"], "--format", "json", "--verify")
    assert done.returncode == 0, done.stderr
    nodes = json.loads(done.stdout)
    made = {node["instance"]: node for node in nodes if node["present"]}
    assert set(made) == {"onnx", "train", "tokenize", "data"}

    # The prompt, as the tokens of the bundle's tokenizer; how it was sampled, and with which seed.
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "bundle/tokenizer.json"))
    assert tokenizer.decode(line["prompts"][0]) == ASKED["prompt"]
    wanted = {"max_tokens": 6, "temperature": 0.9, "seed": 23, "stop": ["\\0"]}
    assert line["settings"] == wanted
    assert line["answers"][0]["answer"] == answer["choices"][0]["text"]
    assert line["request_id"]

    # Filters and seeds: what each stage was told.
    (step,) = made["data"]["parameters"]["steps"]
    assert (step["name"], step["min_chars"]) == ("length", 40)
    assert (made["data"]["parameters"]["seed"], made["train"]["parameters"]["seed"]) == (21, 22)

    # The data: the texts that were kept and the files they came from, each where it lies.
    shown = json.loads(run(program, work, "show", made["data"]["id"], "--format", "json").stdout)
    kept = [
        json.loads(row)
        for path in Path(shown["path"]).glob("*.jsonl.gz")
        for row in gzip.decompress(path.read_bytes()).splitlines()
    ]
    assert {row["text"] for row in kept} == {(work / f"notes/{number}.txt").read_text() for number in range(12)}
    (outside,) = [node for node in nodes if not node["present"]]
    assert outside["path"] == str(work / "notes")
    assert outside["id"] in made["data"]["inputs"]["files"]

    # The same request to the same artifact gives the same reply.
    again, _ = ask_a_server(program, work)
    assert again["choices"][0]["text"] == answer["choices"][0]["text"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["source", "shards", "weights", "bundle"])
def test_a_swapped_file_is_named(traced, where):
    """The control: bytes of the same length, anywhere on the way."""
    program, work = traced
    if where == "source":
        path = work / "notes/3.txt"
    elif where == "bundle":
        path = work / "bundle/model.onnx"
    else:
        name, stage = ("*.bin", "tokenize.tokens") if where == "shards" else ("*.safetensors", "train")
        shown = json.loads(run(program, work, "show", f"traced/{stage}", "--format", "json").stdout)
        path = next(Path(shown["path"]).glob(name))
    before = path.read_bytes()
    path.chmod(0o644)
    try:
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        done = run(program, work, "lineage", "bundle", "--verify")
    finally:
        path.write_bytes(before)
    assert done.returncode == 5
    assert str(path) in done.stderr
    assert str(path) in done.stdout or where == "bundle"  # which is not opened at all
    assert run(program, work, "lineage", "bundle", "--verify").returncode == 0


@pytest.mark.slow
def test_a_swapped_bundle_is_not_served(traced):
    program, work = traced
    path = work / "bundle/model.onnx"
    before = path.read_bytes()
    try:
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        done = run(program, work, "serve", "--model", "bundle", "--port", "0")
    finally:
        path.write_bytes(before)
    assert done.returncode == 5
    assert f"{path} is damaged" in done.stderr
