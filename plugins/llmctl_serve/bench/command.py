"""`llmctl bench`: the command line, one load after the other, and what is printed and written of them."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from llmctl import InputError, StageError, UsageError, __version__
from llmctl.error_output import json_line, wants_json
from llmctl.launch.signals import CODES
from llmctl_serve.bench.exposition import Watch, describe
from llmctl_serve.bench.interrupt import Interrupt
from llmctl_serve.bench.load import Load, Record, Runner, Tick
from llmctl_serve.bench.options import PROMPT_TOKENS, REQUESTS, Wanted, check_places, read_options
from llmctl_serve.bench.prompts import Lengths, Prompt, linear_counter, make_prompts, read_prompts
from llmctl_serve.bench.results import write_files
from llmctl_serve.bench.summary import add_speed_up, summarise
from llmctl_serve.bench.tables import show
from llmctl_serve.endpoint import Endpoint, HttpFailure, parse_endpoint, pick_model
from llmctl_serve.http_client import HttpClient
from llmctl_serve.session import find_model

MADE = 512
"""Prompts made up for a load that ends by time; a load that takes more takes those of others."""
PROBES = (4, 24)
"""Words of the two requests from which the tokens per word are found."""


@dataclass
class Collected:
    """What a measurement has brought: of each load that has ended its records, and what the server says of it."""

    model: str
    chat: bool
    prompts: Sequence[Prompt]
    metrics_missing: str
    records: list[list[Record]]
    seen: list[dict[str, Any] | None]


@click.command()
@click.argument("artifact", required=False)
@click.option("--url", help="A server of OpenAI's API; without one ARTIFACT is served here meanwhile.")
@click.option("--model", help="Model id; may be left out where the server has one.")
@click.option("--api-key-env", help="Environment variable with the key; default OPENAI_API_KEY.")
@click.option("--api", type=click.Choice(["auto", "chat", "completions"]), default="auto", show_default=True)
@click.option("--concurrency", help="Closed loop: so many users at a time, as in 1,4,16. Default 1 unless --rate.")
@click.option("--rate", help="Poisson arrivals: so many requests a second, as in 0.5,1,2.")
@click.option("--burst", type=click.IntRange(1), default=1, help="With --rate: requests that arrive together.")
@click.option("--requests", type=click.IntRange(1), help=f"Of each load. Default {REQUESTS} unless --seconds.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="No request begins later in a load.")
@click.option("--warmup", type=click.IntRange(0), default=2, show_default=True, help="Requests before, not counted.")
@click.option("--input", "input_", type=click.Path(path_type=Path), help="JSON Lines of prompts or messages.")
@click.option("--prompt-tokens", show_default=PROMPT_TOKENS, help="Or uniform:64:256, lognormal:128:0.5.")
@click.option("--output-tokens", default="64", show_default=True, help="At most so many; as --prompt-tokens.")
@click.option("--prefix-share", type=click.FloatRange(0, 1), help="Share of a prompt that all begin with.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of lengths, texts and arrivals.")
@click.option("--slo", help="Limits for goodput, as in ttft=200ms,itl=50ms,tpot=30ms,e2e=5s.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=120.0, show_default=True, help="Seconds.")
@click.option("--body", default="{}", help='Further fields of each request, as in {"temperature": 0}.')
@click.option("--json", "json_", type=click.Path(path_type=Path), help="Write numbers and every request here.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with charts here.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Of a server here. Default auto.")
@click.option("--threads", type=click.IntRange(0), help="Of a server here; 0 takes one per physical core.")
def bench(
    artifact: str | None,
    url: str | None,
    api_key_env: str | None,
    json_: Path | None,
    html: Path | None,
    device: str | None,
    threads: int | None,
    **given: Any,
) -> int | None:
    """Measure a server of OpenAI's API under load, or ARTIFACT, which is served meanwhile.

    Latencies, throughput, failures and goodput; one load after the other. Ctrl-C reports the loads that have ended.
    """
    if artifact is not None and url is not None:
        raise UsageError("both a model and --url are given", hint="leave one of them out")
    if url is not None and (device is not None or threads is not None):
        raise UsageError("--device and --threads are of a server here, --url names another one", hint="leave them out")
    if url is None and (given["model"] is not None or api_key_env is not None):
        raise UsageError("--model and --api-key-env are of a server elsewhere", hint="give its --url")
    check_places(json_, html)
    wanted = read_options(**given)
    check_arrivals(wanted)
    with Interrupt() as interrupt:
        if url is not None:
            result, records = measure(parse_endpoint(url, api_key_env), wanted, interrupt)
        else:
            result, records = measure_artifact(artifact, wanted, device or "auto", threads or 0, interrupt)
        # First what stays: whoever reads the table may leave before its end.
        write_files(result, records, json_, html)
        missing = wanted.loads[len(records) :]
        if missing:
            say_interrupted(missing)
        show(result)
    if missing:
        return CODES[signal.SIGINT]
    if interrupt.came:  # after the last load had ended
        raise KeyboardInterrupt
    if not any(load["answered"] for load in result["loads"]):
        record = records[0][-1]
        raise StageError(f"no request was answered ({record.error}: {record.message})", hint="try one with curl first")
    return None


def say_interrupted(missing: Sequence[Load]) -> None:
    """One line on stderr, in the form of errors."""
    text = f"interrupted; missing loads: {', '.join(load.label for load in missing)}"
    click.echo(json_line(text, None, CODES[signal.SIGINT]) if wants_json(sys.argv[1:]) else text, err=True)


def check_arrivals(wanted: Wanted) -> None:
    """UsageError for a load by time that would end before its first request, before anything is measured."""
    for number, load in enumerate(wanted.loads):
        if load.kind == "poisson" and next(load.arrivals(wanted.seed + number), None) is None:
            raise UsageError(f"no request falls into the {load.seconds:g} s of {load.label}", hint="raise --seconds")


def measure_artifact(
    artifact: str | None, wanted: Wanted, device: str, threads: int, interrupt: Interrupt
) -> tuple[dict[str, Any], list[list[Record]]]:
    """Serve a model on this machine and measure it."""
    from llmctl.text.tokenizer import Tokenizer
    from llmctl_serve.bench.host import NAME, hosted

    found = find_model(artifact)
    tokenizer = Tokenizer.load(found.path)
    try:
        has_chat = bool(tokenizer.chat_template)
    except InputError:
        has_chat = False
    api = ("chat" if has_chat else "completions") if wanted.api == "auto" else wanted.api
    wanted = replace(wanted, api=api, tokenizer=tokenizer, model=NAME)
    with hosted(found.path, device, threads) as endpoint:
        result, records = measure(endpoint, wanted, interrupt)
    return {**result, "model": str(artifact or found.path), "url": "served here"}, records


def measure(endpoint: Endpoint, wanted: Wanted, interrupt: Interrupt) -> tuple[dict[str, Any], list[list[Record]]]:
    """All loads, one after the other, after the warm-up; the result, and the records of each load.

    After an interrupt those of the loads that had ended; KeyboardInterrupt if none had.
    """
    from llmctl.store.names import timestamp

    found = asyncio.run(collect(endpoint, wanted, interrupt))
    loads = [
        {**summarise(load, some, wanted.limits), "server": server}
        for load, some, server in zip(wanted.loads, found.records, found.seen, strict=False)
    ]
    add_speed_up(loads)
    return {
        "llmctl": __version__,
        "written": timestamp(),
        "url": endpoint.url,
        "model": found.model,
        "api": "chat" if found.chat else "completions",
        "limits": wanted.limits,
        "prompts": {
            **_described(wanted),
            "different": len({json.dumps(prompt.content, sort_keys=True) for prompt in found.prompts}),
            "asked": wanted.warmup + sum(len(some) for some in found.records),
        },
        "metrics_missing": found.metrics_missing,
        "loads": loads,
    }, found.records


async def collect(endpoint: Endpoint, wanted: Wanted, interrupt: Interrupt) -> Collected:
    """Ask the server: what it is, the warm-up, all loads."""
    client, watch = HttpClient(endpoint, wanted.timeout), Watch(endpoint)
    try:
        await watch.open()
        model = wanted.model or pick_model(await client.get("/models"), endpoint.url)
        chat = await find_api(client, model, wanted)
        runner = Runner(client, model, chat, wanted.body)
        prompts = await find_prompts(runner, wanted)
        if wanted.warmup:
            load = Load("closed", min(wanted.warmup, max(int(load.value) for load in wanted.loads) or 1), wanted.warmup)
            await runner.run(load, prompts, 0, lambda *_: None)
        records, seen = await run_loads(runner, watch, wanted, prompts, interrupt)
    except HttpFailure as failure:
        raise StageError(f"{endpoint.url}: {failure.message} ({failure.kind})", hint="is the server up?") from failure
    finally:
        await client.close()
        await watch.close()
    why = "interrupted" if interrupt.came else "no answer in time"
    metrics_missing = watch.missing or ("" if any(one is not None for one in seen) else why)
    return Collected(model, chat, prompts, metrics_missing, records, seen)


async def run_loads(
    runner: Runner, watch: Watch, wanted: Wanted, prompts: Sequence[Prompt], interrupt: Interrupt
) -> tuple[list[list[Record]], list[dict[str, Any] | None]]:
    """One load after the other: the records of each, and what the server's metrics say of it.

    An interrupt ends them: what has ended is returned. CancelledError if nothing has.
    """
    records: list[list[Record]] = []
    seen: list[dict[str, Any] | None] = []
    asked = wanted.warmup
    try:
        for number, load in enumerate(wanted.loads):
            if interrupt.came:  # while the watch waited for the end of its own task
                break
            # Each load goes on where the one before has ended: what was asked may lie in a prefix cache.
            first = asked % len(prompts)
            own = [*prompts[first:], *prompts[:first]]
            async with watch.beside() as watched:
                with _shown(load) as tick:
                    records.append(await runner.run(load, own, wanted.seed + number, tick))
                interrupt.keep()
            seen.append(describe(watched, runner.model, records[-1]))
            asked += len(records[-1])
    except asyncio.CancelledError:
        if not records:
            raise
        interrupt.came = True
        seen += [None] * (len(records) - len(seen))  # it came between the end of a load and the look at the server
    finally:
        interrupt.release()
    return records, seen


def _described(wanted: Wanted) -> dict[str, Any]:
    def text(lengths: Lengths) -> str:
        return {
            "fixed": f"{lengths.a:g}",
            "uniform": f"{lengths.a:g} to {lengths.b:g}",
            "lognormal": f"about {lengths.a:g}, sigma {lengths.b:g}",
        }[lengths.kind]

    return {
        "file": str(wanted.input) if wanted.input else None,
        "prompt_tokens": None if wanted.input else text(wanted.prompt_tokens),
        "output_tokens": text(wanted.output_tokens),
        "prefix_share": wanted.prefix_share,
        "seed": wanted.seed,
        "body": wanted.body,
    }


async def find_api(client: HttpClient, model: str, wanted: Wanted) -> bool:
    """Whether to chat: as asked, else whether the server answers a chat."""
    if wanted.api != "auto":
        return wanted.api == "chat"
    body = {"model": model, "messages": [{"role": "user", "content": "time"}], "max_tokens": 1}
    try:
        await client.post("/chat/completions", body)
    except HttpFailure as failure:
        if failure.kind in ("status 400", "status 404", "status 405"):
            return False
        raise
    return True


async def find_prompts(runner: Runner, wanted: Wanted) -> list[Prompt]:
    """The prompts of the file, or made-up ones, as many as all loads take."""
    if wanted.input is not None:
        return read_prompts(wanted.input, runner.chat, wanted.output_tokens, wanted.seed)
    count = sum(load.requests or MADE for load in wanted.loads) + wanted.warmup
    if wanted.tokenizer is not None:
        counter = token_counter(wanted.tokenizer, runner.chat)
    else:
        few, many = [await _probe(runner, words) for words in PROBES]
        per_word = (many - few) / (PROBES[1] - PROBES[0])
        if per_word <= 0:
            raise StageError("the server's usage does not count the tokens of prompts", hint="give --input FILE")
        counter = linear_counter(few - per_word * PROBES[0], per_word)
    return make_prompts(count, wanted.prompt_tokens, wanted.output_tokens, wanted.prefix_share, counter, wanted.seed)


async def _probe(runner: Runner, words: int) -> int:
    """Tokens of a prompt of so many words, as the server counts them."""
    from llmctl_serve.bench.prompts import WORDS

    record = await runner.ask(Prompt(" ".join((WORDS * 2)[:words]), 1), 0.0, 0.0)
    if record.error not in (None, "empty answer"):
        raise HttpFailure(record.error or "", record.message)
    return record.prompt_tokens or 0


def token_counter(tokenizer: Any, chat: bool) -> Any:
    """Counts what the server will read, template or begin token included."""
    if chat:
        return lambda text: len(
            tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True).ids
        )
    return lambda text: len(tokenizer.encode(text)) + (tokenizer.bos_id is not None)


@contextmanager
def _shown(load: Load) -> Iterator[Tick]:
    """Shows on a terminal how far a load is, as long as it runs."""
    if not sys.stderr.isatty():
        click.echo(f"{load.label} …", err=True)
        yield lambda ended, begun: None
        return

    def tick(ended: int, begun: int) -> None:
        of = f" of {load.requests}" if load.requests else ""
        click.echo(f"\r{load.label}: {ended}{of} answered, {begun - ended} under way\x1b[K", err=True, nl=False)

    try:
        yield tick
    finally:
        click.echo("\r\x1b[K", err=True, nl=False)
