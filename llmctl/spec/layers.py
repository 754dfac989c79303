"""Layers of a spec, low to high: `include` files, the file, `--profile` overlays in order, `--set`.

Every value keeps its mark, so that it can be told which layer it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from llmctl.spec.diagnostics import Mark, Report, Text, suggest
from llmctl.spec.nodes import Entry, Map, Node, Scalar, fail

DEFAULT_KEYS = ("env", "resources", "retries")


def merge(low: Node, high: Node) -> Node:
    """`high` over `low`: maps merge key by key, scalars, lists and maps marked `!replace` replace."""
    if not (isinstance(low, Map) and isinstance(high, Map)) or high.replaces:
        return high
    entries = dict(low.entries)
    for key, entry in high.entries.items():
        below = entries.get(key)
        if below is None:
            entries[key] = entry
        else:
            value = merge(below.value, entry.value)
            entries[key] = Entry(below.key if isinstance(value, Map) else entry.key, value)
    return Map(low.mark, entries, low.replaces)


SHORT_FORMS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("store",), "uri"),
    (("sources", "*"), "uri"),
    (("secrets", "*"), "from"),
    (("env", "*"), "value"),
    (("defaults", "env", "*"), "value"),
    (("stages", "*", "env", "*"), "value"),
)
"""Where a text may stand for a map, and the key that is meant."""


def long_forms(layer: Map) -> Map:
    """`layer` with every text that stands for a map written out, so that layers of either form merge."""
    node: Node = layer
    for path, key in SHORT_FORMS:
        for where in (path, ("profiles", "*", *path)):
            node = changed_at(node, where, partial(_written_out, key))
    assert isinstance(node, Map)
    return node


def _written_out(key: str, value: Node) -> Node:
    is_text = isinstance(value, Scalar) and isinstance(value.value, str)
    return Map(value.mark, {key: Entry(value.mark, value)}) if is_text else value


def changed_at(node: Node, path: tuple[str, ...], change: Callable[[Node], Node]) -> Node:
    """`node` with what lies at `path` changed; `*` is every key, and what is not there stays away."""
    if not path:
        return change(node)
    if not isinstance(node, Map):
        return node
    changed = {
        key: Entry(entry.key, changed_at(entry.value, path[1:], change))
        for key, entry in node.entries.items()
        if path[0] in ("*", key)
    }
    return Map(node.mark, {**node.entries, **changed}, node.replaces)


def merge_maps(low: Map, high: Map) -> Map:
    """`merge` of two maps, which is a map."""
    merged = merge(low, high)
    assert isinstance(merged, Map)
    return merged


def without(node: Map, *keys: str) -> Map:
    """`node` without some of its keys."""
    return Map(node.mark, {key: entry for key, entry in node.entries.items() if key not in keys}, node.replaces)


def at(path: Sequence[tuple[str, Mark]], value: Node) -> Map:
    """The map that holds `value` at `path`, a key and its mark per step."""
    node: Node = value
    for key, mark in reversed(path):
        node = Map(mark, {key: Entry(mark, node)})
    assert isinstance(node, Map)
    return node


def apply_profiles(document: Map, names: Sequence[str], report: Report) -> Map:
    """`document` with the overlays of `names` on it, without its section `profiles`; E022 for an unknown name."""
    section = document.get("profiles")
    profiles = section.entries if isinstance(section, Map) else {}
    merged = without(document, "profiles")
    for number, name in enumerate(names, 1):
        if name not in profiles:
            mark = option(f"--profile#{number}", name, number).whole
            report.add("E022", f"no profile `{name}`", mark, suggest(name, list(profiles), "profiles"))
        elif isinstance(overlay := profiles[name].value, Map):
            merged = merge_maps(merged, overlay)
    return merged


def apply_defaults(document: Map) -> Map:
    """`document` with the section `defaults` merged under every stage; a `select` has no process to have defaults."""
    defaults, stages = document.get("defaults"), document.get("stages")
    if not (isinstance(defaults, Map) and isinstance(stages, Map)):
        return document
    shared = Map(defaults.mark, {key: defaults.entries[key] for key in DEFAULT_KEYS if key in defaults.entries})
    filled = {
        name: Entry(entry.key, merge(shared, node) if isinstance(node, Map) and "select" not in node.entries else node)
        for name, entry in stages.entries.items()
        for node in [entry.value]
    }
    section = Entry(document.entries["stages"].key, Map(stages.mark, filled))
    return Map(document.mark, {**document.entries, "stages": section})


def option(name: str, content: str, number: int) -> Text:
    """The text of a command-line option; relative paths in it start from the current directory."""
    readable = content.encode(errors="replace").decode()
    text = Text(name, readable, Path.cwd(), rank=number)
    if readable != content:  # bytes that are not UTF-8 reach Python as lone surrogates
        fail("E001", f"{name} is not UTF-8", text.whole)
    return text
