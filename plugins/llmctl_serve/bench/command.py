"""`llmctl bench`: the command line, one load after the other, and what is printed and written of them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from llmctl import InputError, StageError, UsageError, __version__
from llmctl_serve.bench.load import Load, Record, Runner
from llmctl_serve.bench.prompts import Lengths, Prompt, linear_counter, make_prompts, parse_lengths, read_prompts
from llmctl_serve.bench.summary import LATE, parse_limits, summarise
from llmctl_serve.endpoint import Endpoint, HttpFailure, parse_endpoint, pick_model
from llmctl_serve.http_client import HttpClient
from llmctl_serve.session import find_model

REQUESTS = 64
"""Of each load, unless --requests or --seconds say otherwise."""
MADE = 512
"""Prompts made up for a load that ends by time; a load that takes more takes those of others."""
PROBES = (4, 24)
"""Words of the two requests from which the tokens per word are found."""


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    api: str
    model: str | None
    loads: tuple[Load, ...]
    warmup: int
    input: Path | None
    prompt_tokens: Lengths
    output_tokens: Lengths
    prefix_share: float
    seed: int
    limits: dict[str, float]
    timeout: float
    body: dict[str, Any]
    tokenizer: Any = None
    """Of a bundle that is served here: it counts a prompt's tokens exactly."""


def _numbers(text: str | None, option: str, whole: bool) -> list[float]:
    if text is None:
        return []
    try:
        found = [int(part) if whole else float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or any(not 0 < value < float("inf") for value in found):
        raise UsageError(f"{option} `{text}` holds what is no positive number", hint=f"for example {option} 1,4,16")
    return [float(value) for value in found]


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
@click.option("--prompt-tokens", default="128", show_default=True, help="Or uniform:64:256, lognormal:128:0.5.")
@click.option("--output-tokens", default="64", show_default=True, help="At most so many; as --prompt-tokens.")
@click.option("--prefix-share", type=click.FloatRange(0, 1), default=0.0, help="Share of a prompt that all begin with.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of lengths, texts and arrivals.")
@click.option("--slo", default="", help="Limits for goodput, as in ttft=200ms,itl=50ms,tpot=30ms,e2e=5s.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=120.0, show_default=True, help="Seconds.")
@click.option("--body", default="{}", help='Further fields of each request, as in {"temperature": 0}.')
@click.option("--json", "json_", type=click.Path(path_type=Path), help="Write numbers and every request here.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with charts here.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Of a server here.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Of a server here; 0 takes one per physical core.")
def bench(
    artifact: str | None,
    url: str | None,
    api_key_env: str | None,
    json_: Path | None,
    html: Path | None,
    device: str,
    threads: int,
    **given: Any,
) -> None:
    """Measure a server of OpenAI's API under load, or ARTIFACT, which is served meanwhile.

    Latencies, throughput, failures and goodput; one load after the other.
    """
    if artifact is not None and url is not None:
        raise UsageError("both a model and --url are given", hint="leave one of them out")
    for path in (json_, html):
        if path is not None and not path.resolve().parent.is_dir():
            raise UsageError(f"there is no directory {path.resolve().parent}", hint="create it first")
    wanted = read_options(**given)
    if url is not None:
        endpoint = parse_endpoint(url, api_key_env)
        result, records = asyncio.run(measure(endpoint, wanted))
    else:
        result, records = measure_artifact(artifact, wanted, device, threads)
    show(result)
    if json_ is not None:
        rows = [
            {**load, "records": [record.to_dict() for record in some]}
            for load, some in zip(result["loads"], records, strict=True)
        ]
        json_.write_text(json.dumps({**result, "loads": rows}, indent=1) + "\n", encoding="utf-8")
    if html is not None:
        from llmctl_serve.bench.page import render

        html.write_text(render(result, records), encoding="utf-8")
    if not any(load["answered"] for load in result["loads"]):
        kind, message = next(iter(result["loads"][0]["error_examples"].items()))
        raise StageError(f"no request was answered ({kind}: {message})", hint="try one with curl first")


def read_options(
    *,
    concurrency: str | None,
    rate: str | None,
    burst: int,
    requests: int | None,
    seconds: float | None,
    input_: Path | None,
    prompt_tokens: str,
    output_tokens: str,
    slo: str,
    body: str,
    **plain: Any,
) -> Wanted:
    """The options as one value. UsageError for what contradicts itself or cannot be read."""
    if burst > 1 and rate is None:
        raise UsageError("--burst is of arrivals, which --concurrency has none of", hint="give --rate")
    if requests is None and seconds is None:
        requests = REQUESTS
    users = _numbers(concurrency, "--concurrency", True) or ([1] if rate is None else [])
    loads = [Load("closed", value, requests, seconds) for value in users]
    loads += [Load("poisson", value, requests, seconds, burst) for value in _numbers(rate, "--rate", False)]
    try:
        extra = json.loads(body)
    except ValueError as error:
        raise UsageError(f"--body is no JSON: {error}") from error
    if not isinstance(extra, dict):
        raise UsageError("--body is no JSON object")
    return Wanted(
        loads=tuple(loads),
        input=input_,
        prompt_tokens=parse_lengths(prompt_tokens),
        output_tokens=parse_lengths(output_tokens),
        limits=parse_limits(slo),
        body=extra,
        **plain,
    )


def measure_artifact(
    artifact: str | None, wanted: Wanted, device: str, threads: int
) -> tuple[dict[str, Any], list[list[Record]]]:
    """Serve a model on this machine and measure it."""
    from dataclasses import replace

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
        result, records = asyncio.run(measure(endpoint, wanted))
    return {**result, "model": str(artifact or found.path), "url": "served here"}, records


async def measure(endpoint: Endpoint, wanted: Wanted) -> tuple[dict[str, Any], list[list[Record]]]:
    """All loads, one after the other, after the warm-up; the result, and the records of each load."""
    from llmctl.store.names import timestamp

    client = HttpClient(endpoint, wanted.timeout)
    try:
        model = wanted.model or pick_model(await client.get("/models"), endpoint.url)
        chat = await find_api(client, model, wanted)
        runner = Runner(client, model, chat, wanted.body)
        prompts = await find_prompts(runner, wanted)
        if wanted.warmup:
            load = Load("closed", min(wanted.warmup, max(int(load.value) for load in wanted.loads) or 1), wanted.warmup)
            await runner.run(load, prompts, 0, lambda *_: None)
        records = []
        asked = wanted.warmup
        for number, load in enumerate(wanted.loads):
            # Each load goes on where the one before has ended: what was asked may lie in a prefix cache.
            first = asked % len(prompts)
            own = [*prompts[first:], *prompts[:first]]
            records.append(await runner.run(load, own, wanted.seed + number, _ticker(load)))
            if not records[-1]:
                raise UsageError(f"no request fell into the {load.seconds:g} s of {load.label}", hint="raise --seconds")
            asked += len(records[-1])
    except HttpFailure as failure:
        raise StageError(f"{endpoint.url}: {failure.message} ({failure.kind})", hint="is the server up?") from failure
    finally:
        await client.close()
    loads = [summarise(load, some, wanted.limits) for load, some in zip(wanted.loads, records, strict=True)]
    return {
        "llmctl": __version__,
        "written": timestamp(),
        "url": endpoint.url,
        "model": model,
        "api": "chat" if chat else "completions",
        "limits": wanted.limits,
        "prompts": {
            **_described(wanted),
            "different": len({json.dumps(prompt.content, sort_keys=True) for prompt in prompts}),
            "asked": asked,
        },
        "loads": loads,
    }, records


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


def _ticker(load: Load) -> Any:
    """Shows on a terminal how far a load is."""
    if not sys.stderr.isatty():
        click.echo(f"{load.label} …", err=True)
        return lambda ended, begun: None

    def tick(ended: int, begun: int) -> None:
        of = f" of {load.requests}" if load.requests else ""
        click.echo(f"\r{load.label}: {ended}{of} answered, {begun - ended} under way\x1b[K", err=True, nl=False)
        if load.requests == ended:
            click.echo("\r\x1b[K", err=True, nl=False)

    return tick


def show(result: dict[str, Any]) -> None:
    """Print the tables: rich ones on a terminal, plain ones into a pipe."""
    loads = result["loads"]
    headers = ["load", "requests", "failed", "req/s", "tokens/s", "TTFT p50", "p95", "ITL p50", "p95", "TPOT p50"]
    headers += ["E2E p50", "p95", *(["goodput", "good/s"] if result["limits"] else [])]
    rows = [_row(load) for load in loads]
    click.echo(f"{result['model']} at {result['url']} ({result['api']}); milliseconds")
    _print_table(headers, rows)
    different, asked = result["prompts"]["different"], result["prompts"]["asked"]
    if asked > different:
        said = f"warning: {asked} requests had {different} different prompts, so a prefix cache may have held some"
        click.echo(said, err=True)
    for load in loads:
        for kind, count in load["errors"].items():
            click.echo(f"{load['load']}: {count} failed, {kind}: {load['error_examples'][kind]}")
        if load["client_lag"]["p99"] > LATE:
            late = load["client_lag"]["p99"] * 1000
            click.echo(f"warning: {load['load']}: this client began requests {late:.0f} ms late (p99)", err=True)


def _row(load: dict[str, Any]) -> list[str]:
    from llmctl.console import human_number
    from llmctl_serve.bench.page import milliseconds

    def cell(name: str, level: str) -> str:
        return milliseconds(load[name][level]) if name in load else "-"

    row = [load["load"], str(load["requests"]), str(load["requests"] - load["answered"])]
    row += [human_number(load["requests_per_s"]), human_number(load["output_tokens_per_s"])]
    row += [cell(n, q) for n, q in (("ttft", "p50"), ("ttft", "p95"), ("itl", "p50"), ("itl", "p95"), ("tpot", "p50"))]
    row += [cell("e2e", "p50"), cell("e2e", "p95")]
    if good := load.get("goodput"):
        row += [f"{100 * good['share']:.1f} %", human_number(good["requests_per_s"])]
    return row


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not sys.stdout.isatty():
        from llmctl.console import table

        click.echo(table(headers, rows))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(headers):
        shown.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    Console(highlight=False).print(shown)
