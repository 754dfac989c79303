"""What was done, for whoever uses the data: `audit.json` in every dataset, rejects and files in full in the metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl import Context
from llmctl.text.cleaning.groups import UNKNOWN
from llmctl_data import card, shards
from llmctl_data.params import DataParams

AUDIT, CARD, REJECTS, FILES = "audit.json", "card.html", "rejects.jsonl", "files.jsonl"
VERSION = 1
LISTED = 200
"""Files that the audit names with their digests; of more, the digest of all is there and the list in the metrics."""
FIRST = 20
"""Rejects that the audit shows."""
NAMED = 10
"""Problems that are named in the terminal."""
DATASETS = ("text", "chat", "preference", "labelled")


def write_reports(ctx: Context, params: DataParams, result: shards.Result) -> None:
    """Write the audit into every dataset of this run and into the metrics, and tell the user what was left out."""
    audit = make_audit(params, result)
    for port in (*DATASETS, "metrics"):
        if ctx.wants(port):
            write_audit(audit, ctx.output(port))
    if ctx.wants("metrics"):
        metrics = ctx.output("metrics")
        with (metrics / REJECTS).open("w", encoding="utf-8") as file:
            for reject in shards.all_rejects(result):
                file.write(json.dumps({"where": reject.where, **reject.to_json()}, ensure_ascii=False) + "\n")
        with (metrics / FILES).open("w", encoding="utf-8") as file:
            for told in shards.all_files(result):
                file.write(json.dumps(told, ensure_ascii=False) + "\n")
        (metrics / CARD).write_text(card.page(audit), encoding="utf-8")
    tell(ctx, result)


def make_audit(params: DataParams, result: shards.Result) -> dict[str, Any]:
    """Everything that is known of the corpus. Depends on the sources and the parameters alone: no time, no path."""
    first = list(shards.all_rejects(result, FIRST))
    return {
        "audit": VERSION,
        "seed": params.seed,
        "sources": source_audits(result),
        "read": {**result.read.audit(), "hidden_files": result.found.hidden},
        "rejects": {
            "count": sum(result.read.rejected.values()),
            "first": [{"where": reject.where, "reason": reject.reason, "detail": reject.detail} for reject in first],
        },
        "steps": result.steps,
        "kept": result.kept.audit(),
    }


def source_audits(result: shards.Result) -> list[dict[str, Any]]:
    """Every source: files, bytes, documents read and kept, what the user says of it, digests."""
    names: dict[str, list[dict[str, Any]]] = {}
    digests: dict[str, Any] = {}
    for told in shards.all_files(result):
        digest = told["digest"]
        listed = names.setdefault(told["source"], [])
        if len(listed) <= LISTED:
            listed.append({key: told[key] for key in ("name", "format", "bytes", "documents", "digest")})
        digests.setdefault(told["source"], hashlib.sha256()).update(f"{told['name']} {digest}\n".encode())
    kept = result.kept.groups["source"]
    found = []
    for name, counts in result.read.sources.items():
        entry: dict[str, Any] = {"name": name, **result.found.sources.get(name, {})}
        entry |= {"files": counts["files"], "bytes": counts["bytes"], "documents": counts["documents"]}
        if counts["taken"] != counts["documents"]:
            entry["taken"] = counts["taken"]
        entry["kept"] = kept.get(name, [0, 0])[0]
        if name in digests and not result.found.spooled:
            entry["digest"] = f"sha256:{digests[name].hexdigest()}"
            entry["listed"] = names[name] if len(names[name]) <= LISTED else []
        found.append(entry)
    return found


def write_audit(audit: dict[str, Any], directory: Path) -> None:
    """`audit.json` in a directory."""
    text = json.dumps(audit, indent=1, ensure_ascii=False)
    (directory / AUDIT).write_text(text + "\n", encoding="utf-8")


def tell(ctx: Context, result: shards.Result) -> None:
    """Lines for the terminal: what each step did, the first problems by name, and how many there are."""
    for line in table(result):
        ctx.log(line)
    for note in list(shards.all_notes(result))[:NAMED]:
        ctx.log(f"{note['name']}: {note['detail']}")
    tell_groups(ctx, result)
    count = sum(result.read.rejected.values())
    if not count:
        return
    for reject in shards.all_rejects(result, NAMED):
        ctx.log(f"{reject.where}: {reject.detail}" + (f" ({reject.hint})" if reject.hint else ""))
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in result.read.audit()["rejected"].items())
    more = f", the first {NAMED} are named above" if count > NAMED else ""
    ctx.warn(f"{count:,} not read: {reasons}{more}; all are in {REJECTS} of the metrics")


def table(result: shards.Result) -> list[str]:
    """A row for every step, what was read above and what is left below; no row at all where there are no steps."""
    if not result.steps:
        return []
    total = result.read.audit()
    rows = [("read", f"{total['documents']:,}", shown_bytes(total["bytes"]), "")]
    for step in result.steps:
        parts = [f"{count:,} {reason}" for reason, count in step["dropped"].items()]
        parts += [f"{step[what]:,} {what}" for what in ("edited", "tagged") if step[what]]
        documents = step["documents_out"] - step["documents_in"]
        rows.append((step["name"], f"{documents:+,}" if documents else "0", "", ", ".join(parts)))
    rows.append(("kept", f"{result.kept.documents:,}", shown_bytes(result.kept.bytes), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows)
    return [line.rstrip() for line in lines]


def shown_bytes(size: int) -> str:
    """A number of bytes, in MB, or in kB where that is nothing."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def tell_groups(ctx: Context, result: shards.Result) -> None:
    """How uneven sources, languages and classes are, the licenses, and what steps made of it."""
    for group, units in result.kept.audit()["imbalance"].items():
        told = units["bytes"]
        if told["groups"] > 1:
            ctx.log(
                f"{told['groups']} groups by {group}: effectively {told['effective']:.2f}, the largest "
                f"{told['largest']:.1%} of the bytes, {told['ratio']:,.1f} times the smallest"
            )
    licenses = {name: documents for name, (documents, _) in result.kept.groups["license"].items()}
    if licenses.keys() - {UNKNOWN}:
        ctx.log(f"licenses of what is kept: {counted(licenses)}")
    for step in result.steps:
        came = {key.removeprefix("license:"): n for key, n in step["found"].items() if key.startswith("license:")}
        if came:
            ctx.log(f"{step['name']}: licenses of the files that came: {counted(came)}")
        if (facts := step.get("facts")) and step["name"] in TOLD:
            TOLD[step["name"]](ctx, facts, step["found"])


def counted(numbers: Mapping[str, int]) -> str:
    """How many there are of each, the most frequent ones by name."""
    ranked = sorted(numbers.items(), key=lambda pair: (-pair[1], pair[0]))
    parts = [f"{number:,} {name}" for name, number in ranked[:NAMED]]
    if rest := ranked[NAMED:]:
        parts.append(f"{sum(number for _, number in rest):,} of {len(rest):,} others")
    return ", ".join(parts)


def tell_balance(ctx: Context, facts: dict[str, Any], found: dict[str, int]) -> None:
    """The shares before and after, and the passes."""
    for row in facts["groups"]:
        ctx.log(
            f"balance: {row['group']} {row['share_before']:.2%} → {row['share']:.2%} of the {facts['unit']} "
            f"(wanted {row['share_wanted']:.2%}), {row['epochs']:.2f} epochs"
        )


def tell_augment(ctx: Context, facts: dict[str, Any], found: dict[str, int]) -> None:
    """How many texts were derived, and how many could not be."""
    derived = found.get("derived", 0)
    ctx.log(f"augment: {facts['group']} had {facts['share_before']:.2%} of the documents; {derived:,} texts derived")
    if short := facts.get("items_too_short"):
        ctx.warn(
            f"augment: {short:,} of {short + facts['items']:,} evaluation items are too short to be looked for; "
            "lower min_words"
        )
    if lost := facts["planned"] - derived:
        ctx.warn(f"augment: {lost:,} of {facts['planned']:,} texts could not be derived; the audit's `found` says why")


def tell_associations(ctx: Context, facts: dict[str, Any], found: dict[str, int]) -> None:
    """The strongest of those that are flagged."""
    for row in [row for row in facts["associations"] if row["flagged"]][:NAMED]:
        ctx.log(
            f"associations: {row['attribute']}: {row['share']:.0%} of {row['passages']:,} with {row['group']} "
            f"(log-odds {row['log_odds']:+.2f}, {row['low']:+.2f} to {row['high']:+.2f})"
        )


TOLD = {"balance": tell_balance, "augment": tell_augment, "associations": tell_associations}
