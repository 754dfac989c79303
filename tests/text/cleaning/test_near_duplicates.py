"""Near duplicates against brute force over the real sets of shingles."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from llmctl.text.cleaning.duplicates import ExactDuplicates
from llmctl.text.cleaning.near_duplicates import NearDuplicates
from llmctl.text.cleaning.params import ExactDuplicatesParams, NearDuplicatesParams
from llmctl.text.cleaning.step import Drop
from llmctl.text.documents import Document


def step(**params: object) -> NearDuplicates:
    return NearDuplicates(NearDuplicatesParams(name="near-duplicates", **params), 0)


def jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)


def twin(words: list[str], similarity: float, rng: random.Random) -> list[str]:
    """Words with single ones changed, spread evenly, until shingles of five have about that Jaccard similarity."""
    shared = 2 * similarity / (1 + similarity)
    changes = max(1, round((1 - shared) * len(words) / 5))
    changed = list(words)
    for number in range(changes):
        changed[int((number + 0.5) * len(words) / changes)] = f"new{rng.randrange(10**9)}"
    return changed


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """100 texts of 300 words, each with a twin; the similarities are .3 to .97."""
    rng = random.Random(3)
    found = []
    for number in range(200):
        words = [f"w{rng.randrange(20_000)}" for _ in range(300)]
        similarity = (0.3, 0.5, 0.93, 0.97)[number % 4]
        found += [" ".join(words), " ".join(twin(words, similarity, rng))]
    return [Document(str(number), "s", text) for number, text in enumerate(found)]


def test_recall_and_false_positives_against_brute_force(documents: list[Document], corpus: Callable[..., Any]) -> None:
    dedup = step()
    sets = [set(dedup.shingles(document.text).tolist()) for document in documents]
    pairs = [(n, n + 1, jaccard(sets[n], sets[n + 1])) for n in range(0, len(sets), 2)]
    outcomes, resolution = corpus(dedup, documents)
    gone = [isinstance(outcome, Drop) for outcome in outcomes]
    near = [gone[later] for _, later, similarity in pairs if similarity >= 0.9]
    far = [gone[later] for _, later, similarity in pairs if similarity <= 0.4]
    assert len(near) > 60 and len(far) > 30
    assert sum(near) / len(near) >= 0.95
    assert sum(far) / len(far) <= 0.01
    assert not any(gone[0::2]), "the first of a pair stays"
    assert resolution.facts["cluster_sizes"] == [[2, sum(gone)]]


def test_unrelated_texts_share_no_cluster(documents: list[Document]) -> None:
    dedup = step()
    sets = [set(dedup.shingles(document.text).tolist()) for document in documents[0:60:2]]
    assert all(jaccard(one, other) < 0.1 for one, other in combinations(sets, 2))


def test_the_estimate_is_the_similarity(documents: list[Document]) -> None:
    """Mean error of 128 hash functions: at most .05; with one function it is far off."""
    errors = {}
    for functions in (16, 256):
        dedup = step(num_perm=functions, bands=8)
        found = []
        for n in range(0, 120, 2):
            shingles = [dedup.shingles(documents[n + k].text) for k in (0, 1)]
            rows = [dedup.minima(one).astype(np.uint8) for one in shingles]
            truth = jaccard(*(set(one.tolist()) for one in shingles))
            found.append(abs(float(dedup.similarity(rows[0], rows[1][None])[0]) - truth))
        errors[functions] = float(np.mean(found))
    assert errors[256] < 0.03 < errors[16]


@pytest.mark.parametrize(("tasks", "ranges"), [(3, 1), (7, 4), (50, 16)])
def test_survivors_do_not_depend_on_the_shards(
    tasks: int, ranges: int, documents: list[Document], corpus: Callable[..., Any]
) -> None:
    def left(*cut: int) -> list[bool]:
        return [isinstance(outcome, Drop) for outcome in corpus(step(), documents, *cut)[0]]

    assert left(tasks, ranges) == left(1, 1)


def test_chains_are_one_cluster_and_the_first_stays(corpus: Callable[..., Any]) -> None:
    rng = random.Random(5)
    words = [f"w{rng.randrange(9999)}" for _ in range(400)]
    chain = [words]
    for number in range(6):  # each time other words are changed
        chain.append(list(chain[-1]))
        for place in range(20 * number, 400, 130):
            chain[-1][place + 3 * number] = f"new{number}-{place}"
    documents = [Document(str(number), "s", " ".join(one)) for number, one in enumerate(chain)]
    dedup = step()
    ends = [set(dedup.shingles(documents[place].text).tolist()) for place in (0, -1)]
    assert jaccard(*ends) < 0.75, "the ends alone would be no duplicates"
    outcomes, resolution = corpus(dedup, documents)
    assert [isinstance(outcome, Drop) for outcome in outcomes] == [False] + [True] * 6
    assert resolution.facts == {"clusters": 1, "duplicates": 6, "cluster_sizes": [[7, 1]]}


def test_parameters(corpus: Callable[..., Any]) -> None:
    rng = random.Random(6)
    words = [f"w{rng.randrange(9999)}" for _ in range(400)]
    pair = [Document(str(n), "s", " ".join(one)) for n, one in enumerate((words, twin(words, 0.7, rng)))]

    def dropped(**params: object) -> int:
        return sum(isinstance(outcome, Drop) for outcome in corpus(step(**params), pair)[0])

    assert dropped() == 0
    assert dropped(threshold=0.5, bands=32) == 1
    assert dropped(threshold=0.5, bands=1) == 0, "one band of all: only equal signatures meet"
    assert dropped(ngram=1, threshold=0.85) == 1, "single words are alike more often"
    named = [replace(one, id=f"page-{one.id}") for one in pair]
    other = Document("far", "s", "nothing of the kind stands here at all")
    outcomes, resolution = corpus(step(action="tag", threshold=0.5, bands=32), [*named, other], tasks=3)
    assert [one.meta.get("duplicate_of") for one in outcomes] == ["page-0", "page-0", None]
    assert [one.text for one in outcomes[:2]] == [one.text for one in pair]
    assert resolution.facts["duplicates"] == 1
    case = [Document("0", "s", "A short text, it says!"), Document("1", "s", "a short text it says")]
    assert [isinstance(outcome, Drop) for outcome in corpus(step(), case)[0]] == [False, True]
    table = [Document(str(n), "s", "1,2,3", meta={"kind": "table"}) for n in range(2)]
    assert corpus(step(), table)[0] == table


def test_exact_duplicates(corpus: Callable[..., Any]) -> None:
    texts = ["One text.", "Another", "One text.", "one  TEXT."]
    documents = [Document(str(number), "s", text) for number, text in enumerate(texts)]
    for normalise, gone in ((False, [2]), (True, [2, 3])):
        params = ExactDuplicatesParams(name="exact-duplicates", normalise=normalise)
        for cut in ((1, 1), (3, 2)):
            outcomes, _ = corpus(ExactDuplicates(params, 0), documents, *cut)
            assert [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Drop)] == gone
