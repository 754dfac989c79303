"""The steps `balance` and `select`: groups of documents in the shares that are wanted, or some of them only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmctl.errors import InputError
from llmctl.text.cleaning.balance_params import BalanceParams, SelectParams
from llmctl.text.cleaning.groups import Sizes, count_bins, document_rank, group_of, sign, sizes_of, spread
from llmctl.text.cleaning.step import Drop, Finding, Outcome, Resolution, Signature, Signatures
from llmctl.text.documents import Document


class Balance:
    """Repeats the documents of small groups and leaves out some of large ones."""

    name = "balance"
    training_only = True
    """What is measured on stays as it is."""

    def __init__(self, params: BalanceParams, seed: int) -> None:
        self._params, self._seed = params, seed

    def signatures(self, document: Document) -> Iterable[Signature]:
        """The document's rank, group and size."""
        yield sign(document, self._params.by, self._seed, self.name)

    def match(self, signatures: Signatures) -> Iterable[Finding]:
        """Sizes of groups by bins of ranks."""
        return count_bins(signatures)

    def resolve(self, findings: Iterator[Finding]) -> Resolution:
        """Shared: group → [times every document is taken, rank below which once more]. InputError for a group that
        weights do not name, or name in vain."""
        params = self._params
        groups = sizes_of(findings)
        if not groups:
            return Resolution(shared={}, facts={})
        weights = wanted(groups, params)
        total = sum(weights.values())
        shares = {name: weight / total for name, weight in weights.items()}
        whole = volume({name: sizes.size(params.unit) for name, sizes in groups.items()}, shares, params)
        plans, rows = {}, []
        for name, sizes in groups.items():
            epochs = whole * shares[name] / sizes.size(params.unit)
            times = int(epochs + 1e-9)
            below, documents, size = sizes.cut(max(0.0, epochs - times), params.unit)
            plans[name] = [times, below]
            taken = Sizes(times * sizes.documents + documents, times * sizes.bytes + size)
            rows.append((name, sizes, shares[name], taken))
        return Resolution(shared=plans, facts=told(rows, params))

    def filter(self, document: Document, verdict: Any, shared: Any) -> Outcome | Sequence[Document]:
        """The document so many times; further ones have an id of their own, and say what they repeat."""
        times, below = shared[group_of(document, self._params.by)]
        times += document_rank(document, self._seed, self.name) < below
        if not times:
            return Drop("down-sampled", group_of(document, self._params.by))
        return document if times == 1 else [document, *(repeated(document, copy) for copy in range(1, times))]


def repeated(document: Document, copy: int) -> Document:
    """The document once more, in the same split."""
    return replace(
        document, id=f"{document.id}~copy-{copy}", meta={**document.meta, "parent": document.id, "method": "copy"}
    )


def wanted(groups: Mapping[str, Sizes], params: BalanceParams) -> dict[str, float]:
    """Group → weight."""
    if not params.weights:
        return {name: sizes.size(params.unit) ** params.alpha for name, sizes in groups.items()}
    if missing := [name for name, weight in params.weights.items() if weight and name not in groups]:
        raise InputError(
            f"balance: no document is in the group `{missing[0]}` of {params.by}",
            hint=f"groups here: {', '.join(list(groups)[:20])}",
        )
    if params.others is None and (unnamed := [name for name in groups if name not in params.weights]):
        raise InputError(
            f"balance: weights does not name the group `{unnamed[0]}` of {params.by}",
            hint="name it, with 0 to leave it out, or set others",
        )
    found = {name: params.weights.get(name, params.others or 0.0) for name in groups}
    if not any(found.values()):
        raise InputError("balance: no group with documents has a weight above 0", hint="look at weights and others")
    return found


def volume(sizes: Mapping[str, int], shares: Mapping[str, float], params: BalanceParams) -> float:
    """Documents or bytes of the result, so that every group has its share within the passes allowed.

    InputError where `size: up` cannot keep every document within them.
    """
    passes = [sizes[name] / share for name, share in shares.items() if share]  # the whole at one pass over each group
    most = params.max_epochs * min(passes)
    if params.size == "up" and max(passes) > most * (1 + 1e-9):
        needed = max(passes) / min(passes)
        raise InputError(
            f"balance: size: up leaves no document out, which takes {needed:,.1f} passes over the smallest group; "
            f"max_epochs allows {params.max_epochs:g}",
            hint=f"set max_epochs: {math.ceil(needed)}, or size: same",
        )
    return min(most, {"same": float(sum(sizes.values())), "down": min(passes), "up": max(passes)}[params.size])


def told(rows: Sequence[tuple[str, Sizes, float, Sizes]], params: BalanceParams) -> dict[str, Any]:
    """For the audit: before, wanted and realised shares and passes of every group, and how uneven they are."""
    unit = params.unit
    before = sum(sizes.size(unit) for _, sizes, _, _ in rows)
    after = sum(taken.size(unit) for _, _, _, taken in rows)
    table = [
        {
            "group": name,
            "documents_before": sizes.documents,
            "documents": taken.documents,
            "bytes_before": sizes.bytes,
            "bytes": taken.bytes,
            "share_before": round(sizes.size(unit) / before, 6),
            "share_wanted": round(share, 6),
            "share": round(taken.size(unit) / after, 6) if after else 0.0,
            "epochs": round(taken.size(unit) / sizes.size(unit), 4),
        }
        for name, sizes, share, taken in rows
    ]
    return {
        "by": params.by,
        "unit": unit,
        "groups": table,
        "before": spread([row[1].size(unit) for row in rows]),
        "after": spread([row[3].size(unit) for row in rows]),
    }


class Select:
    """Keeps documents of some groups."""

    name = "select"

    def __init__(self, params: SelectParams, seed: int) -> None:
        self._params = params
        self._keep, self._drop = frozenset(params.keep), frozenset(params.drop)

    def __call__(self, document: Document) -> Outcome:
        """The document, or that its group goes."""
        group = group_of(document, self._params.by)
        if group in self._drop or (self._keep and group not in self._keep):
            return Drop("another group", group)
        return document
