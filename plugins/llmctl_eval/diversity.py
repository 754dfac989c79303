"""How alike texts are, as tokens: repetition within one, distinct n-grams and self-BLEU among several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Tokens = Sequence[int]


def ngrams(tokens: Tokens, n: int) -> Counter[tuple[int, ...]]:
    """The runs of `n` tokens, with how often each occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def repetition(tokens: Tokens, n: int = 4) -> float:
    """Share of a text's n-grams that stood there before (1908.04319); 0 for a text shorter than n."""
    counts = ngrams(tokens, n)
    return 1 - len(counts) / counts.total() if counts else 0.0


def distinct(texts: Sequence[Tokens], n: int) -> float:
    """Different n-grams of all texts over their number (1510.03055); 0 where there is none."""
    counts = Counter[tuple[int, ...]]()
    for tokens in texts:
        counts += ngrams(tokens, n)
    return len(counts) / counts.total() if counts else 0.0


def self_bleu(texts: Sequence[Tokens]) -> float:
    """Mean BLEU-4 of each text with the others as references (1802.01886): 1 where all are alike."""
    return sum(bleu(text, [*texts[:i], *texts[i + 1 :]]) for i, text in enumerate(texts)) / len(texts)


def bleu(text: Tokens, references: Sequence[Tokens], order: int = 4) -> float:
    """Sentence BLEU in [0, 1], as sacrebleu's `sentence_bleu`: orders that the text has, exponential smoothing."""
    if not text:
        return float(any(not reference for reference in references))
    logs, smooth, matched = [], 1.0, False
    for n in range(1, min(order, len(text)) + 1):
        counts, most = ngrams(text, n), Counter[tuple[int, ...]]()
        for reference in references:
            most |= ngrams(reference, n)
        right = (counts & most).total()
        matched = matched or right > 0
        if not right:
            smooth *= 2
        logs.append(math.log((right or 1 / smooth) / counts.total()))
    if not matched:
        return 0.0
    closest = min((abs(len(reference) - len(text)), len(reference)) for reference in references)[1]
    brevity = min(0.0, 1 - closest / len(text))
    return math.exp(brevity + sum(logs) / len(logs))
