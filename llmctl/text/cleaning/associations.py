"""The step `associations`: which words for groups of people go with which attributes, as log-odds with intervals."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from statistics import NormalDist
from typing import Any

from llmctl.text.cleaning.balance_params import AssociationsParams
from llmctl.text.cleaning.groups import group_of
from llmctl.text.cleaning.step import Finding, Outcome, Resolution, Signature, Signatures
from llmctl.text.documents import Document

SENTENCES = re.compile(r"(?<=[.!?。！？؟।])\s*|\n+")
NONE = ""
"""Stands for a passage, whatever attributes it has."""
LISTED = 100
"""Rows of the report for single sources; the counts are of all."""


class Associations:
    """Counts passages by group and attribute; the report compares them, over all and source by source."""

    name = "associations"

    def __init__(self, params: AssociationsParams, seed: int) -> None:
        self._params = params
        self._groups = {name: _pattern(words) for name, words in params.groups.items()}
        self._attributes = {name: _pattern(words) for name, words in params.attributes.items()}

    def passages(self, text: str) -> Iterator[tuple[str, list[str]]]:
        """(group, attributes) of every passage that names just one group: of two, the passage says nothing."""
        parts = SENTENCES.split(text) if self._params.within == "sentence" else [text]
        for part in parts:
            named = [name for name, pattern in self._groups.items() if pattern.search(part)]
            if len(named) == 1:
                yield named[0], [name for name, pattern in self._attributes.items() if pattern.search(part)]

    def signatures(self, document: Document) -> Iterable[Signature]:
        """Counts of the document: (source, group, attribute) → passages."""
        counts: dict[tuple[str, str, str], int] = {}
        source = group_of(document, "source")
        for group, attributes in self.passages(document.text):
            for attribute in (NONE, *attributes):
                counts[source, group, attribute] = counts.get((source, group, attribute), 0) + 1
        for what, count in counts.items():
            digest = hashlib.blake2b(json.dumps(what).encode(), digest_size=8).digest()
            yield int.from_bytes(digest, "big"), json.dumps([*what, count]).encode()

    def match(self, signatures: Signatures) -> Iterable[Finding]:
        """(source, group, attribute, passages) of the range."""
        held: dict[tuple[str, str, str], int] = {}
        for payload in signatures.payloads:
            *what, count = json.loads(payload)
            held[tuple(what)] = held.get(tuple(what), 0) + count
        for (source, group, attribute), count in sorted(held.items()):
            yield source, group, attribute, count

    def resolve(self, findings: Iterator[Finding]) -> Resolution:
        """Facts for the audit alone."""
        counts: dict[tuple[str, str], int] = {}
        by_source: dict[str, dict[tuple[str, str], int]] = {}
        for source, group, attribute, count in findings:
            for held in (counts, by_source.setdefault(source, {})):
                held[group, attribute] = held.get((group, attribute), 0) + count
        rows = self._rows(counts)
        found = [{"source": source, **row} for source in sorted(by_source) for row in self._rows(by_source[source])]
        return Resolution(
            facts={
                "within": self._params.within,
                "passages": {group: counts.get((group, NONE), 0) for group in self._groups},
                "associations": rows,
                "flagged": sum(row["flagged"] for row in rows),
                "flagged_in_sources": sum(row["flagged"] for row in found),
                "by_source": [row for row in found if row["flagged"]][:LISTED],
            }
        )

    def _rows(self, counts: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
        totals = {group: counts.get((group, NONE), 0) for group in self._groups}
        params = self._params
        judged = [
            name
            for name in self._attributes
            if sum(counts.get((group, name), 0) for group in totals) >= params.min_count
        ]
        tests = len(judged) * (len(totals) if len(totals) > 2 else 1)  # of two groups one says all about the other
        rows = []
        for attribute in judged:
            held = {group: counts.get((group, attribute), 0) for group in totals}
            for group in totals if len(totals) > 2 else list(totals)[:1]:
                here, others = held[group], sum(held.values()) - held[group]
                rest = totals[group] - here, sum(totals.values()) - totals[group] - others
                middle, low, high = log_odds(here, rest[0], others, rest[1], params.confidence, tests)
                share_low, share_high = wilson(here, here + others, params.confidence, tests)
                rows.append(
                    {
                        "group": group,
                        "attribute": attribute,
                        "passages": here + others,
                        "share": round(here / (here + others), 4),
                        "share_low": round(share_low, 4),
                        "share_high": round(share_high, 4),
                        "log_odds": round(middle, 4),
                        "low": round(low, 4),
                        "high": round(high, 4),
                        "flagged": bool((low > 0 or high < 0) and abs(middle) >= params.min_log_odds),
                    }
                )
        return sorted(rows, key=lambda row: (-abs(row["log_odds"]), row["attribute"], row["group"]))

    def filter(self, document: Document, verdict: Any, shared: Any) -> Outcome:
        """The document as it is."""
        return document


def _pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Any of the words, whole, whatever their case."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})(?!\w)", re.I)


def log_odds(a: float, b: float, c: float, d: float, confidence: float, tests: int = 1) -> tuple[float, float, float]:
    """(log-odds ratio in nats, low, high) of the table [[a, b], [c, d]] (Woolf 1955).

    Half a count is added to every cell where one is empty (Haldane, Anscombe); the interval holds for `tests` of its
    kind together (Bonferroni).
    """
    if min(a, b, c, d) <= 0:
        a, b, c, d = (value + 0.5 for value in (a, b, c, d))
    middle = math.log(a * d / (b * c))
    half = quantile(confidence, tests) * math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    return middle, middle - half, middle + half


def wilson(hits: int, number: int, confidence: float, tests: int = 1) -> tuple[float, float]:
    """Wilson's interval of a share (1927)."""
    z = quantile(confidence, tests)
    share, scale = hits / number, 1 + z * z / number
    middle = (share + z * z / (2 * number)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, middle - half), min(1.0, middle + half)


def quantile(confidence: float, tests: int = 1) -> float:
    """The normal quantile of a two-sided interval that holds for all `tests`."""
    return NormalDist().inv_cdf(1 - (1 - confidence) / (2 * max(1, tests)))
