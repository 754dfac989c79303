"""When two answers are the same: SQuAD's normalisation, or none."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
Normalise = Callable[[str], str]


def squad(text: str) -> str:
    """SQuAD's official normalisation: lower case, no ASCII punctuation, no articles, single spaces, in this order.

    Rajpurkar et al. 2016, `evaluate-v1.1.py`. Punctuation is deleted, not replaced by a space.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def strict(text: str) -> str:
    """The text without white space around it."""
    return text.strip()


NORMALISE: dict[str, Normalise] = {"squad": squad, "strict": strict}


def matches(answer: str, expected: Sequence[str], normalise: Normalise) -> bool:
    """Whether an answer equals one of the expected ones; containing one is not enough.

    An expected answer of which normalisation leaves nothing ("the", "+") is compared as it stands.
    """
    return any(
        normalise(answer) == normalise(one) if normalise(one) else answer.strip() == one.strip() for one in expected
    )
