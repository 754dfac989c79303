"""Task on `dataset.preference`: is the right answer likelier than the wrong one?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmctl import InputError
from llmctl.text.template import plain_content
from llmctl_eval.intervals import Bootstrap
from llmctl_eval.samples import Sample
from llmctl_eval.subject import Subject

Row = Mapping[str, Any]


def check_pair(row: Row, number: int) -> Row:
    """A row with `prompt`, `chosen` and `rejected`; InputError if one is missing or is no conversation."""
    for part in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(part), list) or not row[part]:
            raise InputError(
                f"row {number} ({row.get('id')}) has no `{part}` messages",
                hint="rows are {prompt, chosen, rejected}, each a list of messages",
            )
    return row


def rank_pairs(subject: Subject, batch: Sequence[Row]) -> Iterator[Sample]:
    """The log-likelihood of both answers of each pair, in nats, the closing token included."""
    for row in batch:
        chosen, rejected = (plain_content(row[part][-1].get("content")) for part in ("chosen", "rejected"))
        asked = {
            "task": "ranking",
            "id": str(row.get("id", "")),
            "question": plain_content(row["prompt"][-1]["content"]),
        }
        sample = {**asked, "expected": chosen, **({"kind": str(row["kind"])} if row.get("kind") else {})}
        right = subject.answer_logprob(row["prompt"], chosen)
        wrong = subject.answer_logprob(row["prompt"], rejected)
        if right is None or wrong is None:
            yield {**sample, "answer": "", "ok": False, "margin": None, "too_long": True}
            continue
        answer = chosen if right > wrong else rejected
        yield {**sample, "answer": answer, "ok": right > wrong, "margin": right - wrong}


def margins(samples: Sequence[Sample], boot: Bootstrap) -> dict[str, float]:
    """Mean margin in nats, with its interval."""
    return boot.mean([sample["margin"] for sample in samples]).named("ranking.margin", "_")
