"""What an artifact was made from, back to the files that came from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import InputError
from llmctl.store.external import changed_since, read_note
from llmctl.store.manifest import Manifest
from llmctl.store.names import read_json
from llmctl.store.store import Store
from llmctl.store.verification import inspect


@dataclass(kw_only=True)
class Producer:
    """A later execution that gave the same bytes."""

    stage: str
    instance: str
    run: str
    ended: str
    key: str
    inputs: dict[str, list[str]] = field(default_factory=dict)


@dataclass(kw_only=True)
class Node:
    """One artifact. `present` is False for inputs from outside the store and for what was deleted."""

    id: str
    type: str = ""
    stage: str = ""
    instance: str = ""
    run: str = ""
    present: bool = False
    inputs: dict[str, list[str]] = field(default_factory=dict)
    """Port of the producing stage → ids."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What the producing stage was told: filters, seeds and all else."""
    path: str = ""
    """Where an input from outside lay when it was last read on this machine, if that is known."""
    problems: list[str] = field(default_factory=list)
    """What `check` has found to be no longer as it was."""
    producers: list[Producer] = field(default_factory=list)
    """Later ones; the first is that of `stage` and `run`."""

    @property
    def label(self) -> str:
        """What it is, for a person."""
        if self.present:
            return f"{self.instance or self.stage}  {self.type}"
        return f"{self.path}  {self.type}  from outside the store" if self.path else "from outside the store"


def lineage(store: Store, manifest: Manifest) -> dict[str, Node]:
    """All ancestors of an artifact and itself first, by id, nearest first."""
    found = {manifest.id: _node(store, manifest)}
    queue = [manifest.id]
    while queue:
        node = found[queue.pop(0)]
        for id in (id for ids in node.inputs.values() for id in ids):
            if id not in found:
                found[id] = _load(store, id)
                queue.append(id)
    return found


def check(store: Store, nodes: Mapping[str, Node], first: Path) -> None:
    """Hash every file of a lineage again, those from outside where they lay, and note in its node what has changed.

    `first` is where the first of `nodes` was found, which may be a copy outside the store. What was deleted from the
    store, and what came from elsewhere than this machine's files, cannot be looked at.
    """
    for number, node in enumerate(nodes.values()):
        if node.present:
            node.problems = inspect(first if number == 0 else store.artifact(node.id), node.id, deep=True)
        elif node.path:
            node.problems = changed_since(store, node.id)


def _load(store: Store, id: str) -> Node:
    try:
        return _node(store, store.manifest(id))
    except InputError:
        note = read_note(store, id)
        return Node(id=id, type=str(note.get("type", "")), path=str(note.get("path", "")))


def _node(store: Store, manifest: Manifest) -> Node:
    records = [read_json(path) for path in sorted(store.records(manifest.id).glob("*.json"))]
    producers = [_producer(dict(record.get("provenance") or {})) for record in records]
    first = _producer(manifest.provenance)
    return Node(
        id=manifest.id,
        type=manifest.type,
        stage=first.stage,
        instance=first.instance,
        run=first.run,
        present=True,
        inputs=first.inputs,
        parameters=dict(manifest.provenance.get("with") or {}),
        producers=sorted(producers, key=lambda producer: producer.ended),
    )


def _producer(origin: Mapping[str, Any]) -> Producer:
    names = ("stage", "instance", "run", "ended", "key")
    inputs = {port: list(ids) for port, ids in dict(origin.get("inputs") or {}).items()}
    return Producer(**{name: str(origin.get(name, "")) for name in names}, inputs=inputs)


def tree(nodes: Mapping[str, Node], root: str) -> list[str]:
    """Lines of a tree from the artifact to what it came from; what was shown before is not unfolded again."""
    lines: list[str] = []
    seen: set[str] = set()

    def visit(id: str, port: str, lead: str, branch: str) -> None:
        node = nodes[id]
        again = id in seen and any(node.inputs.values())
        lines.append(f"{lead}{branch}{port}{id[:15]}  {node.label}{'  (see above)' if again else ''}")
        if again:
            return
        seen.add(id)
        below = [(name, child) for name, ids in node.inputs.items() for child in ids]
        indent = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for producer in node.producers:
            what = producer.instance or producer.stage or producer.key[:15]
            lines.append(f"{indent}{'│  ' if below else '   '}(made again by {what}{_in_run(producer)})")
        lines.extend(f"{indent}{'│  ' if below else '   '}! {problem}" for problem in node.problems)
        for index, (name, child) in enumerate(below):
            visit(child, f"{name}: ", indent, "└─ " if index == len(below) - 1 else "├─ ")

    visit(root, "", "", "")
    return lines


def _in_run(producer: Producer) -> str:
    return f", run {producer.run}" if producer.run else ""


def dot(nodes: Mapping[str, Node]) -> str:
    """The same as a Graphviz digraph: arrows go the way the data went, and carry the name of the port."""
    return "\n".join(["digraph lineage {", "  rankdir=LR;", "  node [shape=box];", *_statements(nodes), "}"])


def _statements(nodes: Mapping[str, Node]) -> Iterator[str]:
    for id, node in nodes.items():
        rows = [row for row in (node.instance or node.path, node.type, id[:15]) if row]
        style = "" if node.present else ", style=dashed"
        yield f"  {quoted(id)} [label={quoted(chr(10).join(rows))}{style}];"
    for id, node in nodes.items():
        for port, ids in node.inputs.items():
            for source in ids:
                yield f"  {quoted(source)} -> {quoted(id)} [label={quoted(port)}];"


def quoted(text: str) -> str:
    """A text as a quoted string of the DOT language: quotes and backslashes escaped, new lines as `\\n`."""
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("\r", " ").replace("\n", "\\n").replace("\0", " ") + '"'
