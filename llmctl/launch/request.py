"""What `stage exec` must do: one JSON file in the store, so that no Python object crosses a process or a machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import InputError
from llmctl.stage import Artifact
from llmctl.store.commit import replace_json
from llmctl.store.external import Snapshot
from llmctl.store.layout import Layout
from llmctl.store.names import read_json

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """One execution of a stage. Equal keys make equal requests but for `instance`, a name for people."""

    key: str
    resume: str
    preimage: Mapping[str, Any]
    stage: str
    instance: str
    plugin: Mapping[str, Any]
    """`dist`, `version` and `rev` of the plugin; a process with another `dist` or `rev` refuses the request."""
    params: str
    """JSON of the whole, validated parameters."""
    inputs: Mapping[str, Sequence[Artifact]]
    """By port; ports without an entry are unbound."""
    outputs: Mapping[str, str]
    """Port → artifact type."""
    snapshots: Sequence[Snapshot] = ()
    """External inputs, to see before publishing whether they changed meanwhile."""
    memory: int | None = None
    """Most bytes of data the process may allocate."""
    nodes: int = 1
    """Machines that its processes are shared out to."""
    secrets: Sequence[str] = ()
    """Variables of the process that hold secrets: names, never values."""
    observed: Mapping[str, Any] = field(default_factory=dict)
    """What the runner knows about the circumstances, for the manifest's `observed`."""

    def write(self, layout: Layout) -> None:
        """Put the request where `stage exec --key` finds it."""
        inputs = {
            port: [{"path": str(a.path), "type": a.type, "id": a.id, "metadata": dict(a.metadata)} for a in artifacts]
            for port, artifacts in self.inputs.items()
        }
        plain = ("key", "resume", "preimage", "stage", "instance", "plugin", "outputs", "memory", "nodes", "observed")
        value = {
            "v": VERSION,
            **{name: getattr(self, name) for name in plain},
            "params": json.loads(self.params),
            "inputs": inputs,
            "snapshots": [snapshot.to_json() for snapshot in self.snapshots],
            "secrets": list(self.secrets),
        }
        replace_json(layout, layout.request(self.key), value)

    @classmethod
    def read(cls, layout: Layout, key: str) -> Request:
        """The request of a key; InputError if there is none that this llmctl understands."""
        path = layout.request(key)
        raw = read_json(path)
        if raw.get("v") != VERSION:
            raise InputError(f"there is no request of version {VERSION} at {path}", hint="start it with `llmctl run`")
        del raw["v"]
        raw["params"] = json.dumps(raw["params"])
        raw["inputs"] = {
            port: [Artifact(Path(row["path"]), row["type"], row["id"], row["metadata"]) for row in rows]
            for port, rows in raw["inputs"].items()
        }
        raw["snapshots"] = [Snapshot.from_json(row) for row in raw["snapshots"]]
        return cls(**raw)
