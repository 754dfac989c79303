from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmctl.errors import InputError, UsageError
from llmctl.text.cleaning.decontamination import Decontaminate
from llmctl.text.cleaning.params import DecontaminateParams
from llmctl.text.cleaning.step import Drop
from llmctl.text.documents import Document

RNG = random.Random(11)
VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "ou") for c in ("n", "rk", "ll", "st", "mi")]


def words(count: int) -> list[str]:
    return [RNG.choice(VOCABULARY) for _ in range(count)]


QUESTIONS = [" ".join(words(25)) + "?" for _ in range(60)]
SHORT = [" ".join(words(9)) for _ in range(20)]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "quiz.jsonl"
    rows = [{"question": question, "answer": "yes"} for question in QUESTIONS]
    rows += [{"question": "What?", "answer": answer} for answer in SHORT]
    rows.append({"messages": [{"role": "user", "content": " ".join(["hello"] * 14)}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def step(path: Path, **params: object) -> Decontaminate:
    return Decontaminate(DecontaminateParams(name="decontaminate", **params), 0, [path])


def changed(text: str, number: int) -> str:
    """Another case and other punctuation."""
    return [text, text.upper(), text.replace(" ", ", "), text.title().replace(" ", " — "), f"«{text}»"][number % 5]


def test_every_planted_item_is_found_and_nothing_else(evaluation: Path, corpus: Callable[..., Any]) -> None:
    items = QUESTIONS + SHORT
    documents, planted = [], []
    for number in range(400):
        parts = [" ".join(words(120)), " ".join(words(80))]
        item = items[number // 4] if number % 4 == 0 and number // 4 < len(items) else None
        if item is not None:
            parts.insert(1, changed(item, number // 4))
        planted.append(item is not None)
        documents.append(Document(str(number), "s", " ".join(parts)))
    outcomes, resolution = corpus(step(evaluation), documents, 5, 3)
    assert [isinstance(outcome, Drop) for outcome in outcomes] == planted
    assert resolution.facts["items_found"] == resolution.facts["documents"] == len(items)
    names = {name: ids for name, ids in resolution.facts["found"]}
    assert names["quiz.jsonl/train#1.question"] == ["0"]
    assert names["quiz.jsonl/train#61.answer"] == ["240"]


def test_parameters(evaluation: Path, corpus: Callable[..., Any]) -> None:
    half = " ".join(QUESTIONS[0].rstrip("?").split()[:15])
    document = Document("0", "s", f"{' '.join(words(30))} {half} {' '.join(words(30))}")

    def hits(**params: object) -> list[str]:
        return step(evaluation, **params).hits(document.text)

    assert hits() == ["quiz.jsonl/train#1.question"]
    assert hits(share=0.5) == []
    assert hits(ngram=16) == []
    assert hits(fields=["answer"]) == []
    assert step(evaluation, min_words=10, fields=["answer", "question"]).short == 60 + 20 + 20
    tagged, _ = corpus(step(evaluation, action="tag"), [document])
    assert tagged[0].meta["contaminated"] == ["quiz.jsonl/train#1.question"] and tagged[0].text == document.text
    assert step(evaluation).hits(" ".join(["Hello"] * 20)) == ["quiz.jsonl/train#81.messages"]


def test_text_files_and_what_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "items.txt"
    path.write_text(f"{QUESTIONS[1]}\n\n{QUESTIONS[2]}\n")
    assert step(path).hits(f"Now {QUESTIONS[2].lower()} yes") == ["items.txt#2"]
    path.write_text("too short\n")
    with pytest.raises(InputError, match="no evaluation item has 8 words"):
        step(path)
    with pytest.raises(UsageError, match="nothing to look for"):
        Decontaminate(DecontaminateParams(name="decontaminate"), 0)


def test_chinese_is_found_by_characters(tmp_path: Path) -> None:
    path = tmp_path / "items.txt"
    path.write_text("请问下面哪一个选项正确地描述了光合作用的过程", encoding="utf-8")
    assert step(path).hits("前言。请问下面哪一个选项正确地描述了光合作用的过程？后记") == ["items.txt#1"]
    assert step(path).hits("这是一个完全不同的句子，没有任何重叠的内容，请继续阅读") == []


def test_a_share_of_one_asks_for_the_whole_item(evaluation: Path) -> None:
    whole = f"{' '.join(words(30))} {QUESTIONS[0]} {' '.join(words(30))}"
    cut = " ".join(QUESTIONS[0].rstrip("?").split()[:-1])
    assert step(evaluation, share=1.0).hits(whole) == ["quiz.jsonl/train#1.question"]
    assert step(evaluation, share=1.0).hits(cut) == [] and step(evaluation).hits(cut)
