"""The data card: one HTML page with what the audit says, plots included; no script, no file beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llmctl.console import human_bytes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; width: 100%; } 
th, td { text-align: left; padding: 3px 10px 3px 0; vertical-align: top; }
th { border-bottom: 1px solid #999; } td { border-bottom: 1px solid #e4e4e4; } td.n, th.n { text-align: right; }
pre { background: #f4f4f4; padding: .5em; white-space: pre-wrap; overflow-wrap: anywhere; }
svg { width: 100%; max-width: 640px; } .bar { fill: #4472a8; } text { font: 12px system-ui, sans-serif; fill: #444; }
summary { cursor: pointer; } .bad { color: #a33; } code { overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #ddd; } pre { background: #2a2a2a; }
  td { border-color: #383838; } text { fill: #bbb; } }
"""
MOST_BARS = 20


def page(audit: Mapping[str, Any]) -> str:
    """The card of an audit."""
    kept = audit["kept"]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Data card</title>",
        f"<style>{STYLE}</style></head><body><h1>Data card</h1>",
        f"<p>{kept['documents']:,} documents, {human_bytes(kept['bytes'])}, {kept['characters']:,} characters.</p>",
        *sources(audit["sources"]),
        *reading(audit),
        *cleaning(audit["steps"]),
        *lengths(kept["lengths"]),
        *imbalance(kept),
    ]
    for group in ("language", "class", "format", "source", "license", "split"):
        if values := kept.get(f"by_{group}"):
            parts += groups(group, values)
    for section in audit.get("sections", ()):
        parts += free_section(section)
    return "\n".join([*parts, "</body></html>"]) + "\n"


def sources(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for every source."""
    head = ("source", "license", "files", "bytes", "documents", "kept", "digest")
    rows = [
        [
            entry["name"],
            entry.get("license", "unknown"),
            entry["files"],
            human_bytes(entry["bytes"]),
            entry["documents"],
            entry["kept"],
            entry.get("digest", "")[:19],
        ]
        for entry in entries
    ]
    return ["<h2>Sources</h2>", table(head, rows)]


def reading(audit: Mapping[str, Any]) -> list[str]:
    """What could not be read."""
    rejected = audit["read"]["rejected"]
    parts = ["<h2>Reading</h2>"]
    if not rejected:
        parts.append("<p>Everything could be read.</p>")
    else:
        parts.append(table(("not read because", "how many"), [list(item) for item in rejected.items()]))
        rows = [[reject["where"], reject["reason"], reject["detail"]] for reject in audit["rejects"]["first"]]
        parts.append("<details open><summary>The first of them</summary>")
        parts += [table(("where", "reason", "detail"), rows), "</details>"]
    if encodings := audit["read"]["encodings"]:
        parts.append(table(("files read in another encoding", "how many"), [list(item) for item in encodings.items()]))
    return parts


def cleaning(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for every step, and samples of what it removed or changed."""
    if not steps:
        return ["<h2>Cleaning</h2>", "<p>No step was taken.</p>"]
    head = ("step", "in", "out", "dropped", "edited", "tagged", "found")
    rows = [
        [
            step["name"],
            step["documents_in"],
            step["documents_out"],
            sum(step["dropped"].values()),
            step["edited"],
            step["tagged"],
            ", ".join(f"{name} {count:,}" for name, count in step["found"].items()),
        ]
        for step in steps
    ]
    parts = ["<h2>Cleaning</h2>", table(head, rows)]
    for step in steps:
        if step["dropped"]:
            parts += [f"<h3>Dropped by {escape(step['name'])}</h3>", bars(step["dropped"])]
        parts += step_facts(step.get("facts") or {})
        parts += samples(step)
    return parts


def step_facts(facts: Mapping[str, Any]) -> list[str]:
    """What a corpus step found: lists of like rows as tables, all else as a sentence."""
    tables = {
        name: value
        for name, value in facts.items()
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    }
    rest = {name: value for name, value in facts.items() if name not in tables}
    parts = [f"<p>{escape(', '.join(f'{name}: {value}' for name, value in rest.items()))}</p>"] if rest else []
    for name, rows in tables.items():
        parts += [f"<h3>{escape(name)}</h3>", table(tuple(rows[0]), [list(row.values()) for row in rows])]
    return parts


def imbalance(kept: Mapping[str, Any]) -> list[str]:
    """How uneven sources, languages and classes are."""
    rows = [
        [group, unit, told["groups"], told["effective"], told["entropy"], told["largest"], told["ratio"]]
        for group, units in kept["imbalance"].items()
        for unit, told in units.items()
    ]
    head = ("groups", "by", "number", "effective number", "entropy, bits", "largest share", "largest / smallest")
    return ["<h2>Imbalance</h2>", table(head, rows)]


def samples(step: Mapping[str, Any]) -> list[str]:
    """What a step removed or changed, folded away."""
    parts = []
    for kind, taken in step["samples"].items():
        parts.append(f"<details><summary>{escape(step['name'])}: samples, {escape(kind)}</summary>")
        for sample in taken:
            detail = f" · {escape(sample['detail'])}" if sample.get("detail") else ""
            parts.append(f"<p><code>{escape(sample['id'])}</code>{detail}</p>")
            parts += [f"<pre>{escape(sample[key])}</pre>" for key in ("text", "before", "after") if key in sample]
        parts.append("</details>")
    return parts


def lengths(told: Mapping[str, Any]) -> list[str]:
    """The distribution of lengths."""
    values = {f"{item['from']:,}–{item['to']:,}": item["documents"] for item in told["bins"]}
    text = f"From {told['shortest']:,} to {told['longest']:,} characters."
    return ["<h2>Lengths</h2>", f"<p>{text}</p>", bars(values, most=64)]


def groups(name: str, values: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Documents by one of the things that are known of them."""
    return [f"<h2>By {name}</h2>", bars({value: counts["documents"] for value, counts in values.items()})]


def free_section(section: Mapping[str, Any]) -> list[str]:
    """A section that a step gives: a title, a sentence, and counts or rows."""
    parts = [f"<h2>{escape(section['title'])}</h2>"]
    if section.get("text"):
        parts.append(f"<p>{escape(section['text'])}</p>")
    if section.get("counts"):
        parts.append(bars(section["counts"]))
    if section.get("rows"):
        parts.append(table(section["head"], section["rows"]))
    return parts


def bars(values: Mapping[str, int], most: int = MOST_BARS) -> str:
    """Horizontal bars as inline SVG; those beyond `most` together as the last."""
    shown = dict(list(values.items())[:most])
    if len(values) > most:
        shown[f"{len(values) - most:,} others"] = sum(list(values.values())[most:])
    top = max(shown.values(), default=0) or 1
    height = 22 * len(shown)
    parts = [f'<svg viewBox="0 0 640 {height}" role="img" aria-label="bars">']
    for place, (name, count) in enumerate(shown.items()):
        y = 22 * place
        width = 300 * count / top
        label = name if len(name) <= 30 else name[:29] + "…"
        parts.append(
            f'<text x="210" y="{y + 15}" text-anchor="end"><title>{escape(name)}</title>{escape(label)}</text>'
        )
        parts.append(f'<rect class="bar" x="220" y="{y + 3}" width="{width:.1f}" height="16"/>')
        parts.append(f'<text x="{226 + width:.1f}" y="{y + 15}">{count:,}</text>')
    return "".join([*parts, "</svg>"])


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; numbers stand to the right."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    return f'<td class="n">{value:,}</td>' if isinstance(value, int | float) else f"<td>{escape(str(value))}</td>"
