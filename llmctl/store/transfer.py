"""Push to and pull from a remote store: files first, the manifest last, then keys and names, all of it repeatable.

What is there whole is skipped, so a transfer that was killed is taken up by the same command, and a reader of the
remote sees an artifact as soon as it is whole and not before. Nothing that is pulled counts until all of its bytes were
hashed here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmctl.store.manifest import NAME, BadManifest, Manifest, content_id
from llmctl.store.names import mapping, objects
from llmctl.store.remote import Remote
from llmctl.store.store import Pointer, is_id

WORKERS = 8
RUN = re.compile(r"[A-Za-z0-9][\w.-]*\Z")
"""What a run may be called: a single part of a path."""
T = TypeVar("T")


@dataclass(kw_only=True)
class Report:
    """What a transfer did."""

    moved: list[Manifest] = field(default_factory=list)
    skipped: list[Manifest] = field(default_factory=list)
    """Whole on the other side already."""
    keys: int = 0
    names: list[str] = field(default_factory=list)
    newer: list[str] = field(default_factory=list)
    """Names that mean something newer on the other side, and stayed as they are there."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was asked for: ids, names to carry along, and a run."""

    ids: tuple[str, ...]
    names: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()


def run_outputs(result: dict[str, Any]) -> list[str]:
    """The artifacts that a run's `run.json` lists; what is no list of them is passed over."""
    outs = (out for stage in objects(result.get("stages")) for out in objects(stage.get("outputs")))
    return [str(out["id"]) for out in outs if is_id(out.get("id"))]


def pointer_outputs(pointer: Pointer | None) -> list[str]:
    """The artifacts that a key leads to."""
    return [str(id) for id in pointer.outputs.values() if is_id(id)] if pointer else []


def parallel(work: Callable[[T], None], items: Sequence[T]) -> None:
    """Run `work` over all items, several at once; the first error ends it, and nothing new is begun."""
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def json_object(data: bytes | None) -> dict[str, Any]:
    """The object in JSON bytes; empty if there is none."""
    try:
        return mapping(json.loads(data or b""))
    except ValueError:
        return {}


def parse_pointer(data: bytes | None) -> Pointer | None:
    """The pointer in the bytes of its file; None if it is none, or leads to what is no id."""
    pointer = Pointer.parse(json_object(data))
    return pointer if pointer is not None and all(map(is_id, pointer.outputs.values())) else None


def remote_manifest(remote: Remote, id: str) -> Manifest | None:
    """The manifest of a committed artifact of the remote, None unless it is one and that of this id."""
    data = remote.read(remote.path(remote.layout.artifact(id) / NAME))
    try:
        manifest = Manifest.parse((data or b"").decode())
    except (BadManifest, UnicodeDecodeError):
        return None
    return manifest if content_id(manifest.type, manifest.files, manifest.type_version) == id else None
