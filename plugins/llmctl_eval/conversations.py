"""Tasks on `dataset.chat`: exact match of a greedy answer, and the right one among candidates by likelihood."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmctl import InputError
from llmctl.generator import Sampling
from llmctl.text.template import plain_content
from llmctl_eval.intervals import Bootstrap
from llmctl_eval.matching import NORMALISE, matches
from llmctl_eval.params import EvalParams
from llmctl_eval.samples import Sample
from llmctl_eval.subject import Messages, Subject

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A conversation up to its last answer, and the answers that are right; the first is the dataset's own."""

    id: str
    kind: str
    prompt: Messages
    expected: tuple[str, ...]
    candidates: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The last thing said before the answer."""
        return plain_content(self.prompt[-1].get("content"))

    def sample(self, task: str) -> Sample:
        """The part of a sample that says what was asked."""
        asked = {"task": task, "id": self.id, "question": self.text, "expected": self.expected[0]}
        return {**asked, **({"kind": self.kind} if self.kind else {})}


def read_question(row: Row, number: int) -> Question:
    """A row of `dataset.chat`; `aliases` holds further right answers. InputError if it does not end with an answer."""
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise InputError(
            f"row {number} ({row.get('id')}) is no question with an answer", hint="messages must end with the assistant"
        )
    expected = (plain_content(messages[-1].get("content")), *map(str, row.get("aliases") or ()))
    return Question(str(row.get("id", number)), str(row.get("kind") or ""), messages[:-1], expected)


def generate_answers(subject: Subject, params: EvalParams, batch: Sequence[Question]) -> Iterator[Sample]:
    """Greedy answers to a batch; a question without room in the context counts as answered wrongly."""
    prompts = [subject.tokenizer.encode_chat(one.prompt, add_generation_prompt=True).ids for one in batch]
    fits = [len(prompt) < subject.generator.context_length for prompt in prompts]
    sampling = Sampling(max_new_tokens=params.max_new_tokens, rules=subject.rules)
    answers = iter(
        subject.generator.generate([p for p, fit in zip(prompts, fits, strict=True) if fit], sampling)
        if any(fits)
        else []
    )
    for question, fit in zip(batch, fits, strict=True):
        answer = subject.tokenizer.decode(next(answers)) if fit else ""
        ok = fit and matches(answer, question.expected, NORMALISE[params.match])
        yield {**question.sample("exact-match"), "answer": answer, "ok": ok, **({} if fit else {"too_long": True})}


def with_candidates(questions: Sequence[Question], params: EvalParams) -> list[Question]:
    """Give each question wrong answers: those of other questions of its kind, drawn by seed and row."""
    pools: dict[str, list[str]] = {}
    for question in questions:
        pools.setdefault(question.kind, []).append(question.expected[0])
    unique = {kind: sorted(set(answers)) for kind, answers in pools.items()}
    found = []
    for number, question in enumerate(questions):
        wrong = [a for a in unique[question.kind] if not matches(a, question.expected, NORMALISE[params.match])]
        if not wrong:
            raise InputError(
                f"no wrong answer to choose for {question.id!r}: all answers of its kind are alike",
                hint="accuracy needs different answers within a kind; use exact-match",
            )
        random = np.random.default_rng([params.seed, number])
        drawn = random.choice(len(wrong), min(params.candidates - 1, len(wrong)), replace=False)
        candidates = (question.expected[0], *(wrong[i] for i in drawn))
        found.append(Question(question.id, question.kind, question.prompt, question.expected, candidates))
    return found


def choose_answers(subject: Subject, batch: Sequence[Question]) -> Iterator[Sample]:
    """The likeliest candidate of each question; the right one must be strictly likelier than every other."""
    for question in batch:
        scores = [subject.answer_logprob(question.prompt, candidate) for candidate in question.candidates]
        sample = {**question.sample("accuracy"), "chance": 1 / len(scores)}
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            yield {**sample, "answer": "", "ok": False, "too_long": True}
            continue
        best = max(range(len(known)), key=known.__getitem__)
        yield {**sample, "answer": question.candidates[best], "ok": known[0] > max(known[1:])}


def summarise(name: str, samples: Sequence[Sample], boot: Bootstrap) -> dict[str, float]:
    """`name.value`, `.low`, `.high`, `.n`, and the same for each kind under `name.KIND`."""
    values = _summary(name, samples, boot)
    kinds = sorted({sample["kind"] for sample in samples if "kind" in sample})
    if len(kinds) > 1:
        for kind in kinds:
            part = [sample for sample in samples if sample.get("kind") == kind]
            values |= _summary(f"{name}.{metric_name(kind)}", part, boot)
    return values


def _summary(name: str, samples: Sequence[Sample], boot: Bootstrap) -> dict[str, float]:
    found = boot.mean([float(sample["ok"]) for sample in samples])
    return {
        f"{name}.value": found.value,
        f"{name}.low": found.low,
        f"{name}.high": found.high,
        f"{name}.n": len(samples),
    }


def metric_name(kind: str) -> str:
    """A kind as part of a metric's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", kind)
