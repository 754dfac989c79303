"""Names of results: `refs/<pipeline>/<stage>.<port>.json` for the latest, `…@<tag>.json` for those that were tagged.

A name is `PIPELINE/STAGE[.PORT][@TAG]`; STAGE may be an instance such as `sft[lr=3e-5,seed=2]`. A tag may also stand
behind a free name `PROJECT/NAME`, which has no port.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from llmctl.errors import InputError, UsageError
from llmctl.store.commit import replace_json
from llmctl.store.layout import Layout

NAME = re.compile(
    r"(?P<pipeline>[A-Za-z0-9][\w.-]*)/(?P<stage>[\w-]+(\[.*\])?)(\.(?P<port>[\w-]+))?(@(?P<tag>[\w.-]+))?\Z"
)
MAIN = "metrics"
"""Outputs of this type are never what a bare stage name means, if there is another."""
UNSAFE = re.compile(r"[\x00-\x1f\x7f/\\%@~:*?\"<>|]|^\.")
LONGEST = 160
"""Bytes of an instance id in a file name; a longer one is cut and told apart by a digest."""


class Place(NamedTuple):
    """What the name of a ref's file says; `stage` is empty if only the file's content can say it."""

    stage: str
    port: str
    tag: str


def file_name(stage: str) -> str:
    """A stage or instance id as a part of a file name: `/`, `@`, `%` and what file systems refuse are `%XX`.

    Every directory entry that is called after a stage (refs, logs) uses it. Equal ids give equal names, and different
    ones different names.
    """
    text = UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", stage)
    if len(text.encode()) <= LONGEST:
        return text
    cut = text.encode()[: LONGEST - 20].decode(errors="ignore")
    return f"{cut}~{hashlib.sha256(stage.encode()).hexdigest()[:16]}"


def place(name: str) -> Place:
    """The reverse of the file name of a ref."""
    stem, _, tag = name.removesuffix(".json").partition("@")
    if "~" in stem:
        return Place("", stem.rpartition("~")[2].partition(".")[2], tag)
    # A dot may stand in the values of an instance; that of the port is the last, behind the bracket.
    head, bracket, tail = stem.rpartition("]")
    dotted, _, port = tail.rpartition(".") if bracket or "." in tail else (tail, "", "")
    return Place(unquote(head + bracket + dotted), port, tag)


class Names:
    """The names in a store, each pipeline's directory read once; for many look-ups, as in planning.

    What is written later by others is not seen; make a new one.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._index: dict[str, dict[tuple[str, str], dict[str, Path]]] = {}

    def candidates(self, text: str) -> dict[str, dict[str, Any]]:
        """The refs of a stage by port, of the tag that `text` names or of the latest results."""
        match = NAME.match(text)
        if not match:
            return {}
        return self.of(match["pipeline"], match["stage"], match["tag"] or "")

    def of(self, pipeline: str, stage: str, tag: str = "") -> dict[str, dict[str, Any]]:
        """The refs of a stage or instance by port: of a tag, else the latest."""
        paths = self._pipeline(pipeline).get((stage, tag), {})
        return {port: ref for port, path in paths.items() if (ref := read_json(path))}

    def _pipeline(self, name: str) -> dict[tuple[str, str], dict[str, Path]]:
        if name not in self._index:
            found: dict[tuple[str, str], dict[str, Path]] = {}
            for path in _files(self._layout.refs / name):
                stage, port, tag = placed(path)
                found.setdefault((stage, tag), {})[port] = path
            self._index[name] = found
        return self._index[name]


def _files(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if name.endswith(".json")]  # noqa: PTH208  # faster
    except (FileNotFoundError, NotADirectoryError):
        return []


def placed(path: Path) -> Place:
    """`place` of a ref's file, which is read if its name was cut."""
    found = place(path.name)
    return found if found.stage else found._replace(stage=str(read_json(path).get("stage", path.name)))


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
    """Point the names of a stage's outputs, port → (id, type), at their latest ids; unchanged ones stay untouched.

    With a `tag` that is moved too. In a store that several projects share, they are kept as roots of this project,
    because another one may use the same name.
    """
    folders = _folders(layout)
    for port, (id, type) in outputs.items():
        value = {"id": id, "type": type, "key": key, "run": run, "stage": stage}
        for suffix in ("", f"@{tag}") if tag else ("",):
            for folder in folders:
                _point(layout, folder / pipeline / f"{file_name(stage)}.{port}{suffix}.json", value)
    for folder in folders if tag else ():
        (folder / pipeline / f"{file_name(stage)}@{tag}.json").unlink(missing_ok=True)


def _folders(layout: Layout) -> tuple[Path, ...]:
    """Where this project's names lie: every change is made in all of them."""
    from llmctl.store.roots import project_refs

    return (layout.refs, *project_refs(layout))


def _point(layout: Layout, path: Path, value: Mapping[str, Any]) -> None:
    old = read_json(path)
    if (old.get("id"), old.get("key")) != (value["id"], value["key"]):
        replace_json(layout, path, {**value, "time": timestamp()})


def set_tag(layout: Layout, text: str, value: Mapping[str, Any]) -> None:
    """Let the name `text`, which must have a tag, mean the artifact that `value` (id, type, key, run) describes."""
    match = tagged(text)
    port = f".{match['port']}" if match["port"] else ""
    name = f"{file_name(match['stage'])}{port}@{match['tag']}.json"
    for folder in _folders(layout):
        path = folder / match["pipeline"] / name
        replace_json(layout, path, {**value, "stage": match["stage"], "time": timestamp()})


def delete_tag(layout: Layout, text: str) -> list[str]:
    """Remove a tag of all ports, or of the one that `text` names; the names removed. InputError if there is none."""
    match = tagged(text)
    found = {port: ref for port, ref in candidates(layout, text).items() if match["port"] in (None, port)}
    if not found:
        raise InputError(f"there is no tag `{text}` in {layout.root}", hint=_near(layout, text))
    removed = []
    for port in found:
        stem = match["stage"], f".{port}" if port else "", f"@{match['tag']}"
        for folder in _folders(layout):
            (folder / match["pipeline"] / f"{file_name(stem[0])}{stem[1]}{stem[2]}.json").unlink(missing_ok=True)
        removed.append(f"{match['pipeline']}/{''.join(stem)}")
    return removed


def tagged(text: str) -> re.Match[str]:
    """The parts of `PROJECT/NAME[.PORT]@TAG`; UsageError for anything else."""
    match = NAME.match(text)
    if not match or not match["tag"]:
        raise UsageError(f"`{text}` is no name with a tag", hint="PIPELINE/STAGE[.PORT]@TAG, e.g. quickstart/sft@best")
    return match


def read(layout: Layout, text: str, types: Sequence[str] = ()) -> str:
    """The id that a name means now. InputError if there is no such name, or a stage has several outputs.

    Of several outputs those of the welcome `types` count, if there are any.
    """
    return choose(candidates(layout, text), text, types, lambda: _near(layout, text), str(layout.root))


def choose(found: Mapping[str, Mapping[str, Any]], text: str, types: Sequence[str], near: Any, where: str) -> str:
    """The id of the one ref among `found` (by port) that `text` means; see `read`. `near()` gives the hint."""
    match = NAME.match(text)
    if match and match["port"]:
        found = {port: ref for port, ref in found.items() if port == match["port"]}
    elif "" in found:
        found = {"": found[""]}
    else:
        found = {port: ref for port, ref in found.items() if ref.get("type") in types} or found
        found = {port: ref for port, ref in found.items() if ref.get("type") != MAIN} or found
    if not found:
        raise InputError(f"there is no result named `{text}` in {where}", hint=near())
    if len(found) > 1:
        stem, at, tag = text.rpartition("@") if match and match["tag"] else (text, "", "")
        listed = ", ".join(f"{stem}.{port}{at}{tag}" for port in found)
        raise InputError(f"`{text}` has several outputs", hint=f"choose one: {listed}")
    return str(next(iter(found.values()))["id"])


def candidates(layout: Layout, text: str) -> dict[str, dict[str, Any]]:
    """`Names.candidates` for a single look-up."""
    return Names(layout).candidates(text)


def every(layout: Layout) -> dict[str, dict[str, Any]]:
    """All names with their refs, `quickstart/sft.model` → {id, type, key, run, time, stage}."""
    return every_in(layout.refs)


def every_in(refs: Path) -> dict[str, dict[str, Any]]:
    """The same of a folder that is laid out like `refs/`."""
    found = {}
    for folder in sorted(path for path in refs.glob("*") if path.is_dir()):
        for path in _files(folder):
            if ref := read_json(path):
                found[f"{folder.name}/{title(placed(path))}"] = ref
    return found


def title(place: Place) -> str:
    """`sft.model@best`: what a ref is called within its pipeline."""
    return place.stage + (f".{place.port}" if place.port else "") + (f"@{place.tag}" if place.tag else "")


def _near(layout: Layout, text: str) -> str:
    return near(text, every(layout))


def near(text: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """A hint for a name that is not there: the nearest ones, else the first."""
    from difflib import get_close_matches

    shorts = sorted({_without_port(name) for name in known})
    if not shorts:
        return "nothing has run with this store yet"
    if close := get_close_matches(text, [*shorts, *known], 3, cutoff=0.75):
        return f"did you mean {' or '.join(f'`{name}`' for name in dict.fromkeys(close))}?"
    return f"known: {', '.join(shorts[:8])}{', …' if len(shorts) > 8 else ''}; `llmctl refs` lists all"


def _without_port(name: str) -> str:
    match = NAME.match(name)
    if match:
        return f"{match['pipeline']}/{match['stage']}" + (f"@{match['tag']}" if match["tag"] else "")
    stem, at, tag = name.partition("@")
    return f"{stem.rpartition('.')[0] or stem}{at}{tag}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it is missing or damaged."""
    try:
        return mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one: files of a store may be damaged."""
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects among the values of a JSON object; nothing of anything else."""
    yield from (item for item in mapping(value).values() if isinstance(item, dict))


def timestamp() -> str:
    """Now in UTC, ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
