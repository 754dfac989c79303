"""Tasks on `dataset.labelled`: classes of texts and words, answers in a text, translations, embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmctl import InputError
from llmctl.generator import Sampling
from llmctl.text.inputs import Asked, best_answer, frame_question, frame_text, frame_words
from llmctl.text.pooling import read_longest, read_pooling
from llmctl.text.tokenizer import Framed
from llmctl_eval.matching import NORMALISE, matches
from llmctl_eval.params import EvalParams, LabelledTask
from llmctl_eval.samples import Sample
from llmctl_eval.scores import answer_f1, chunks
from llmctl_eval.subject import Subject

Row = Mapping[str, Any]
Score = Callable[[Sequence[Row]], Iterator[Sample]]


def scorer(subject: Subject, task: LabelledTask, params: EvalParams) -> Score:
    """What scores a batch of rows of the task. InputError if the model has not the head for it."""
    if task != "seq2seq":
        _check_head(subject, task)
    tasks: dict[LabelledTask, Callable[[Subject, EvalParams, Sequence[Row]], Iterator[Sample]]] = {
        "classification": classify,
        "token-classification": tag,
        "question-answering": find_answers,
        "seq2seq": translate,
        "embedding": embed,
    }
    return lambda rows: tasks[task](subject, params, rows)


NEEDED: dict[LabelledTask, set[str]] = {
    "classification": {"logits"},
    "token-classification": {"logits"},
    "question-answering": {"start_logits", "end_logits"},
    "embedding": {"last_hidden_state"},
}
AXES = {"classification": 2, "token-classification": 3}


def _check_head(subject: Subject, task: LabelledTask) -> None:
    """Try the head on a text of nothing: its outputs tell what it is."""
    found = subject.reader.run([subject.tokenizer.frame("a").ids])
    fits = NEEDED[task] <= set(found) and (task not in AXES or found["logits"].ndim == AXES[task])
    if task in AXES:
        fits = fits and len(subject.reader.labels) == found["logits"].shape[-1]
    if not fits:
        raise InputError(
            f"the {subject.role} has no head for {task}: it gives {', '.join(sorted(found))}",
            hint=f"fine-tune it: `llmctl sft` with rows of task {task}",
        )


def read(subject: Subject, framed: Sequence[Framed]) -> list[dict[str, np.ndarray] | None]:
    """What the model says of each text, cut to its own tokens where an output has one entry per token.

    None for a text that exceeds the context.
    """
    fits = [n for n, one in enumerate(framed) if len(one.ids) <= subject.reader.context_length]
    said: list[dict[str, np.ndarray] | None] = [None] * len(framed)
    if not fits:
        return said
    rows, segments = [framed[n].ids for n in fits], [framed[n].segments for n in fits]
    found = subject.reader.run(rows, segments if any(map(any, segments)) else None)
    width = max(map(len, rows))
    for index, number in enumerate(fits):
        values = {name: value[index] for name, value in found.items()}
        size = len(framed[number].ids)
        # Logits are of the text, or looked up by place: both have no use for a cut.
        said[number] = {n: v[:size] if v.ndim and len(v) == width and n != "logits" else v for n, v in values.items()}
    return said


def _sample(task: str, row: Row, question: str, expected: str) -> Sample:
    kind = {"kind": str(row["kind"])} if row.get("kind") else {}
    return {"task": task, "id": str(row.get("id", "")), "question": question, "expected": expected, **kind}


LOST = {"answer": "", "ok": False, "too_long": True}


def classify(subject: Subject, params: EvalParams, rows: Sequence[Row]) -> Iterator[Sample]:
    """The likeliest class of each text."""
    said = read(subject, [frame_text(subject.tokenizer, row) for row in rows])
    for row, values in zip(rows, said, strict=True):
        sample = _sample("classification", row, row["text"], row["label"])
        if values is None:
            yield {**sample, **LOST}
            continue
        answer = subject.reader.labels[int(values["logits"].argmax())]
        yield {**sample, "answer": answer, "ok": answer == row["label"]}


def tag(subject: Subject, params: EvalParams, rows: Sequence[Row]) -> Iterator[Sample]:
    """The likeliest class of each word; one without a token of its own counts as O, or as the first class."""
    labels = subject.reader.labels
    words = [frame_words(subject.tokenizer, row["tokens"]) for row in rows]
    said = read(subject, [one.framed for one in words])
    other = "O" if "O" in labels else labels[0]
    for row, one, values in zip(rows, words, said, strict=True):
        sample = _sample("token-classification", row, " ".join(row["tokens"]), " ".join(row["labels"]))
        if values is None:
            yield {**sample, **LOST, "words": len(row["tokens"]), "right": 0, "found": 0, "hits": 0,
                   "there": len(chunks(row["labels"]))}  # fmt: skip
            continue
        logits = values["logits"]
        answer = [other if place is None else labels[int(logits[place].argmax())] for place in one.places]
        there, found = chunks(row["labels"]), chunks(answer)
        right = sum(a == b for a, b in zip(answer, row["labels"], strict=True))
        yield {
            **sample, "answer": " ".join(answer), "ok": answer == row["labels"], "words": len(answer), "right": right,
            "there": len(there), "found": len(found), "hits": len(there & found),
        }  # fmt: skip


def find_answers(subject: Subject, params: EvalParams, rows: Sequence[Row]) -> Iterator[Sample]:
    """The likeliest span of each context, as the characters it is made of."""
    asked: list[Asked] = [frame_question(subject.tokenizer, row["question"], row["context"]) for row in rows]
    said = read(subject, [one.framed for one in asked])
    for row, one, values in zip(rows, asked, said, strict=True):
        sample = _sample("question-answering", row, row["question"], row["answer"])
        if values is None:
            yield {**sample, **LOST, "f1": 0.0}
            continue
        start, end = best_answer(one, values["start_logits"], values["end_logits"], params.max_answer_tokens)
        answer = row["context"][start:end]
        ok = matches(answer, (row["answer"], *map(str, row.get("aliases") or ())), NORMALISE[params.match])
        yield {**sample, "answer": answer, "ok": ok, "start": start, "f1": answer_f1(answer, row["answer"])}


def translate(subject: Subject, params: EvalParams, rows: Sequence[Row]) -> Iterator[Sample]:
    """Greedy answers of an encoder-decoder, or of anything that generates."""
    prompts = [subject.tokenizer.frame_document(subject.tokenizer.encode(row["source"])) for row in rows]
    fits = [len(prompt) <= subject.generator.context_length for prompt in prompts]
    sampling = Sampling(max_new_tokens=params.max_new_tokens, rules=subject.rules)
    answers = iter(
        subject.generator.generate([p for p, fit in zip(prompts, fits, strict=True) if fit], sampling)
        if any(fits)
        else []
    )
    for row, fit in zip(rows, fits, strict=True):
        sample = _sample("seq2seq", row, row["source"], row["target"])
        if not fit:
            yield {**sample, **LOST}
            continue
        answer = subject.tokenizer.decode(next(answers))
        yield {**sample, "answer": answer, "ok": matches(answer, (row["target"],), NORMALISE[params.match])}


def embed(subject: Subject, params: EvalParams, rows: Sequence[Row]) -> Iterator[Sample]:
    """Both vectors of each pair, of length 1, in the sample until `rank_vectors` has compared them all."""
    pooling = read_pooling(subject.artifact.path)
    texts = [row[name] for row in rows for name in ("text", "positive")]
    framed = [subject.tokenizer.frame(text) for text in texts]
    if most := read_longest(subject.artifact.path):
        framed = [one.within(min(most, subject.reader.context_length)) for one in framed]
    said = read(subject, framed)
    for number, row in enumerate(rows):
        sample = _sample("embedding", row, row["text"], row["positive"])
        pair = said[2 * number : 2 * number + 2]
        if any(values is None for values in pair):
            yield {**sample, **LOST}
            continue
        vectors = []
        for values in pair:
            assert values is not None
            states, vector = values["last_hidden_state"], values.get("sentence_embedding")
            if vector is None:
                vector = states[0] if pooling == "cls" else states.mean(axis=0)
            vectors.append((vector / max(float(np.linalg.norm(vector)), 1e-12)).tolist())
        yield {**sample, "answer": "", "ok": False, "vectors": vectors}
