"""What the command line of `llmctl bench` asks for, checked before anything is measured."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmctl import UsageError
from llmctl_serve.bench.load import Load
from llmctl_serve.bench.prompts import Lengths, parse_lengths
from llmctl_serve.bench.summary import parse_limits, split_list

REQUESTS = 64
"""Of each load, unless --requests or --seconds say otherwise; of many users at a time four each, if that is more."""
PROMPT_TOKENS = "128"
MOST_USERS = 65_535
"""Connections that one address can have to another one's port."""
OWN = {"model": "--model", "messages": "--input", "prompt": "--input", "stream": ""}
"""Fields of a request that --body must not change, and the option that does."""


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


def read_options(
    *,
    concurrency: str | None,
    rate: str | None,
    burst: int,
    requests: int | None,
    seconds: float | None,
    input_: Path | None,
    prompt_tokens: str | None,
    output_tokens: str,
    prefix_share: float | None,
    slo: str | None,
    timeout: float,
    body: str,
    **plain: Any,
) -> Wanted:
    """The options as one value. UsageError for what contradicts itself or cannot be read."""
    if burst > 1 and rate is None:
        raise UsageError("--burst is of arrivals, which --concurrency has none of", hint="give --rate")
    for option, value in (("--seconds", seconds), ("--timeout", timeout), ("--prefix-share", prefix_share)):
        if value is not None and not math.isfinite(value):  # click's ranges let NaN pass
            said = f"{option} {value} is no number that a measurement can have"
            raise UsageError(said, hint=f"give a finite one, or leave {option} out")
    for option, given in (("--prompt-tokens", prompt_tokens), ("--prefix-share", prefix_share)):
        if input_ is not None and given is not None:
            raise UsageError(f"{option} is of made-up prompts, --input gives others", hint="leave one of them out")
    given_requests = requests
    if requests is None and seconds is None:
        requests = REQUESTS
    users = _numbers(concurrency, "--concurrency", True) or ([1] if rate is None else [])
    if max(users, default=0) > MOST_USERS:
        said = f"--concurrency {max(users):g} is more than the {MOST_USERS} connections that there can be"
        raise UsageError(said, hint=f"give {MOST_USERS} at most")
    if given_requests is not None and max(users, default=0) > given_requests:
        said = f"{given_requests} requests do not keep {max(users):g} users busy at a time"
        raise UsageError(said, hint=f"give --requests {4 * int(max(users))}, or leave it out")

    def enough(value: int) -> int | None:
        return requests if requests is None or given_requests is not None else max(requests, 4 * value)

    loads = [Load("closed", value, enough(int(value)), seconds) for value in users]
    loads += [Load("poisson", value, requests, seconds, burst) for value in _numbers(rate, "--rate", False)]
    return Wanted(
        loads=tuple(loads),
        input=input_,
        prompt_tokens=parse_lengths(PROMPT_TOKENS if prompt_tokens is None else prompt_tokens),
        output_tokens=parse_lengths(output_tokens),
        prefix_share=prefix_share or 0.0,
        limits={} if slo is None else parse_limits(slo),
        timeout=timeout,
        body=_body(body),
        **plain,
    )


def _numbers(text: str | None, option: str, whole: bool) -> list[float]:
    if text is None:
        return []
    try:
        found = [int(part) if whole else float(part) for part in split_list(text)]
    except ValueError:
        found = []
    if not found or any(not 0 < value < math.inf for value in found):
        raise UsageError(f"{option} `{text}` holds what is no positive number", hint=f"for example {option} 1,4,16")
    return [float(value) for value in found]


def _body(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise UsageError(f"--body is no JSON: {error}", hint="for example --body '{\"top_p\": 0.9}'") from error
    if not isinstance(found, dict):
        raise UsageError("--body is no JSON object", hint="for example --body '{\"top_p\": 0.9}'")
    for name in sorted(found.keys() & OWN.keys()):
        hint = f"use {OWN[name]}" if OWN[name] else "answers are measured as they come"
        raise UsageError(f"--body gives `{name}`, which is not its to change", hint=hint)
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def check_places(*paths: Path | None) -> None:
    """UsageError if a result could not be written after a long measurement."""
    given = [path.resolve() for path in paths if path is not None]
    for path in given:
        if not path.parent.is_dir():
            raise UsageError(f"there is no directory {path.parent}", hint="create it first")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{path} cannot be written", hint="name a file in a directory of yours")
    if len(set(given)) < len(given):
        raise UsageError("--json and --html name the same file", hint="give each its own")
