"""Ask an index questions whose document is known, and others that have no answer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from llmctl import Artifact, Context, InputError
from llmctl.generation_config import read_generation_config, rules_of
from llmctl.generator import Generator, Sampling
from llmctl.rules import Rules
from llmctl.text.datasets import read_rows, splits
from llmctl.text.grounding import (
    REFUSAL,
    Grounds,
    attribute,
    citations,
    find_grounds,
    grounded_prompt,
    marks,
    quote,
)
from llmctl.text.retrieval import Index, Passage
from llmctl.text.streaming import complete
from llmctl.text.template import plain_content
from llmctl.text.tokenizer import Tokenizer
from llmctl_rag.params import RagParams

EVERY = 20
"""Questions between two progress events."""


@dataclass(frozen=True)
class Document:
    """The text of an indexed document, and where it comes from (a module, a file)."""

    text: str
    source: str


@dataclass(frozen=True)
class Answer:
    """What was said, from which passages; `refused` if the question was refused."""

    text: str
    passages: list[Passage]
    refused: bool


@dataclass(frozen=True)
class Answerer:
    """Answers from an index: a quoted sentence, or the model's words with citations."""

    index: Index
    params: RagParams
    generator: Generator | None = None
    tokenizer: Tokenizer | None = None
    rules: Rules | None = None
    """What the model's answers keep to, by its own `generation_config.json`."""

    @classmethod
    def open(cls, params: RagParams, index: Index, model: Artifact | None) -> Answerer:
        """Open the model if `answers` asks for one."""
        if params.answers == "extractive" or model is None:
            return cls(index, params)
        from llmctl.registry import get_registry

        opened = get_registry().open_generator(model, device=params.device, threads=params.threads)
        rules = rules_of(read_generation_config(model.path))
        return cls(index, params, opened, Tokenizer.load(model.path), rules)

    def answer(self, question: str) -> tuple[Grounds, Answer]:
        """What was found, and what is said from it."""
        grounds = find_grounds(self.index, question, self.params.top_k, self.params.refuse_below)
        if grounds.refused:
            return grounds, Answer(REFUSAL, [], True)
        if self.generator is None or self.tokenizer is None:
            return grounds, Answer(quote(self.index, grounds), grounds.passages, False)
        ids, passages = self._prompt(self.tokenizer, self.generator.context_length, question, grounds)
        if not passages:
            return grounds, Answer(REFUSAL, [], True)
        sampling = Sampling(max_new_tokens=self.params.max_new_tokens, rules=self.rules)
        text = complete(self.generator, self.tokenizer, ids, sampling).text
        return grounds, Answer(attribute(self.index, text, passages), passages, False)

    def _prompt(
        self, tokenizer: Tokenizer, context: int, question: str, grounds: Grounds
    ) -> tuple[list[int], list[Passage]]:
        """The ids that the model continues, and the passages that its answer may cite."""
        messages = [{"role": "user", "content": question}]
        if self.params.answers == "closed-book":
            return tokenizer.encode_chat(messages, add_generation_prompt=True).ids, grounds.passages
        prompt = grounded_prompt(messages, grounds.passages, tokenizer, context - self.params.max_new_tokens)
        return prompt.ids, prompt.passages


@dataclass
class Tally:
    """Counts over the questions asked so far."""

    asked: int = 0
    found: int = 0
    found_source: int = 0
    reciprocal: float = 0.0
    discounted: float = 0.0
    refused: int = 0
    marks: int = 0
    resolved: int = 0
    cited_right: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)


def measure(
    ctx: Context,
    params: RagParams,
    index: Index,
    documents: Mapping[str, Document],
    questions: Artifact,
    answerer: Answerer,
) -> dict[str, float]:
    """Ask the answerable and the unanswerable questions, append `samples.jsonl`, return the metrics."""
    known = Tally()
    for row in _ask(ctx, params, questions, params.questions_split):
        _ask_known(known, row, index, documents, answerer)
    if not known.asked:
        raise InputError(
            f"no question in split `{params.questions_split}` of {questions.path} names one of the documents",
            hint="rows need a `document`: the id of the text that holds the answer",
        )
    unknown = Tally()
    if params.unanswerable_split in splits(questions):
        for row in _ask(ctx, params, questions, params.unanswerable_split):
            _ask_unknown(unknown, row, answerer)
    with (ctx.output("metrics") / "samples.jsonl").open("w", encoding="utf-8") as file:
        for sample in known.samples + unknown.samples:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    return _metrics(params, known, unknown)


def _ask(ctx: Context, params: RagParams, questions: Artifact, split: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(islice(read_rows(questions, split), params.limit), start=1):
        yield row
        if number % EVERY == 0:
            ctx.progress(number, split=split)
            if ctx.should_stop():
                raise ctx.stopped(number)


def _question(row: Mapping[str, Any]) -> str:
    """The last user message of a conversation."""
    said = [message["content"] for message in row["messages"] if message["role"] == "user"]
    if not said:
        raise InputError(f"the conversation {row.get('id')!r} has no user message", hint="give questions with answers")
    return plain_content(said[-1])


def _ask_known(
    tally: Tally, row: Mapping[str, Any], index: Index, documents: Mapping[str, Document], answerer: Answerer
) -> None:
    right = str(row.get("document") or "")
    if right not in documents:
        return  # the corpus was cut down after the questions were made
    question = _question(row)
    grounds, answer = answerer.answer(question)
    found = [passage.chunk.document for passage in index.search(question, answerer.params.top_k)]
    tally.asked += 1
    tally.found += right in found
    tally.found_source += documents[right].source in {documents[name].source for name in found}
    if right in found:
        rank = found.index(right) + 1
        tally.reciprocal += 1 / rank
        tally.discounted += 1 / math.log2(rank + 1)  # nDCG with one right document: the best order would have 1
    tally.refused += answer.refused
    cited = _count_citations(tally, answer, documents)
    tally.cited_right += right in cited
    tally.samples.append(_sample(row, question, grounds, answer, right in found))


def _count_citations(tally: Tally, answer: Answer, documents: Mapping[str, Document]) -> list[str]:
    """Count marks and those that resolve: the chunk stands at its place in its document. Returns documents cited."""
    if answer.refused:
        return []
    tally.marks += len(marks(answer.text))
    cited = []
    for citation in citations(answer.text, answer.passages):
        chunk = citation.passage.chunk
        if documents[chunk.document].text[chunk.start : chunk.end] == chunk.text:
            tally.resolved += 1
            cited.append(chunk.document)
    return cited


def _ask_unknown(tally: Tally, row: Mapping[str, Any], answerer: Answerer) -> None:
    question = _question(row)
    grounds, answer = answerer.answer(question)
    tally.asked += 1
    tally.refused += answer.refused
    tally.samples.append(_sample(row, question, grounds, answer, answer.refused))


def _sample(row: Mapping[str, Any], question: str, grounds: Grounds, answer: Answer, ok: bool) -> dict[str, Any]:
    cited = [citation.to_dict() for citation in citations(answer.text, answer.passages)]
    return {
        "id": row.get("id"),
        "kind": row.get("kind"),
        "question": question,
        "answer": answer.text,
        "expected": row.get("document") or "a refusal",
        "ok": ok,
        "support": round(grounds.support, 4),
        "citations": [{"number": one["number"], "id": one["id"]} for one in cited],
    }


def _metrics(params: RagParams, known: Tally, unknown: Tally) -> dict[str, float]:
    answered = known.asked - known.refused
    values: dict[str, float] = {
        f"recall@{params.top_k}.value": known.found / known.asked,
        f"recall@{params.top_k}.source": known.found_source / known.asked,
        f"recall@{params.top_k}.n": known.asked,
        "mrr.value": known.reciprocal / known.asked,
        f"ndcg@{params.top_k}.value": known.discounted / known.asked,
        "refusal.answerable": known.refused / known.asked,
    }
    if answered:
        values["citations.right_document"] = known.cited_right / answered
    if known.marks:
        values |= {"citations.resolved": known.resolved / known.marks, "citations.n": known.marks}
    if unknown.asked:
        values |= {"refusal.value": unknown.refused / unknown.asked, "refusal.n": unknown.asked}
    return values
