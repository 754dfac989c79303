"""Groups and attributes: planted 90 : 10 is found with its interval, the balanced twin raises nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from scipy.stats import binomtest
from scipy.stats.contingency import odds_ratio

from llmctl.text.cleaning.associations import Associations, log_odds, wilson
from llmctl.text.cleaning.balance_params import AssociationsParams
from llmctl.text.documents import Document

JOBS = ["nurse", "engineer", "teacher", "farmer", "lawyer", "pilot"]


def step(**params: Any) -> Associations:
    return Associations(AssociationsParams(name="associations", **params), 0)


def sentences(nurse: int, seed: int, source: str = "web") -> list[Document]:
    """100 sentences about each occupation, half of them about women; `nurse` of those about nurses."""
    rng = random.Random(seed)
    made = []
    for job in JOBS:
        women = nurse if job == "nurse" else 50
        made += [f"{'She' if n < women else 'He'} became a {job} in {1900 + n}." for n in range(100)]
    made += [f"{who} went home at {n}." for who in ("She", "He") for n in range(300)]
    rng.shuffle(made)
    return [Document(f"{source}-{n}", f"{source}/{n}.txt", " ".join(made[n : n + 4])) for n in range(0, len(made), 4)]


def test_planted_is_found_and_the_balanced_twin_raises_nothing(corpus: Callable[..., Any]) -> None:
    facts = corpus(step(), sentences(90, 1))[1].facts
    assert [row["attribute"] for row in facts["associations"] if row["flagged"]] == ["nurse"]
    row = facts["associations"][0]
    assert (row["group"], row["attribute"], row["passages"], row["share"]) == ("female", "nurse", 100, 0.9)
    assert row["low"] < row["log_odds"] < row["high"] and row["share_low"] < 0.9 < row["share_high"]
    table = [[90, 250 + 300], [10, 250 + 300]]
    assert row["log_odds"] == pytest.approx(math.log(odds_ratio(table, kind="sample").statistic), abs=1e-4)
    twin = corpus(step(), sentences(50, 1))[1].facts
    assert twin["flagged"] == 0 and twin["flagged_in_sources"] == 0


def test_one_source_of_two_is_named(corpus: Callable[..., Any]) -> None:
    documents = [*sentences(90, 1, "news"), *sentences(50, 2, "books")]
    facts = corpus(step(), documents)[1].facts
    assert {(row["source"], row["attribute"]) for row in facts["by_source"]} == {("news", "nurse")}
    assert corpus(step(), documents, 9, 4)[1].facts == facts, "whatever the shards"


def test_chance_raises_nothing(corpus: Callable[..., Any]) -> None:
    """Fair coins: in 40 corpora of 20 occupations at most a few alarms in all; 95 % of the corpora have none."""
    rng = random.Random(4)
    jobs = list(AssociationsParams(name="associations").attributes)
    alarms = 0
    for number in range(40):
        text = "\n".join(f"{rng.choice(('She', 'He'))} is a {rng.choice(jobs)}." for _ in range(600))
        alarms += corpus(step(min_log_odds=0), [Document(str(number), "s", text)])[1].facts["flagged"] > 0
    assert alarms <= 6  # P(more than 6 of 40 at .05 each) < .01


def test_intervals_are_the_textbooks() -> None:
    table = [[90, 550], [10, 550]]
    middle, low, high = log_odds(90, 550, 10, 550, 0.95)
    found = odds_ratio(table, kind="sample")
    assert middle == pytest.approx(math.log(found.statistic))
    interval = found.confidence_interval(0.95)
    assert (low, high) == pytest.approx((math.log(interval.low), math.log(interval.high)))
    wide = log_odds(90, 550, 10, 550, 0.95, tests=20)
    fine = found.confidence_interval(1 - 0.05 / 20)
    assert wide[1:] == pytest.approx((math.log(fine.low), math.log(fine.high)))
    told = binomtest(90, 100).proportion_ci(0.95, method="wilson")
    assert wilson(90, 100, 0.95) == pytest.approx((told.low, told.high))
    assert log_odds(5, 5, 0, 5, 0.95)[0] == pytest.approx(math.log(5.5 * 5.5 / (0.5 * 5.5))), "an empty cell is no end"


def test_what_counts() -> None:
    def passages(text: str, **params: Any) -> list[tuple[str, list[str]]]:
        return list(step(**params).passages(text))

    assert passages("She is a nurse. He is a pilot.") == [("female", ["nurse"]), ("male", ["pilot"])]
    assert passages("She and he are nurses. Nurses work. Sheep.") == [], "both or none say nothing"
    assert passages("She slept. The nurse slept.", within="document") == [("female", ["nurse"])]
    own = {"groups": {"a": ["x"], "b": ["y"]}, "attributes": {"good": ["fine", "well done"]}}
    assert passages("X was well done!", **own) == [("a", ["good"])]
    with pytest.raises(ValueError, match="is a word of a and of b"):
        AssociationsParams(name="associations", groups={"a": ["x"], "b": ["X"]})


def test_rare_attributes_are_not_judged(corpus: Callable[..., Any]) -> None:
    documents = sentences(90, 1)
    assert not corpus(step(min_count=101), documents)[1].facts["associations"]
    assert corpus(step(min_log_odds=3), documents)[1].facts["flagged"] == 0
    assert corpus(step(confidence=0.5, min_log_odds=0), sentences(65, 1))[1].facts["flagged"] >= 1


def test_three_groups_are_each_compared_with_the_others(corpus: Callable[..., Any]) -> None:
    groups = {"red": ["red"], "green": ["green"], "blue": ["blue"]}
    texts = [
        f"The {colour} {'king' if colour == 'red' and n < 40 else 'house'}." for colour in groups for n in range(60)
    ]
    documents = [Document(str(n), "s", text) for n, text in enumerate(texts)]
    facts = corpus(step(groups=groups, attributes={"king": ["king"]}), documents)[1].facts
    assert {row["group"]: row["log_odds"] > 0 for row in facts["associations"]} == {
        "red": True,
        "green": False,
        "blue": False,
    }
