"""Derived texts: the group reaches its share, each names its parent, none is the twin of an evaluation item."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pydantic
import pytest

from llmctl.errors import InputError, UsageError
from llmctl.text.cleaning import noise
from llmctl.text.cleaning.augment import Augment
from llmctl.text.cleaning.balance_params import AugmentParams
from llmctl.text.cleaning.step import Several
from llmctl.text.documents import Document

RULES = [{"pattern": r"\bw(\d)\b", "replace": [r"v\1", r"u\1", r"t\1 t\1"]}]
TEMPLATES = {
    "templates": ["{who} is late", "no {what} for {who}"],
    "slots": {"who": list("abcdef"), "what": list("xyzuvw")},
}


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """300 texts of twenty words, 30 of them of the class `rare`."""
    rng = random.Random(5)
    texts = [" ".join(f"w{rng.randrange(10)}" for _ in range(20)) for _ in range(300)]
    labels = ["often" if n % 10 else "rare" for n in range(300)]
    return [Document(str(n), "s", text, meta={"label": labels[n]}) for n, text in enumerate(texts)]


def step(method: str = "noise", share: float = 0.25, evaluation: Sequence[Path] = (), **params: Any) -> Augment:
    more = {"paraphrase": {"rules": RULES}, "synthetic": TEMPLATES}.get(method, {})
    return Augment(
        AugmentParams(name="augment", group="rare", share=share, method=method, **{**more, **params}), 0, evaluation
    )


def left(outcomes: Sequence[Any]) -> list[Document]:
    return [one for got in outcomes for one in (got.documents if isinstance(got, Several) else [got])]


@pytest.mark.parametrize("method", ["noise", "paraphrase", "synthetic"])
def test_the_group_reaches_its_share(method: str, documents: list[Document], corpus: Callable[..., Any]) -> None:
    outcomes, resolution = corpus(step(method), documents)
    kept = left(outcomes)
    counts = Counter(document.meta["label"] for document in kept)
    assert counts["often"] == 270 and counts["rare"] == 90
    assert resolution.facts["share"] == 0.25 and resolution.facts["share_before"] == 0.1
    derived = [document for document in kept if "parent" in document.meta]
    assert len(derived) == 60 and len({document.id for document in kept}) == len(kept)
    originals = {document.id: document for document in documents}
    for one in derived:
        assert one.meta["method"] == method and one.meta["label"] == "rare"
        if method == "synthetic":
            assert one.meta["parent"] in ("template:1", "template:2")
            assert one.text.endswith("is late") == (one.meta["parent"] == "template:1")
        else:
            parent = originals[one.meta["parent"]]
            assert parent.meta["label"] == "rare" and parent.text != one.text
            assert (one.source, one.unit, one.split) == (parent.source, parent.unit, parent.split), "in the same split"
    assert corpus(step(method), documents, 7, 4)[0] == outcomes, "whatever the shards"


def test_twins_of_evaluation_items_are_refused(
    tmp_path: Path, documents: list[Document], corpus: Callable[..., Any]
) -> None:
    rare = [document for document in documents if document.meta["label"] == "rare"]
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in rare[:5]))
    outcomes, resolution = corpus(step(evaluation=[held], most=20), documents)
    parents = {document.meta["parent"] for document in left(outcomes) if "parent" in document.meta}
    assert not parents & {document.id for document in rare[:5]}
    assert resolution.facts["refused"] == 5 and resolution.facts["share"] == 0.25, "the others make up for them"
    free = {d.meta["parent"] for d in left(corpus(step(), documents)[0]) if "parent" in d.meta}
    assert free & {document.id for document in rare[:5]}, "without the input they have twins"


def test_a_derived_text_that_is_an_evaluation_item_is_refused(
    tmp_path: Path, documents: list[Document], corpus: Callable[..., Any]
) -> None:
    held = tmp_path / "held.txt"
    item = "the train to the old harbour is late once more today"
    held.write_text(item)
    params = {"templates": [item, item.replace("late", "{when}")], "slots": {"when": ["early", "full", "slow"]}}
    with pytest.raises(pydantic.ValidationError, match="slots must name"):
        step("synthetic", templates=["{a}"], slots={})
    outcomes = corpus(step("synthetic", share=0.15, evaluation=[held], **params), documents)[0]
    texts = [document.text for document in left(outcomes) if "parent" in document.meta]
    assert texts and item not in texts
    free = [d.text for d in left(corpus(step("synthetic", share=0.15, **params), documents)[0]) if "parent" in d.meta]
    assert item in free, "without the input it is made"
    found = corpus(step("synthetic", share=0.15, evaluation=[held], templates=[item], slots={}), documents)[0]
    counts: Counter[str] = Counter()
    for outcome in found:
        counts.update(outcome.found if isinstance(outcome, Several) else {})
    assert set(counts) == {"refused: twin of an evaluation item"}


def test_what_cannot_be_done_is_said(documents: list[Document], corpus: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="no document is in the group `rare`"):
        corpus(step(), [document for document in documents if document.meta["label"] != "rare"])
    with pytest.raises(InputError, match="needs 240 texts from 30 documents of `rare`, 4 from each"):
        corpus(step(share=0.5, most=4), documents)
    with pytest.raises(UsageError, match="needs two models"):
        step("back-translation")
    unfit = step("paraphrase", rules=[{"pattern": "nowhere", "replace": ["x"]}], share=0.2)
    with pytest.raises(InputError, match="from 0 documents"):
        corpus(unfit, documents)
    assert corpus(step(share=0.1), documents)[0] == documents, "it has its share already"
    for wrong in (
        {"method": "paraphrase"},
        {"method": "noise", "rules": RULES},
        {"method": "synthetic"},
        {"method": "paraphrase", "rules": [{"pattern": "(", "replace": ["x"]}]},
        {"method": "paraphrase", "rules": [{"pattern": "a", "replace": ["\\1"]}]},
        {"method": "paraphrase", "rules": RULES, "rate": 0.5},
    ):
        with pytest.raises(pydantic.ValidationError):
            AugmentParams(name="augment", group="g", share=0.5, **wrong)


def test_noise_touches_the_share_of_words() -> None:
    text = " ".join(f"word{n}" for n in range(2000))
    for rate in (0.05, 0.3):
        changed = noise.noisy(text, ["swap", "keyboard"], rate, random.Random(1)).split()
        share = sum(one != other for one, other in zip(changed, text.split(), strict=True)) / 2000
        assert share == pytest.approx(rate, abs=0.03)
    dropped = noise.noisy(text, ["dropout"], 0.3, random.Random(1)).split()
    assert len(dropped) / 2000 == pytest.approx(0.7, abs=0.03) and set(dropped) <= set(text.split())
    assert noise.noisy("?!", ["swap"], 0.5, random.Random(1)) == "?!"
    assert noise.noisy("word", ["dropout"], 1.0, random.Random(1)) == "word"


def test_each_kind_of_noise() -> None:
    rng = random.Random(3)
    for _ in range(50):
        swapped = noise.swap("house", rng)
        assert swapped != "house" and sorted(swapped) == sorted("house")
        near = noise.keyboard("Gate", rng)
        (place,) = [n for n in range(4) if near[n] != "Gate"[n]]
        assert near[place].lower() in noise.NEIGHBOURS["Gate"[place].lower()] and near[0].isupper()
        assert len(noise.delete("house", rng)) == 4
        alike = noise.ocr("modern", rng)
        assert alike != "modern"
    assert set(noise.NEIGHBOURS["g"]) == set("tyfhvb")
    assert noise.swap("aa", rng) == "aa" and noise.keyboard("日本", rng) == "日本" and noise.delete("a", rng) == "a"


@pytest.mark.parametrize("template", ["{} is late", "{0} is late", "{who.name} is late", "{who!r}", "{who:>9}", "{who"])
def test_braces_that_name_no_slot_are_refused(template: str) -> None:
    for slots in ({"who": ["Ann"]}, {"0": ["Ann"]}, {"who.name": ["Ann"]}):
        with pytest.raises(pydantic.ValidationError, match="templates: "):
            AugmentParams(name="augment", group="g", share=0.5, method="synthetic", templates=[template], slots=slots)
    fine = {"templates": ["{{}} {who}"], "slots": {"who": ["Ann"]}}
    assert AugmentParams(name="augment", group="g", share=0.5, method="synthetic", **fine)


def test_the_guard_looks_as_it_is_told_to(
    tmp_path: Path, documents: list[Document], corpus: Callable[..., Any]
) -> None:
    """Items in a column of another name, of fewer words than the default; those too short are counted."""
    held = [one.text for one in documents if one.meta["label"] == "rare"]
    rows = [{"sentence": " ".join(held[0].split()[:6])}, {"sentence": "too short"}, {"sentence": held[1]}]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="no evaluation item"):
        step(evaluation=[tmp_path / "quiz.jsonl"])
    told = {"fields": ["sentence"], "ngram": 6, "min_words": 4}
    _, resolution = corpus(step(evaluation=[tmp_path / "quiz.jsonl"], share=0.15, **told), documents)
    assert (resolution.facts["refused"], resolution.facts["items"], resolution.facts["items_too_short"]) == (2, 2, 1)
    with pytest.raises(UsageError, match="fields, ngram, min_words says how"):
        step(**told)
