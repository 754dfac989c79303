"""Push to and pull from a remote store: files first, the manifest last, then keys and names, all of it repeatable.

What is there whole is skipped, so a transfer that was killed is taken up by the same command, and a reader of the
remote sees an artifact as soon as it is whole and not before. Nothing that is pulled counts until all of its bytes were
hashed here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmctl.store.manifest import NAME, BadManifest, Manifest, content_id
from llmctl.store.remote import Remote
from llmctl.store.store import Pointer

WORKERS = 8
T = TypeVar("T")


@dataclass(kw_only=True)
class Report:
    """What a transfer did."""

    moved: list[Manifest] = field(default_factory=list)
    skipped: list[Manifest] = field(default_factory=list)
    """Whole on the other side already."""
    keys: int = 0
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was asked for: ids, names to carry along, and a run."""

    ids: tuple[str, ...]
    names: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()


def run_outputs(result: dict[str, Any]) -> list[str]:
    """The artifacts that a run's `run.json` lists."""
    stages = dict(result.get("stages") or {}).values()
    return [str(out["id"]) for stage in stages for out in dict(stage.get("outputs") or {}).values()]


def pointer_outputs(pointer: Pointer | None) -> list[str]:
    """The artifacts that a key leads to."""
    return [str(id) for id in pointer.outputs.values()] if pointer else []


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
        value = json.loads(data or b"")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def parse_pointer(data: bytes | None) -> Pointer | None:
    """The pointer in the bytes of its file; None if it is none."""
    return Pointer.parse(json_object(data))


def remote_manifest(remote: Remote, id: str) -> Manifest | None:
    """The manifest of a committed artifact of the remote, None unless it is one and that of this id."""
    data = remote.read(remote.path(remote.layout.artifact(id) / NAME))
    try:
        manifest = Manifest.parse((data or b"").decode())
    except (BadManifest, UnicodeDecodeError):
        return None
    return manifest if content_id(manifest.type, manifest.files, manifest.type_version) == id else None
