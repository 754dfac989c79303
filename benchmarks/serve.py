"""Serving on the CPU: our server beside its own engine, llama.cpp's server and onnxruntime-genai's engine.

The 82M LLaMA of `benchmarks/decode.py`, float32, greedy. Sixteen streaming clients ask over HTTP, each again as soon as
it is answered; the engine alone answers as many prompts of the same lengths in one process without HTTP. In every
round each side has its turn, with prompts that no round before had; ratios are taken round by round, then their median.
Then requests arrive by Poisson processes at `--shares` of what our server could take, and the time to the first token
counts from when they were due. Both servers, and genai's engine in its process, meet the same arrivals; goodput is the
share within the limits.

    python benchmarks/serve.py --home /tmp/bench --peers peers/bin/python --threads 2
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import platform
import random
import runpy
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmctl_serve.bench.host import NAME, hosted
from llmctl_serve.bench.load import Load, Record, Runner
from llmctl_serve.bench.prompts import Prompt
from llmctl_serve.bench.summary import parse_limits, summarise
from llmctl_serve.endpoint import Endpoint
from llmctl_serve.http_client import HttpClient

HERE = Path(__file__).parent
FIRST = 0x4E00
"""The character of token 0, as in `benchmarks/peers/serve.py`."""
CLIENTS = 16
DECODE = runpy.run_path(str(HERE / "decode.py"))
Rate = Callable[[list[list[int]], int], float]
"""Prompts and the length of an answer to tokens per second."""
Arrivals = Callable[[Load, list[list[int]], int], list[Record]]
"""A load, its prompts and the length of an answer to what became of each request."""


def prepare(home: Path, peers: str | None) -> Path:
    """Model, bundle with a tokenizer of one character per token, and the other side's file; the bundle."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        bundle = home / "served"
        if not (home / "fp32" / "model" / "model.onnx").is_file():
            DECODE["prepare"](home, None, 0, False)
        if not (bundle / "tokenizer.json").is_file():
            shutil.rmtree(bundle, ignore_errors=True)
            shutil.copytree(home / "fp32" / "model", bundle)
            write_tokenizer(bundle, DECODE["SHAPE"]["vocab_size"])
        target = home / "served-gguf"
        if peers and not (target / "fp32.gguf").is_file():
            target.mkdir(exist_ok=True)
            subprocess.run([peers, HERE / "peers" / "serve.py", "convert", home / "hf", target], check=True)
    return bundle


def write_tokenizer(directory: Path, size: int) -> None:
    """Every token is a character of its own, so that text and ids have one length everywhere."""
    from tokenizers import Tokenizer, decoders, models

    raw = Tokenizer(models.BPE({chr(FIRST + token): token for token in range(size)}, []))
    raw.decoder = decoders.Fuse()
    raw.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": chr(FIRST + 2)}))


def arrive(side: Any, load: Load, prompts: list[list[int]], new: int) -> list[Record]:
    """What an engine without a server does with the arrivals of a load."""
    due = list(load.arrivals(0))
    found = side.exchange({"prompts": prompts, "new": new, "due": due})
    if any(len(times) != new for times in found["times"]):
        raise SystemExit("an answer is too short: nothing was compared")
    return [
        Record(at, at, times, times[-1], completion_tokens=len(times), finish_reason="length")
        for at, times in zip(due, found["times"], strict=True)
    ]


def make_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of random ids, none like another."""
    rng = random.Random(seed)
    return [[rng.randrange(3, DECODE["SHAPE"]["vocab_size"]) for _ in range(length)] for _ in range(count)]


def engine_answers(bundle: Path, threads: int) -> Any:
    """Our engine without a server: all prompts at once, as many side by side as there are clients."""
    from llmctl.engine import EngineOptions, Request
    from llmctl.generator import Sampling
    from llmctl.ort import open_bundle

    generator = open_bundle(bundle, "cpu", threads)
    generator.eos_ids = frozenset()
    engine = generator.engine(EngineOptions(slots=CLIENTS, max_queue=4096))

    def answer(prompts: list[list[int]], new: int) -> list[list[int]]:
        tickets = [engine.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=new))) for prompt in prompts]
        said: dict[int, list[int]] = {ticket: [] for ticket in tickets}
        while engine.busy:
            for event in engine.step():
                said[event.ticket] += event.tokens
        return [said[ticket] for ticket in tickets]

    return answer


class HttpSide:
    """A server that is asked by the load generator of `llmctl bench`."""

    def __init__(self, endpoint: Endpoint, model: str, body: dict[str, Any]) -> None:
        self.endpoint, self.model, self.body = endpoint, model, body

    def run(self, load: Load, prompts: list[list[int]], new: int) -> list[Record]:
        """All requests of a load. SystemExit for one that failed or was cut short."""

        async def go() -> list[Record]:
            client = HttpClient(self.endpoint, 600)
            try:
                runner = Runner(client, self.model, False, self.body)
                texts = [Prompt("".join(chr(FIRST + token) for token in prompt), new) for prompt in prompts]
                return await runner.run(load, texts, 0, lambda *_: None)
            finally:
                await client.close()

        records = asyncio.run(go())
        for record in records:
            if not record.ok or record.finish_reason != "length":
                raise SystemExit(f"{self.endpoint.url}: {record.error or record.finish_reason} {record.message}")
        return records

    def rate(self, prompts: list[list[int]], new: int) -> float:
        """Tokens per second with all clients at work."""
        records = self.run(Load("closed", CLIENTS, len(prompts)), prompts, new)
        return new * len(records) / max(record.end for record in records)


@contextlib.contextmanager
def llama_server(python: str, file: Path, threads: int) -> Iterator[HttpSide]:
    """llama-cpp-python's server on a free port; it answers one request at a time."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [python, "-m", "llama_cpp.server", "--model", str(file), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--n_ctx", "2048"]
    # Without this a new request would cut a running one short.
    command += ["--interrupt_requests", "false", "--verbose", "false"]
    with (file.parent / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(
                    f"llama.cpp's server did not start: {(file.parent / 'server.log').read_text()[-2000:]}"
                )
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                break
            time.sleep(0.2)
        ends = {str(token): -100 for token in (2,)}
        yield HttpSide(Endpoint("127.0.0.1", port), str(file), {"temperature": 0, "logit_bias": ends})
    finally:
        process.terminate()
        process.wait()


def compare(sides: dict[str, Rate], requests: int, length: int, new: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every side in every round, after a warm-up."""
    for number, rate in enumerate(sides.values()):
        rate(make_prompts(2, length, 10_000 + number), new)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        prompts = make_prompts(requests, length, number)
        for name in list(sides)[:: -1 if number % 2 else 1]:
            found[name].append(sides[name](prompts, new))
    return found


def main() -> None:
    """Print tables, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="interpreter of the peers' environment")
    parser.add_argument("--leave-out", nargs="*", default=[], help="peers that are not asked: genai, llama.cpp")
    parser.add_argument("--home", type=Path, help="where the exports are kept; a temporary directory by default")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64, help="of each round")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--arrivals", type=int, default=100, help="requests of each Poisson load")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.9], help="of our throughput, its rates")
    parser.add_argument("--limits", default="ttft=1s,tpot=100ms", help="of goodput")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = args.home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        home.mkdir(exist_ok=True)
        bundle = prepare(home, args.peers)
        measure(stack, home, bundle, args)


def measure(stack: contextlib.ExitStack, home: Path, bundle: Path, args: argparse.Namespace) -> None:
    """Start the sides, let them take turns, then the arrivals."""
    own = [sys.executable, str(HERE / "serve.py"), "--work", str(bundle), str(args.threads)]
    servers = {
        "llmctl server": HttpSide(
            stack.enter_context(hosted(bundle, "cpu", args.threads)), NAME, {"temperature": 0, "ignore_eos": True}
        )
    }
    processes = {"llmctl engine": DECODE["Side"](own, home / "engine.log")}
    if args.peers and "genai" not in args.leave_out:
        command = [args.peers, str(HERE / "peers" / "serve.py"), "genai", str(bundle), str(args.threads)]
        processes["genai engine"] = DECODE["Side"](command, home / "genai.log")
    if args.peers and "llama.cpp" not in args.leave_out:
        file = home / "served-gguf" / "fp32.gguf"
        servers["llama.cpp server"] = stack.enter_context(llama_server(args.peers, file, args.threads))
    for process in processes.values():
        stack.callback(process.end)

    def alone(process: Any) -> Rate:
        def rate(prompts: list[list[int]], new: int) -> float:
            seconds, tokens = process.ask(prompts, new)
            if any(len(row) != new for row in tokens):
                raise SystemExit("an answer is too short: nothing was compared")
            return new * len(prompts) / float(seconds)

        return rate

    sides: dict[str, Rate] = {name: side.rate for name, side in servers.items()}
    sides |= {name: alone(process) for name, process in processes.items()}
    rates = compare(sides, args.requests, args.prompt, args.new, args.rounds)
    report(rates, args)
    capacity = statistics.median(rates["llmctl server"]) / args.new
    met: dict[str, Arrivals] = {name: side.run for name, side in servers.items()}
    if "genai engine" in processes:
        met["genai engine"] = functools.partial(arrive, processes["genai engine"])
    for number, share in enumerate(args.shares):
        load = Load("poisson", round(share * capacity, 3), args.arrivals)
        prompts = make_prompts(args.arrivals, args.prompt, 777 + number)
        for name, run in met.items():
            tell(name, share, summarise(load, run(load, prompts, args.new), parse_limits(args.limits)), args)


def tell(name: str, share: float, found: dict[str, Any], args: argparse.Namespace) -> None:
    """How one side met a load."""
    ttft = {key: found["ttft"][key] * 1e3 for key in ("p50", "p95")}
    print(
        f"{name}: {found['load']} ({share:.0%} of ours): TTFT p50 {ttft['p50']:.0f} ms, p95 {ttft['p95']:.0f} ms; "
        f"goodput ({args.limits}) {found['goodput']['share']:.0%}"
    )
    kept = {key: found[key] for key in ("load", "ttft", "tpot", "goodput")}
    print(json.dumps({"benchmark": "serve", "side": name, "machine": platform.machine(), **kept}), flush=True)


def report(rates: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Tokens per second, and how much of each our server delivers."""
    print(f"{CLIENTS} clients, prompt {args.prompt}, {args.new} new tokens, {args.requests} requests a round, medians")
    ours = rates["llmctl server"]
    ratios = {name: statistics.median(a / b for a, b in zip(ours, some, strict=True)) for name, some in rates.items()}
    for name, some in rates.items():
        print(f"  {name:17} {statistics.median(some):8.1f} tokens/s   our server delivers {ratios[name]:.2f} of it")
    print(json.dumps({"benchmark": "serve", "tokens_per_s": rates, "ratio": ratios}), flush=True)


def work(bundle: str, threads: str) -> None:
    """Be our engine."""
    warnings.simplefilter("ignore")
    serve = runpy.run_path(str(HERE / "peers" / "decode.py"))["serve"]
    serve(engine_answers(Path(bundle), int(threads)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        main()
