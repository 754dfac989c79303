"""The answers that the teacher writes to the data's prompts (1606.07947): kept while they are written, left as rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.generator import Candidate
from llmctl.stage import Artifact, Context
from llmctl.text.datasets import DatasetWriter
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.batches import Example
from llmctl.train.conversations import Encoder, Row, asked, read_examples
from llmctl.train.generate import TorchGenerator
from llmctl_distill.params import WRITTEN, DistillParams
from llmctl_distill.writing import example, sampling

AT_ONCE = 64
"""Prompts between two lines of the file that a stopped run goes on from."""
PAUSE = 0.2
"""Seconds between two looks of a process that waits for the one that writes."""


@dataclass(frozen=True)
class Question:
    """A prompt, its ids, and the row that it is from."""

    row: Row
    prompt: list[int]


def read_questions(ctx: Context, data: Artifact, encoder: Encoder) -> list[Question]:
    """The prompts of `train`; the data's own answers are not looked at."""
    params = encoder.params
    return read_examples(ctx, data, "train", lambda row: Question(row, encoder.prompt(row)), params.max_dropped)


def write_answers(
    ctx: Context, questions: Sequence[Question], generator: TorchGenerator, params: DistillParams, teacher: str
) -> list[Candidate]:
    """The teacher's answer to each prompt, `teacher` being its id.

    They are kept in `ctx.resume_dir`, so that a run that was stopped goes on behind the last that is there. Of several
    processes the first writes and the others wait: all must learn from the same answers.
    """
    path = ctx.resume_dir / "answers.jsonl"
    prompts = [question.prompt for question in questions]
    head = {"facts": _facts(params, prompts, teacher)}
    if not ctx.wants("model"):
        while len(found := _read(path, head)) < len(prompts):
            if ctx.should_stop():
                raise ctx.stopped(0)
            time.sleep(PAUSE)
        return found
    found = _read(path, head)
    found = found[: len(found) // AT_ONCE * AT_ONCE] if len(found) < len(prompts) else found
    ctx.resume_dir.mkdir(parents=True, exist_ok=True)
    _rewrite(path, head, found)
    with path.open("a", encoding="utf-8") as file:
        for start in range(len(found), len(prompts), AT_ONCE):
            if ctx.should_stop():
                raise ctx.stopped(0)
            some = range(start, min(start + AT_ONCE, len(prompts)))
            answers = generator.answers([prompts[i] for i in some], [sampling(params, i) for i in some])
            file.write("".join(json.dumps(_line(answer)) + "\n" for answer in answers))
            file.flush()
            found += [Candidate(answer.ids, [], answer.ended, end=answer.end) for answer in answers]
            ctx.progress(len(found), len(prompts), writing="answers")
    return found


def _facts(params: DistillParams, prompts: Sequence[Sequence[int]], teacher: str) -> dict[str, Any]:
    """What the answers follow from."""
    chosen = {name: getattr(params, name) for name in (*WRITTEN, "beams", "seed")}
    return {**chosen, "teacher": teacher, "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}


def _line(answer: Candidate) -> list[Any]:
    return [answer.ids, answer.end]


def _read(path: Path, head: dict[str, Any]) -> list[Candidate]:
    """The answers of a file that begins with `head`; a last line that was cut off counts as not there."""
    try:
        first, *lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return []
    if first != json.dumps(head):
        return []
    found = [json.loads(line) for line in lines[:-1]]
    return [Candidate(ids, [], end is not None, end=end) for ids, end in found]


def _rewrite(path: Path, head: dict[str, Any], answers: Sequence[Candidate]) -> None:
    """The file with these answers alone, in one step: others may be reading it."""
    lines = [json.dumps(head), *(json.dumps(_line(answer)) for answer in answers)]
    new = path.with_suffix(".new")
    new.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    new.replace(path)


def to_examples(questions: Sequence[Question], answers: Sequence[Candidate], length: int) -> list[Example]:
    """What the student learns: the answers behind their prompts, in rows of at most `length` tokens."""
    return [example(question.prompt, answer, length) for question, answer in zip(questions, answers, strict=True)]


def leave_rows(
    directory: Path, tokenizer: Tokenizer, questions: Sequence[Question], answers: Sequence[Candidate]
) -> dict[str, Any]:
    """Write the conversations, and whether each answer ended by itself, as `dataset.chat`; returns facts of it."""
    with DatasetWriter(directory, "dataset.chat") as writer:
        for question, answer in zip(questions, answers, strict=True):
            said = {"role": "assistant", "content": tokenizer.decode(answer.ids)}
            messages = [*asked(question.row["messages"]), said]
            writer.add("train", {"id": question.row.get("id"), "messages": messages, "ended": answer.ended})
    return {"rows": len(answers)}


def measure(answers: Sequence[Candidate]) -> dict[str, float]:
    """How many answers there are, how long they are in tokens, and how many of them ended by themselves."""
    count = len(answers)
    return {
        "answers": float(count),
        "answers.tokens": sum(len(answer.ids) for answer in answers) / count,
        "answers.ended": sum(answer.ended for answer in answers) / count,
    }
