"""Names of latest results: `refs/<pipeline>/<stage>.<port>.json`, and `…@<tag>.json` for those that were tagged."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.errors import InputError
from llmctl.store.commit import replace_json
from llmctl.store.layout import Layout

NAME = re.compile(
    r"(?P<pipeline>[A-Za-z0-9][\w.-]*)/(?P<stage>[\w-]+(\[[^\]/]*\])?)(\.(?P<port>[\w-]+))?(@(?P<tag>[\w.-]+))?\Z"
)
MAIN = "metrics"
"""Outputs of this type are never what a bare stage name means, if there is another."""


def write(
    layout: Layout,
    pipeline: str,
    stage: str,
    outputs: Mapping[str, tuple[str, str]],
    *,
    key: str,
    run: str,
    tag: str = "",
) -> None:
    """Point the names of a stage's outputs, port → (id, type), at their latest ids; unchanged ones stay untouched."""
    for port, (id, type) in outputs.items():
        for suffix in ("", f"@{tag}") if tag else ("",):
            path = layout.refs / pipeline / f"{stage}.{port}{suffix}.json"
            if read_json(path).get("id") != id or read_json(path).get("key") != key:
                value = {"id": id, "type": type, "key": key, "run": run, "time": timestamp()}
                replace_json(layout, path, value)


def read(layout: Layout, text: str) -> str:
    """The id that a name means now. InputError if there is no such name, or a stage has several outputs."""
    match = NAME.match(text)
    found = candidates(layout, text)
    if match and match["port"]:
        found = {port: ref for port, ref in found.items() if port == match["port"]}
    else:
        found = {port: ref for port, ref in found.items() if ref.get("type") != MAIN} or found
    if not found:
        raise InputError(f"there is no result named `{text}` in {layout.root}", hint=_known(layout))
    if len(found) > 1:
        listed = ", ".join(f"{text}.{port}" for port in found)
        raise InputError(f"`{text}` has several outputs", hint=f"choose one: {listed}")
    return str(next(iter(found.values()))["id"])


def candidates(layout: Layout, text: str) -> dict[str, dict[str, Any]]:
    """The refs of a stage by port, of the tag that `text` names or of the latest results."""
    match = NAME.match(text)
    if not match:
        return {}
    tag = match["tag"] or ""
    found = {}
    folder, stage = layout.refs / match["pipeline"], match["stage"]
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        stem, _, own_tag = path.name.removesuffix(".json").partition("@")
        if stem.rpartition(".")[0] == stage and own_tag == tag and (ref := read_json(path)):
            found[stem.rpartition(".")[2]] = ref
    return found


def every(layout: Layout) -> dict[str, dict[str, Any]]:
    """All names with their refs, `quickstart/sft.model` → {id, type, key, run, time}."""
    paths = sorted(layout.refs.glob("*/*.json"))
    found = {f"{path.parent.name}/{path.name.removesuffix('.json')}": read_json(path) for path in paths}
    return {name: ref for name, ref in found.items() if ref}


def _known(layout: Layout) -> str:
    stages = sorted({name.rpartition(".")[0] for name in every(layout)})
    return f"known: {', '.join(stages[:8])}" if stages else "nothing has run with this store yet"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def timestamp() -> str:
    """Now in UTC, ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
