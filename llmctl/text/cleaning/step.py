"""The two kinds of cleaning steps, as the stage `data` runs them over shards in parallel.

A *step* looks at one document at a time. A *corpus step* needs to know all of them: duplicates, balance. Its work is
cut into four phases that are files to files, so that any number of processes on any machines gives the same result:

1. `signatures(document)`, in the task that has the document;
2. `match(signatures)`: all signatures of the corpus, shuffled by their key, a range of keys at a time;
3. `resolve(findings)`: once, over what matching found;
4. `filter(document, verdict, shared)`, again in the task that has the document.

Neither may depend on the order of tasks, on time, or on chance other than `llmctl.text.cleaning.samples.rank`. A step
is made once in every process, by `catalogue.build`, and loads what it needs late. The runner keeps counts and samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llmctl.text.documents import Document

if TYPE_CHECKING:
    import numpy as np

TASK_SHIFT = 40
"""A reference is `task << TASK_SHIFT | number of the document in its task`: 2^23 tasks of 2^40 documents."""


@dataclass(frozen=True, slots=True)
class Drop:
    """The document goes. `reason` is a short constant that is counted; `detail` is shown beside the sample; `found` is
    added to the step's counts, as that of `Noted`."""

    reason: str
    detail: str = ""
    found: Mapping[str, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Noted:
    """The document stays, changed or not, and `found` is added to the step's counts in the audit: {email: 2}."""

    document: Document
    found: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Several:
    """These stand for the document, and `found` is added to the counts of the corpus step."""

    documents: Sequence[Document]
    found: Mapping[str, int]


Outcome = Document | Drop | Noted
"""A document with another text counts as edited, one with other `meta` as tagged; samples of edits are kept."""


@runtime_checkable
class Step(Protocol):
    """A step that looks at one document at a time."""

    name: str

    def __call__(self, document: Document) -> Outcome:
        """The document, changed or as it is, or why it goes."""
        ...


@runtime_checkable
class BatchStep(Step, Protocol):
    """A step that is faster over many at once; the runner then calls `batch` with up to 64 documents."""

    def batch(self, documents: Sequence[Document]) -> Sequence[Outcome]:
        """One outcome for every document, in order; the same as calling the step for each."""
        ...


Signature = tuple[int, bytes]
"""A key in [0, 2^64), and a payload that those of the same key are compared by (may be empty)."""
Finding = tuple[Any, ...]
"""What matching says to resolving: JSON values only (no bytes), for example (reference kept, reference dropped)."""


@dataclass(frozen=True)
class Signatures:
    """Signatures of a range of keys, sorted by (key, reference): `keys`, `refs` are uint64 arrays of one length."""

    keys: np.ndarray
    refs: np.ndarray
    payloads: Sequence[bytes]

    def groups(self) -> Iterator[tuple[int, list[int], Sequence[bytes]]]:
        """(key, references, payloads) of every key."""
        import numpy as np

        if not len(self.keys):
            return
        starts = np.flatnonzero(np.concatenate(([True], self.keys[1:] != self.keys[:-1]))).tolist()
        for start, end in zip(starts, [*starts[1:], len(self.keys)], strict=True):
            yield int(self.keys[start]), self.refs[start:end].tolist(), self.payloads[start:end]


@dataclass(frozen=True)
class Resolution:
    """What resolving decided: `verdicts`, (reference, JSON value) for the documents it says something about, in any
    order; `shared`, one JSON value that every task gets; `facts`, numbers and lists for the audit (clusters, weights).
    """

    verdicts: Iterable[tuple[int, Any]] = ()
    shared: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class CorpusStep(Protocol):
    """A step that needs to know the whole corpus."""

    name: str

    def signatures(self, document: Document) -> Iterable[Signature]:
        """What this document is compared by."""
        ...

    def match(self, signatures: Signatures) -> Iterable[Finding]:
        """What a range of keys says; a key is never cut in two."""
        ...

    def resolve(self, findings: Iterator[Finding]) -> Resolution:
        """The decision over the findings of all ranges, in order of their keys."""
        ...

    def filter(self, document: Document, verdict: Any, shared: Any) -> Outcome | Sequence[Document] | Several:
        """Apply it; `verdict` is None for a document without one. A sequence stands for the document: up-sampling.

        A step with `training_only = True` neither counts nor changes documents of other splits than `train`.
        """
        ...
