"""`include`: files merged below the one that names them, in order, each with its own base for relative paths."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmctl.spec.files import display, document, home_path
from llmctl.spec.layers import long_forms, merge_maps, without
from llmctl.spec.nodes import Map, Node, Scalar, Sequence, fail

REMOTE = ("https://", "http://", "file://")
LONGEST_DOWNLOAD = 10 << 20
PATIENCE = 20.0
"""Seconds for a download."""
INCLUDED = ("vars", "secrets", "sources", "store", "defaults", "stages", "profiles", "next")
"""What an included file may hold; `llmctl` and `name` may stand there too and are not taken over."""


def with_includes(file: Map, place: Path | None) -> Map:
    """`file` on top of everything that it includes, without the key. Raises SpecError (E001 to E012, E101, E102).

    `place` is the absolute path of the file itself, for the detection of circles.
    """
    return _merged(file, (place,) if place else ())


def _merged(file: Map, open_: tuple[Path, ...]) -> Map:
    below: Map | None = None
    for item in _items(file):
        found, place = _read(item, open_)
        layer = without(_merged(found, (*open_, place) if place else open_), "llmctl", "name")
        below = layer if below is None else merge_maps(below, layer)
    own = long_forms(without(file, "include"))
    if below is None:
        return own
    merged = merge_maps(below, own)
    return Map(file.mark, merged.entries)  # mistakes of the whole are shown in the file that was asked for


def _items(file: Map) -> tuple[Node, ...]:
    node = file.get("include")
    if node is None:
        return ()
    return node.items if isinstance(node, Sequence) else (node,)


def _read(item: Node, open_: tuple[Path, ...]) -> tuple[Map, Path | None]:
    """The map of an included file, and its absolute path unless it was downloaded."""
    url, digest = _remote(item)
    if url is not None:
        return _checked(document(_download(url, digest), url.text, item.mark.text.base)), None
    if not isinstance(item, Scalar) or not isinstance(item.value, str):
        fail("E102", "`include` is a list of paths, or of {url: …, sha256: …}", item.mark)
    base = item.mark.text.base
    path = (base / home_path(item.text)).absolute()
    resolved = path.resolve()
    if resolved in [other.resolve() for other in open_]:
        names = [*(other.name for other in open_), path.name]
        fail("E010", f"files include each other: {' → '.join(names)}", item.mark)
    try:
        data = path.read_bytes()
    except OSError as error:
        problem = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        fail("E011", f"cannot include {item.text}: {problem}", item.mark, f"looked for {path}")
    return _checked(document(data, display(path), path.parent)), path


def _checked(found: Map) -> Map:
    """Refuse what only the file itself can say."""
    for key, entry in found.entries.items():
        if key not in (*INCLUDED, "include", "llmctl", "name"):
            fail("E101", f"`{key}` cannot stand in an included file", entry.key, f"it may hold {', '.join(INCLUDED)}")
    return found


def _remote(item: Node) -> tuple[Scalar | None, Scalar | None]:
    """The URL and the digest of `{url: …, sha256: …}`; a bare URL is refused, since what it holds may change."""
    if isinstance(item, Map):
        url, digest = item.get("url"), item.get("sha256")
        if set(item.entries) != {"url", "sha256"} or not isinstance(url, Scalar) or not isinstance(digest, Scalar):
            fail("E102", "an included URL is written {url: …, sha256: …}", item.mark)
        if not url.text.startswith(REMOTE):
            fail(
                "E102",
                f"`{url.text}` is no URL",
                url.mark,
                f"it begins with {' or '.join(REMOTE)}; a path stands alone",
            )
        return url, digest
    if isinstance(item, Scalar) and item.text.startswith(REMOTE):
        fail(
            "E102", f"`{item.text}` has no digest", item.mark, "write {url: …, sha256: …}: what a URL holds may change"
        )
    return None, None


def _download(url: Scalar, digest: Scalar | None) -> bytes:
    """The bytes behind a URL, whose sha256 must be `digest`."""
    from http.client import HTTPException
    from urllib.error import URLError
    from urllib.request import urlopen

    assert digest is not None
    try:
        with urlopen(url.text, timeout=PATIENCE) as answer:
            data: bytes = answer.read(LONGEST_DOWNLOAD + 1)
    except (URLError, HTTPException, OSError, ValueError) as error:
        fail("E011", f"cannot include {url.text}: {getattr(error, 'reason', error)}", url.mark)
    if len(data) > LONGEST_DOWNLOAD:
        fail("E011", f"{url.text} is larger than {LONGEST_DOWNLOAD >> 20} MiB", url.mark)
    found = hashlib.sha256(data).hexdigest()
    if found != digest.text.removeprefix("sha256:").lower():
        fail(
            "E011",
            f"{url.text} has changed: its sha256 is {found}",
            digest.mark,
            "look at it, then write the new digest",
        )
    return data
