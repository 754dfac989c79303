"""What is asked under load: the lines of a file, or made-up texts of given lengths with a share that all have."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl import InputError, UsageError
from llmctl_serve.jobs import LineError, read_overrides
from llmctl_serve.remote import request_fields, score_fields

_LIST = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work number night point home water room mother area money story
fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name team minute idea body back parent face level office door health
person art war history party result change morning reason research girl guy moment air teacher force
"""
WORDS = _LIST.split()
MOST = 1 << 20


@dataclass(frozen=True)
class Lengths:
    """A distribution of numbers of tokens: `fixed` (a), `uniform` (a to b) or `lognormal` (median a, sigma b)."""

    kind: str
    a: float
    b: float = 0.0

    def draw(self, rng: random.Random) -> int:
        """One length, at least 1."""
        if self.kind == "uniform":
            return rng.randint(int(self.a), int(self.b))
        value = self.a if self.kind == "fixed" else self.a * math.exp(rng.gauss(0, self.b))
        return max(1, min(MOST, round(value)))


def parse_lengths(text: str) -> Lengths:
    """`128`, `uniform:64:256` or `lognormal:128:0.5`. UsageError for anything else."""
    kind, _, rest = text.partition(":")
    words = rest.split(":") if rest else []
    try:
        if not rest and 1 <= int(text) <= MOST:
            return Lengths("fixed", int(text))
        if kind == "uniform" and len(words) == 2 and 1 <= int(words[0]) <= int(words[1]) <= MOST:
            return Lengths(kind, int(words[0]), int(words[1]))
        if kind == "lognormal" and len(words) == 2 and 1 <= float(words[0]) <= MOST and 0 <= float(words[1]) <= 3:
            return Lengths(kind, float(words[0]), float(words[1]))
    except ValueError:
        pass  # said below, as for numbers out of range
    raise UsageError(
        f"`{text}` is no length in tokens", hint="give 128, uniform:64:256 or lognormal:MEDIAN:SIGMA (sigma up to 3)"
    )


@dataclass(frozen=True)
class Prompt:
    """One request: a text or messages, how long its answer may be, and fields of the body that its line gives."""

    content: str | list[dict[str, Any]]
    max_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)

    def payload(self, chat: bool, model: str, body: dict[str, Any]) -> bytes:
        """The body of the request."""
        if chat:
            messages = self.content
            if isinstance(messages, str):
                messages = [{"role": "user", "content": messages}]
            asked: dict[str, Any] = {"messages": messages}
        else:
            asked = {"prompt": self.content}
        whole = {
            "model": model,
            **asked,
            "max_tokens": self.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **body,
            **self.extra,
        }
        return json.dumps(whole, ensure_ascii=False).encode()


def read_prompts(path: Path, chat: bool, output: Lengths, seed: int) -> list[Prompt]:
    """The prompts of a JSON Lines file, `{"prompt": …}` or `{"messages": […]}`, with what a line says of its answer.

    The fields are those of `generate --input`; others are not sent. InputError names file and line of what is neither,
    and of a value that no request can have.
    """
    rng = random.Random(seed)
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.append(_read_prompt(f"{path}:{number}", line, chat, output.draw(rng)))
    if not found:
        raise InputError(f"{path} holds no prompt", hint='write lines such as {"prompt": "Hello"}')
    return found


def _read_prompt(where: str, line: str, chat: bool, limit: int) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is no JSON object")
    content = row.get("messages", row.get("prompt"))
    if not content or not isinstance(content, str | list):
        raise InputError(f"{where} has neither a `prompt` nor `messages`")
    if isinstance(content, list) and not chat:
        raise InputError(f"{where} holds messages, which are no text to continue", hint="use --api chat")
    try:
        given = read_overrides(row)
        stop, logprobs = given.pop("stop", ()), given.pop("logprobs", None)
        fields = {**request_fields(given, stop), **score_fields(logprobs, chat)}
    except (LineError, UsageError) as error:
        raise InputError(f"{where}: {error.message}") from error
    return Prompt(content, given.get("max_new_tokens", limit), fields)


Counter = Callable[[str], int]
"""How many tokens a prompt with this text has."""


def linear_counter(base: float, per_word: float) -> Counter:
    """An estimate from two requests: `base` tokens of the template, and so many for each word."""
    return lambda text: round(base + per_word * len(text.split()))


def make_prompts(
    count: int, lengths: Lengths, output: Lengths, prefix_share: float, counter: Counter, seed: int
) -> list[Prompt]:
    """Made-up prompts of drawn lengths; the first `prefix_share` of the words of each are those of all the others."""
    rng = random.Random(seed)
    common = random.Random(seed + 1)
    shared: list[str] = []
    found = []
    for _ in range(count):
        target, limit = lengths.draw(rng), output.draw(rng)
        words = [rng.choice(WORDS) for _ in range(target)]  # a word has at least one token
        while len(shared) < len(words):
            shared.append(common.choice(WORDS))
        found.append(Prompt(_of_length(words, shared, prefix_share, target, counter), limit))
    return found


def _of_length(words: Sequence[str], shared: Sequence[str], share: float, target: int, counter: Counter) -> str:
    """The longest text of at most `target` tokens by bisection over its words."""

    def text(size: int) -> str:
        cut = round(size * share)
        return " ".join([*shared[:cut], *words[: size - cut]])

    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if counter(text(middle)) <= target else (low, middle - 1)
    return text(low)
