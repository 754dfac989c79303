"""The lines of a JSONL file as things to answer, and the lines of the answers, which survive a kill."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from llmctl import InputError, UsageError

STDIO = "-"
OVERRIDES: Mapping[str, tuple[type, ...]] = {
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "frequency_penalty": (int, float),
    "presence_penalty": (int, float),
    "logit_bias": (dict,),
    "seed": (int,),
    "beams": (int,),
    "length_penalty": (int, float),
    "early_stopping": (bool, str),
    "n": (int,),
    "stop": (str, list),
    "logprobs": (int,),
}
"""Fields of a line that say how it is answered, and what they may be."""
ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
OWN = ("id", "prompt", "messages")
FOUND = (
    "text", "finish_reason", "tokens", "prompt_tokens", "logprob", "score", "candidates", "tool_calls", "error",
)  # fmt: skip
"""Fields of an answer, beside `logprobs`: a line's own ones could not be told apart from them."""


class LineError(Exception):
    """One line cannot be answered; the others can. `kind` is for machines."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message


@dataclass(frozen=True)
class Job:
    """One line: what is asked, how, and what is carried through to its answer."""

    id: Any
    where: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Any] = field(default_factory=dict)
    problem: LineError | None = None
    """Why the line cannot be answered."""


def read_jobs(path: str) -> Iterator[Job]:
    """A job for every line that is not empty; what is wrong with a line is the problem of its job.

    Without an `id` a line's number is its id. InputError if the file cannot be read, or an id comes twice.
    """
    seen: dict[str, str] = {}
    name = "stdin" if path == STDIO else path
    try:
        file: IO[bytes] = sys.stdin.buffer if path == STDIO else Path(path).open("rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            job = _read_job(line, number, f"{name}:{number}")
            key = id_key(job.id)
            if key in seen:
                raise InputError(f"{job.where} has the id {key} of {seen[key]}", hint="ids must differ")
            seen[key] = job.where
            yield job


def id_key(id: Any) -> str:
    """An id as it is compared: 1 and "1" differ."""
    return json.dumps(id, sort_keys=True)


def _read_job(line: bytes, number: int, where: str) -> Job:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_no_number)
        _line(row)  # as its answer repeats what it holds
    except UnicodeEncodeError:
        return Job(number, where, problem=LineError("bad_line", f"{where} holds half of a surrogate pair, no text"))
    except (ValueError, RecursionError) as error:
        return Job(number, where, problem=LineError("bad_line", f"{where} is no JSON: {error}"))
    if not isinstance(row, dict):
        return Job(number, where, problem=LineError("bad_line", f"{where} is no JSON object"))
    id = row.get("id", number)
    known = {*OVERRIDES, *ALIASES, *OWN}
    carried = {key: value for key, value in row.items() if key not in known and key not in FOUND}
    try:
        job = Job(id, where, row.get("prompt"), row.get("messages"), read_overrides(row), carried)
        _check(job)
        if taken := next((key for key in row if key in FOUND), None):
            raise LineError("bad_line", f"`{taken}` is a field of the answer; give yours another name")
    except LineError as problem:
        message = f"{where}: {problem.message}"
        return Job(id, where, carried=carried, problem=LineError(problem.kind, message))
    return job


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is none of its numbers")


def _line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _check(job: Job) -> None:
    if (job.prompt is None) == (job.messages is None):
        raise LineError("bad_line", "give either `prompt` or `messages`")
    if job.prompt is not None and (not isinstance(job.prompt, str) or not job.prompt):
        raise LineError("bad_line", "`prompt` is no text, or empty")
    if job.messages is not None:
        good = isinstance(job.messages, list) and job.messages
        if not good or not all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in job.messages
        ):
            raise LineError("bad_line", "`messages` is no list of {role, content}")


def read_overrides(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a line says of how it is answered, by our names: `stop` as a list, `logit_bias` as pairs.

    LineError for a value of another type.
    """
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = ALIASES.get(key, key)
        if name not in OVERRIDES:
            continue
        kinds = OVERRIDES[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise LineError("bad_line", f"`{key}` is {json.dumps(value)}")
        found[name] = value
    stop = found.get("stop")
    if isinstance(stop, str):
        found["stop"] = [stop]
    elif stop is not None and not all(isinstance(text, str) and text for text in stop):
        raise LineError("bad_line", "`stop` is no list of texts")
    if "logit_bias" in found:
        try:
            pairs = [(int(token), float(value)) for token, value in found["logit_bias"].items()]
        except (TypeError, ValueError):
            raise LineError("bad_line", "`logit_bias` maps ids of tokens to numbers") from None
        found["logit_bias"] = tuple(pairs)
    return found


@dataclass
class Results:
    """The lines of the answers, appended in order, each whole before the next begins."""

    path: str
    retry_errors: bool = False
    finished: set[str] = field(default_factory=set)
    """Keys of the ids that have a line already."""
    failures: dict[str, str] = field(default_factory=dict)
    """Of those, the ones whose line is an error that is kept, with its message."""
    repaired: bool = False

    def __enter__(self) -> Results:
        if self.path == STDIO:
            self._file: IO[bytes] = sys.stdout.buffer
            return self
        path = Path(self.path)
        try:
            if path.is_file():
                self._resume(path.resolve())  # what a link names is written, and the link stays
            self._file = path.open("ab" if path.is_file() or not path.exists() else "wb")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        if self.path != STDIO:
            self._file.close()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append answers."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.write("".join(lines).encode(errors="replace"))  # a server may say halves of characters
        self._file.flush()

    def _resume(self, path: Path) -> None:
        """Read what is finished, and cut off a last line that a kill left half written."""
        kept, size = [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    self.repaired = True
                    break
                size += len(line)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    key = id_key(row["id"])
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{path}:{number} is no answer of this command", hint="name another --output"
                    ) from error
                if "error" in row:
                    if self.retry_errors:
                        continue
                    why = row["error"]
                    self.failures[key] = str(why.get("message", why) if isinstance(why, dict) else why)
                kept.append(line)
                self.finished.add(key)
        if self.retry_errors:
            fresh = path.with_name(f".{path.name}.new")
            fresh.touch(0o600)
            fresh.write_bytes(b"".join(kept))
            shutil.copymode(path, fresh)
            fresh.replace(path)
        elif self.repaired:
            os.truncate(path, size)
