"""The step `augment`: texts derived from those of a small group, until it has its share. Each names its parent."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmctl.errors import InputError, UsageError
from llmctl.stage import Artifact
from llmctl.text.cleaning.balance_params import AugmentParams
from llmctl.text.cleaning.groups import BIN_SHIFT, Sizes, document_rank, group_of, sizes_of
from llmctl.text.cleaning.noise import noisy
from llmctl.text.cleaning.params import DecontaminateParams
from llmctl.text.cleaning.samples import rank
from llmctl.text.cleaning.step import Finding, Outcome, Resolution, Several, Signature, Signatures
from llmctl.text.documents import Document

USABLE, REFUSED, UNFIT, OTHER = b"usable", b"refused", b"unfit", b"other"
TRIES = 20
"""Draws until a text is another than those before it."""
KEPT = ("label", "language", "corpus", "code", "license")
"""What a text from a template has from the document whose place it takes."""


class Augment:
    """Adds derived documents to a group. What holds an evaluation item has no twins, and no twin may hold one."""

    name = "augment"
    training_only = True
    """What is measured on stays as it is."""

    def __init__(
        self, params: AugmentParams, seed: int, evaluation: Sequence[Path] = (), models: Sequence[Artifact] = ()
    ) -> None:
        self._params, self._seed = params, seed
        self._rules = [(re.compile(rule.pattern), rule.replace) for rule in params.rules]
        self._guard: Any = None
        if params.guard() and not evaluation:
            raise UsageError(
                f"augment: {', '.join(params.guard())} says how evaluation items are found, and none are bound",
                hint="bind the input `evaluation`, or leave it out",
            )
        if evaluation:
            from llmctl.text.cleaning.decontamination import Decontaminate

            self._guard = Decontaminate(DecontaminateParams(name="decontaminate", **params.guard()), seed, evaluation)
        self._translator: Any = None
        if params.method == "back-translation":
            if len(models) != 2:
                raise UsageError("back-translation needs two models", hint="bind the inputs `there` and `back`")
            from llmctl.text.cleaning.back_translation import BackTranslator

            self._translator = BackTranslator(*models)

    def signatures(self, document: Document) -> Iterable[Signature]:
        """The document's rank, and whether texts can be derived from it."""
        yield document_rank(document, self._seed, self.name), self._state(document)

    def _state(self, document: Document) -> bytes:
        if group_of(document, self._params.by) != self._params.group:
            return OTHER
        if self._params.method == "synthetic":
            return USABLE  # the document lends its place, not its text
        if self._guard is not None and self._guard.hits(document.text):
            return REFUSED
        if self._translator is None and self._draw(document, 0, 0) == document.text:
            return UNFIT
        return USABLE

    def match(self, signatures: Signatures) -> Iterable[Finding]:
        """(state, bin of ranks, documents, 0) of a range."""
        held: dict[tuple[str, int], int] = {}
        for key, payload in zip(signatures.keys.tolist(), signatures.payloads, strict=True):
            where = payload.decode(), key >> BIN_SHIFT
            held[where] = held.get(where, 0) + 1
        for (state, place), documents in sorted(held.items()):
            yield state, place, documents, 0

    def resolve(self, findings: Iterator[Finding]) -> Resolution:
        """Shared: [texts from every usable document, rank below which one more]. InputError where they do not do."""
        params = self._params
        sizes = sizes_of(findings)
        counts = {state: sizes.get(state.decode(), Sizes()) for state in (USABLE, REFUSED, UNFIT, OTHER)}
        whole = sum(one.documents for one in counts.values())
        if not whole:
            return Resolution(shared=[0, 0], facts={})
        own, usable = whole - counts[OTHER].documents, counts[USABLE]
        if not own:
            raise InputError(
                f"augment: no document is in the group `{params.group}` of {params.by}", hint="name one that there is"
            )
        needed = max(0, math.ceil((params.share * whole - own) / (1 - params.share) - 1e-9))
        if needed > params.most * usable.documents:
            raise InputError(
                f"augment: a share of {params.share:g} needs {needed:,} texts from {usable.documents:,} documents of "
                f"`{params.group}`, {params.most} from each are allowed",
                hint="lower share, raise most, or add documents",
            )
        each = needed / usable.documents if usable.documents else 0.0
        below, more, _ = usable.cut(each - int(each), "documents")
        made = int(each) * usable.documents + more
        facts = {
            "by": params.by,
            "group": params.group,
            "method": params.method,
            "documents": own,
            "refused": counts[REFUSED].documents,
            "unfit": counts[UNFIT].documents,
            "planned": made,
            "share_before": round(own / whole, 6),
            "share": round((own + made) / (whole + made), 6),
        }
        if self._guard is not None:
            facts |= {"items": self._guard.count, "items_too_short": self._guard.short}
        return Resolution(shared=[int(each), below], facts=facts)

    def filter(self, document: Document, verdict: Any, shared: Any) -> Outcome | Several:
        """The document, and after it what was derived from it."""
        if group_of(document, self._params.by) != self._params.group:
            return document
        number = shared[0] + (document_rank(document, self._seed, self.name) < shared[1])
        if not number or self._state(document) != USABLE:
            return document
        found: dict[str, int] = {}
        derived = list(self._derive(document, number, found))
        return Several([document, *derived], found)

    def _derive(self, document: Document, number: int, found: dict[str, int]) -> Iterator[Document]:
        seen = {document.text}
        for copy in range(1, number + 1):
            why = "no other text"
            for attempt in range(TRIES):
                text = self._draw(document, copy, attempt)
                if text in seen:
                    continue
                if self._guard is not None and self._guard.hits(text):
                    why = "refused: twin of an evaluation item"
                    continue
                seen.add(text)
                found["derived"] = found.get("derived", 0) + 1
                yield self._derived(document, text, copy, attempt)
                break
            else:
                found[why] = found.get(why, 0) + 1

    def _derived(self, document: Document, text: str, copy: int, attempt: int) -> Document:
        method = self._params.method
        meta = dict(document.meta)
        parent = document.id
        if method == "synthetic":
            meta = {name: meta[name] for name in (*KEPT, self._params.by) if name in meta}
            parent = f"template:{self._template(document, copy, attempt) + 1}"
        return replace(
            document, id=f"{document.id}~{method}-{copy}", text=text, meta={**meta, "parent": parent, "method": method}
        )

    def _rng(self, document: Document, copy: int, attempt: int) -> random.Random:
        return random.Random(rank(self._seed, self.name, document.source, document.id, copy, attempt))

    def _template(self, document: Document, copy: int, attempt: int) -> int:
        return self._rng(document, copy, attempt).randrange(len(self._params.templates))

    def _draw(self, document: Document, copy: int, attempt: int) -> str:
        """A text that depends on the document, the copy and the attempt alone."""
        params, rng = self._params, self._rng(document, copy, attempt)
        if params.method == "noise":
            return noisy(document.text, params.noise, params.rate, rng)
        if params.method == "paraphrase":
            text = document.text
            for pattern, alternatives in self._rules:
                text = _reword(text, pattern, alternatives, rng)
            return text
        if params.method == "synthetic":
            template = params.templates[rng.randrange(len(params.templates))]
            return template.format(**{name: rng.choice(values) for name, values in sorted(params.slots.items())})
        # The likeliest translation first, then draws.
        first = copy == 1 and attempt == 0
        translated: str = self._translator(document.text, None if first else rng.getrandbits(31))
        return translated


def _reword(text: str, pattern: re.Pattern[str], alternatives: Sequence[str], rng: random.Random) -> str:
    return pattern.sub(lambda match: match.expand(rng.choice(alternatives)), text)
