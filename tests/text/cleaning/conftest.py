from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from llmctl.text.cleaning.step import TASK_SHIFT, CorpusStep, Drop, Noted, Resolution, Signatures
from llmctl.text.documents import Document


def doc(text: str, identity: str = "d", source: str = "s", **meta: Any) -> Document:
    return Document(identity, source, text, meta=meta)


def text_after(outcome: Any) -> str | None:
    """The text an outcome leaves, None for a drop."""
    if isinstance(outcome, Drop):
        return None
    return outcome.document.text if isinstance(outcome, Noted) else outcome.text


def run_corpus(
    step: CorpusStep, documents: Sequence[Document], tasks: int = 1, ranges: int = 1
) -> tuple[list[Any], Resolution]:
    """(outcome of every document, resolution), with the documents cut into tasks and the keys into ranges."""
    size = -(-len(documents) // tasks)
    refs = [(place // size) << TASK_SHIFT | place % size for place in range(len(documents))]
    signed = [
        (key, ref, payload)
        for ref, document in zip(refs, documents, strict=True)
        for key, payload in step.signatures(document)
    ]
    signed.sort(key=lambda one: one[:2])
    findings: list[Any] = []
    for number in range(ranges):
        part = [one for one in signed if one[0] * ranges >> 64 == number]
        signatures = Signatures(
            np.array([one[0] for one in part], dtype=np.uint64),
            np.array([one[1] for one in part], dtype=np.uint64),
            [one[2] for one in part],
        )
        findings.extend(step.match(signatures))
    resolution = step.resolve(iter(findings))
    verdicts = dict(resolution.verdicts)
    outcomes = [
        step.filter(document, verdicts.get(ref), resolution.shared)
        for ref, document in zip(refs, documents, strict=True)
    ]
    return outcomes, resolution


@pytest.fixture
def corpus() -> Callable[..., tuple[list[Any], Resolution]]:
    return run_corpus
