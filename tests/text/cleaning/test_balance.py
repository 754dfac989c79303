"""Shares of groups: realised within 1 %, the same whatever the shards; natural proportions miss them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pydantic
import pytest
from scipy.stats import entropy

from llmctl.errors import InputError
from llmctl.text.cleaning.balance import Balance, Select
from llmctl.text.cleaning.balance_params import BalanceParams, SelectParams
from llmctl.text.cleaning.groups import group_of, spread
from llmctl.text.cleaning.step import Drop
from llmctl.text.documents import Document

NATURAL = {"en": 1500, "de": 400, "sw": 100}


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """2,000 texts in three languages, of 5 to 60 words."""
    rng = random.Random(2)
    found = []
    for language, count in NATURAL.items():
        for number in range(count):
            text = " ".join(f"w{rng.randrange(999)}" for _ in range(rng.randrange(5, 60)))
            found.append(Document(f"{language}{number}", f"{language}/a.txt", text, meta={"language": language}))
    rng.shuffle(found)
    return found


def step(**params: Any) -> Balance:
    return Balance(BalanceParams(name="balance", by="language", **params), 0)


def left(outcomes: Sequence[Any]) -> list[Document]:
    kept: list[Document] = []
    for outcome in outcomes:
        if not isinstance(outcome, Drop):
            kept += outcome if isinstance(outcome, list) else [outcome]
    return kept


def shares(documents: Sequence[Document], unit: str = "bytes") -> dict[str, float]:
    counts: Counter[str] = Counter()
    for document in documents:
        counts[document.meta["language"]] += len(document.text) if unit == "bytes" else 1
    return {name: count / counts.total() for name, count in counts.items()}


@pytest.mark.parametrize("unit", ["bytes", "documents"])
@pytest.mark.parametrize("size", ["same", "down", "up"])
def test_the_mix_is_within_one_percent_of_the_weights(
    unit: str, size: str, documents: list[Document], corpus: Callable[..., Any]
) -> None:
    weights = {"en": 5, "de": 3, "sw": 2}
    outcomes, resolution = corpus(step(weights=weights, unit=unit, size=size, max_epochs=10), documents)
    kept = left(outcomes)
    found = shares(kept, unit)
    for name, weight in weights.items():
        assert abs(found[name] - weight / 10) < 0.01
        assert abs(shares(documents, unit)[name] - weight / 10) > 0.05, "natural proportions miss the weights"
    for row in resolution.facts["groups"]:
        assert row["share"] == pytest.approx(found[row["group"]], abs=1e-5), "the audit tells what was realised"
    ids = Counter(document.id.split("~")[0] for document in kept)
    if size == "down":
        assert max(ids.values()) == 1
    if size == "up":
        assert len(ids) == len(documents), "none is left out"
    if size == "same":
        volume = sum(len(d.text) for d in kept) if unit == "bytes" else len(kept)
        whole = sum(len(d.text) for d in documents) if unit == "bytes" else len(documents)
        assert volume == pytest.approx(whole, rel=0.01)
    assert len({document.id for document in kept}) == len(kept)


def test_epochs_are_limited_and_the_mix_holds(documents: list[Document], corpus: Callable[..., Any]) -> None:
    outcomes, resolution = corpus(step(weights={"en": 1, "de": 1, "sw": 1}, max_epochs=2), documents)
    assert all(abs(share - 1 / 3) < 0.01 for share in shares(left(outcomes)).values())
    epochs = {row["group"]: row["epochs"] for row in resolution.facts["groups"]}
    assert max(epochs.values()) == epochs["sw"] == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7])
def test_alpha_realises_the_power_of_natural_shares(
    alpha: float, documents: list[Document], corpus: Callable[..., Any]
) -> None:
    """q = p^alpha / sum p^alpha, as multilingual models draw their languages (1901.07291, 1911.02116)."""
    natural = shares(documents)
    powers = {name: share**alpha for name, share in natural.items()}
    found = shares(left(corpus(step(alpha=alpha, max_epochs=30), documents)[0]))
    for name, power in powers.items():
        assert abs(found[name] - power / sum(powers.values())) < 0.01
    unchanged = corpus(step(alpha=1), documents)[0]
    assert unchanged == documents


@pytest.mark.parametrize(("tasks", "ranges"), [(3, 1), (7, 4), (50, 16)])
def test_the_choice_does_not_depend_on_the_shards(
    tasks: int, ranges: int, documents: list[Document], corpus: Callable[..., Any]
) -> None:
    weights = {"en": 1, "de": 1, "sw": 1}
    assert corpus(step(weights=weights), documents, tasks, ranges)[0] == corpus(step(weights=weights), documents)[0]
    other = Balance(BalanceParams(name="balance", by="language", weights=weights), 1)
    assert corpus(other, documents)[0] != corpus(step(weights=weights), documents)[0], "but on the seed"


def test_weights_that_do_not_fit_are_named(documents: list[Document], corpus: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="does not name the group `de`"):
        corpus(step(weights={"en": 1, "sw": 1}), documents)
    with pytest.raises(InputError, match="no document is in the group `fr`"):
        corpus(step(weights={"en": 1, "fr": 1}, others=1), documents)
    found = shares(left(corpus(step(weights={"en": 0, "sw": 2}, others=2, max_epochs=9), documents)[0]))
    assert "en" not in found and abs(found["de"] - 0.5) < 0.01
    for wrong in ({"weights": {"a": -1}}, {"weights": {"a": 0}}, {"weights": {"a": 1}, "alpha": 0.5}, {"others": 1}):
        with pytest.raises(pydantic.ValidationError):
            BalanceParams(name="balance", **wrong)


def test_copies_name_what_they_repeat(corpus: Callable[..., Any]) -> None:
    found = [
        Document(f"{name}{n}", "s", "x", meta={"language": name}) for name, k in (("a", 2), ("b", 6)) for n in range(k)
    ]
    kept = left(corpus(step(unit="documents", size="up", weights={"a": 1, "b": 1}), found)[0])
    copies = [document for document in kept if "~" in document.id]
    assert len(copies) == 4
    assert all(d.meta == {"language": "a", "parent": d.id.split("~")[0], "method": "copy"} for d in copies)


def test_groups_by_anything(documents: list[Document]) -> None:
    document = Document("1", "web/x.html", "t", meta={"label": 3, "genre": "news"})
    assert [group_of(document, by) for by in ("source", "class", "genre", "language")] == [
        "web",
        "3",
        "news",
        "unknown",
    ]
    assert group_of(Document("1", "f", "t", meta={"corpus": "books", "code": "python"}), "source") == "books"
    assert group_of(Document("1", "f", "t", meta={"code": "python"}), "language") == "code: python"
    keep, drop = (Select(SelectParams(name="select", by="language", **{w: ["sw"]}), 0) for w in ("keep", "drop"))
    for one in documents[:50]:
        assert isinstance(keep(one), Drop) != isinstance(drop(one), Drop) == (one.meta["language"] == "sw")


def test_spread_is_the_entropy() -> None:
    counts = [700, 200, 90, 10]
    told = spread(counts)
    assert told["entropy"] == pytest.approx(float(entropy(counts, base=2)), abs=1e-4)
    assert told["effective"] == pytest.approx(float(np.exp(entropy(counts))), abs=1e-3)
    assert (told["groups"], told["largest"], told["ratio"]) == (4, 0.7, 70)
    assert spread([5, 5, 5, 5])["effective"] == 4 and spread([])["groups"] == 0


def test_size_up_keeps_every_document_or_is_refused(corpus: Callable[..., Any]) -> None:
    """Nine to one, wanted alike: nine passes over the small group."""
    found = [Document(str(n), "s", "text", meta={"language": "a" if n % 10 else "b"}) for n in range(200)]
    asked = {"unit": "documents", "size": "up", "weights": {"a": 1, "b": 1}}
    with pytest.raises(InputError, match=r"takes 9\.0 passes over the smallest group; max_epochs allows 4") as caught:
        corpus(step(**asked), found)
    assert caught.value.hint == "set max_epochs: 9, or size: same"
    kept = left(corpus(step(**asked, max_epochs=9), found)[0])
    assert {one.id for one in found} == {one.id for one in kept if "~" not in one.id}
