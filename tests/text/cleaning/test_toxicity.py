from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmctl.text.cleaning.params import ToxicityParams
from llmctl.text.cleaning.step import Drop, Noted
from llmctl.text.cleaning.toxicity import Toxicity
from llmctl.text.documents import Document

LABELLED: dict[str, list[str]] = json.loads(Path(__file__).with_name("labelled_toxicity.json").read_text("utf-8"))
INSULT, PLAIN = LABELLED["offensive"][0], "The committee meets every Tuesday."


def step(**params: object) -> Toxicity:
    return Toxicity(ToxicityParams(name="toxicity", **params), 0)


def test_precision_and_recall_on_the_labelled_set() -> None:
    found = {label: [score >= 0.8 for score in step().scores(texts)] for label, texts in LABELLED.items()}
    hits, wrong = sum(found["offensive"]), sum(found["harmless"])
    assert hits / len(found["offensive"]) >= 0.9, [
        t for t, hit in zip(LABELLED["offensive"], found["offensive"], strict=True) if not hit
    ]
    assert hits / (hits + wrong) >= 0.9, [
        t for t, hit in zip(LABELLED["harmless"], found["harmless"], strict=True) if hit
    ]


def test_the_classifier_alone_takes_look_alikes_for_insults() -> None:
    """What the second look is for."""
    alone = step()._score(LABELLED["harmless"])
    assert sum(score >= 0.8 for score in alone) >= 4


def test_actions() -> None:
    text = f"{PLAIN} {INSULT} {PLAIN}"
    document = Document("1", "s", text)
    dropped = step()(document)
    assert isinstance(dropped, Drop) and dropped.reason == "offensive" and dropped.detail.endswith("1 of 3 sentences")
    assert isinstance(step(share=0.5)(document), Noted)
    assert isinstance(step(share=0.3)(document), Drop)
    cut = step(action="cut")(document)
    assert isinstance(cut, Noted) and cut.document.text == f"{PLAIN} {PLAIN}" and cut.found == {"sentences": 1}
    tagged = step(action="tag")(document)
    assert isinstance(tagged, Noted) and tagged.document.text == text
    assert tagged.document.meta["toxicity"]["sentences"] == 1
    assert isinstance(step(action="cut")(Document("1", "s", INSULT)), Drop)
    plain = Document("2", "s", PLAIN)
    assert step()(plain) is plain


def test_quotations_and_own_innocent_words_and_threshold() -> None:
    quoted = Document("1", "s", f'He wrote "{INSULT}" in his letter to the paper.')
    assert step()(quoted) is quoted
    assert isinstance(step(quotations=True)(quoted), Drop)
    named = Document("1", "s", "The Fuck brothers sell shoes.")
    assert isinstance(step(threshold=0.5)(named), Drop)
    assert step(threshold=0.5, innocent=["fuck"])(named) is named
    score = step().scores([INSULT])[0]
    assert 0.8 < score <= 1


def test_many_at_once_is_the_same_as_one_at_a_time() -> None:
    documents = [Document(str(n), "s", text) for n, text in enumerate(LABELLED["offensive"] + LABELLED["harmless"])]
    toxicity = step()
    assert toxicity.batch(documents) == [toxicity(document) for document in documents]


@pytest.mark.parametrize("kind", ["code", "table"])
def test_other_kinds_are_not_judged(kind: str) -> None:
    document = Document("1", "s", INSULT, meta={"kind": kind})
    assert step()(document) is document


def test_a_share_of_one_asks_for_every_sentence() -> None:
    assert isinstance(step(share=1.0)(Document("1", "s", f"{INSULT} {INSULT}")), Drop)
    assert isinstance(step(share=1.0)(Document("1", "s", f"{INSULT} {PLAIN}")), Noted)
