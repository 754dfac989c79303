"""What an artifact was made from, back to the files that came from outside."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmctl.errors import InputError
from llmctl.store.manifest import Manifest
from llmctl.store.store import Store


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


def lineage(store: Store, manifest: Manifest) -> dict[str, Node]:
    """All ancestors of an artifact and itself first, by id, nearest first."""
    found = {manifest.id: _node(manifest)}
    queue = [manifest.id]
    while queue:
        node = found[queue.pop(0)]
        for id in (id for ids in node.inputs.values() for id in ids):
            if id not in found:
                found[id] = _load(store, id)
                queue.append(id)
    return found


def _load(store: Store, id: str) -> Node:
    try:
        return _node(store.manifest(id))
    except InputError:
        return Node(id=id)


def _node(manifest: Manifest) -> Node:
    origin = manifest.provenance
    return Node(
        id=manifest.id,
        type=manifest.type,
        stage=str(origin.get("stage", "")),
        instance=str(origin.get("instance", "")),
        run=str(origin.get("run", "")),
        present=True,
        inputs={port: list(ids) for port, ids in dict(origin.get("inputs") or {}).items()},
    )


def tree(nodes: dict[str, Node], root: str) -> list[str]:
    """Lines of a tree from the artifact to what it came from; what was shown before is not unfolded again."""
    lines: list[str] = []
    seen: set[str] = set()

    def visit(id: str, port: str, lead: str, branch: str) -> None:
        node = nodes[id]
        label = f"{node.instance or node.stage}  {node.type}" if node.present else "from outside the store"
        again = id in seen and any(node.inputs.values())
        lines.append(f"{lead}{branch}{port}{id[:15]}  {label}{'  (see above)' if again else ''}")
        if again:
            return
        seen.add(id)
        below = [(name, child) for name, ids in node.inputs.items() for child in ids]
        indent = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for index, (name, child) in enumerate(below):
            visit(child, f"{name}: ", indent, "└─ " if index == len(below) - 1 else "├─ ")

    visit(root, "", "", "")
    return lines
