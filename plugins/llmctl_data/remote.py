"""Files behind URLs: listed and sized through fsspec; datasets of the Hugging Face hub come from its cache.

A local path is part of a stage's key by its content; what lies at a URL is not: the user vouches that it stays as it
is, and the audit notes what the store behind it says of each file (ETag, checksum).
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from llmctl import InputError, MachineError

HUB = "hf://datasets/"
MAGIC = frozenset("*?[")


def expand(url: str) -> list[tuple[str, str, int]]:
    """(name, URL or path, bytes) of every file that a URL, a directory or a pattern means, sorted.

    InputError if there is none or it cannot be reached, MachineError without the driver.
    """
    if url.startswith(HUB):
        return expand_hub(url)
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        hint = "pip install 'llmctl[s3]'" if url.startswith(("s3:", "s3a:")) else "install the package that it names"
        raise MachineError(f"{url} needs a driver that is not installed: {error}", hint=hint) from error
    except ValueError as error:
        raise InputError(f"{url} is no address: {error}", hint="s3://BUCKET/PATTERN, https://…") from error
    try:
        found = files.glob(path, detail=True) if MAGIC & set(path) else files.find(path, detail=True)
        rows = [(name, facts) for name, facts in sorted(found.items()) if facts.get("type", "file") == "file"]
        if not rows and not MAGIC & set(path):
            rows = [(path, files.info(path))]  # https has no directories
    except Exception as error:  # every driver has errors of its own
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"cannot list {url}: {text}", hint="check the address, the connection, the credentials"
        ) from error
    if not rows:
        raise InputError(f"nothing matches {url}", hint="check the pattern; `**` crosses directories")
    base = _base(path)
    protocol = url.partition("://")[0]
    named = [
        (name, name if "://" in name else f"{protocol}://{name.lstrip('/') if protocol != 'file' else name}")
        for name, _ in rows
    ]
    return [
        (name.removeprefix(base).lstrip("/") or name.rpartition("/")[2], address, int(facts.get("size") or 0))
        for (name, address), (_, facts) in zip(named, rows, strict=True)
    ]


def _base(path: str) -> str:
    """What the names of a listing have in common: the directories before the first pattern."""
    parts = path.split("/")
    first = next((number for number, part in enumerate(parts) if MAGIC & set(part)), None)
    return path.rstrip("/") if first is None else "/".join(parts[:first])


def digest_of(url: str) -> str:
    """What the store behind a URL says of the file now: `etag:…` and the like, "" if it says nothing."""
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    try:
        facts: dict[str, Any] = files.info(path)
    except (OSError, ValueError):
        return ""
    for key in ("ETag", "etag", "sha256", "md5", "crc32c", "blob_id"):
        if facts.get(key):
            return f"{key.lower()}:{str(facts[key]).strip(chr(34))}"
    return ""


def expand_hub(url: str) -> list[tuple[str, str, int]]:
    """The files of `hf://datasets/ORG/NAME[@REVISION]/PATTERN`, fetched into the hub's own cache and read from there.

    With HF_HUB_OFFLINE only what is in the cache counts. `?stream` at the end reads them where they are instead.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise MachineError("hf:// needs huggingface_hub", hint="pip install 'llmctl[hub]'") from error
    address = url.removesuffix("?stream")
    parts = address.removeprefix(HUB).split("/", 2)
    if len(parts) < 2 or not all(parts[:2]):
        raise InputError(f"{url} names no dataset", hint="hf://datasets/ORG/NAME[@REVISION]/PATTERN")
    name, _, revision = parts[1].partition("@")
    pattern = parts[2].replace("**", "*") if len(parts) == 3 and parts[2] else "*"
    if url.endswith("?stream"):
        return expand_stream(address, parts[2] if len(parts) == 3 and parts[2] else "**")
    try:
        root = huggingface_hub.snapshot_download(
            f"{parts[0]}/{name}",
            repo_type="dataset",
            revision=revision or None,
            allow_patterns=[pattern.replace("**", "*")],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"cannot fetch {url}: {text}", hint="check the name, the revision and the connection"
        ) from error
    found = [path for path in sorted(Path(root).rglob("*")) if path.is_file() and not path.name.startswith(".")]
    names = [(path.relative_to(root).as_posix(), path) for path in found]
    chosen = [(name, path) for name, path in names if fnmatch.fnmatchcase(name, pattern)]
    chosen = [(name, path) for name, path in chosen if name not in ("README.md", "dataset_infos.json")]
    if not chosen:
        raise InputError(
            f"nothing matches {url}", hint=f"it has: {', '.join(name for name, _ in names[:8]) or 'no files'}"
        )
    return [(name, str(path), path.stat().st_size) for name, path in chosen]


def expand_stream(address: str, pattern: str) -> list[tuple[str, str, int]]:
    """The same files without the cache: read over the network, nothing is stored."""
    from huggingface_hub import HfFileSystem

    files = HfFileSystem()
    base = address.removesuffix(pattern).rstrip("/") if pattern != "**" else address.rstrip("/")
    try:
        found: Any = files.glob(f"{base}/{pattern}", detail=True)
    except Exception as error:  # the hub's client has errors of its own, and so has its connection
        raise InputError(f"cannot list {address}: {' '.join(str(error).split())}", hint="check the name") from error
    root = base.removeprefix("hf://")
    rows = [(name, facts) for name, facts in sorted(found.items()) if facts.get("type") == "file"]
    if not rows:
        raise InputError(f"nothing matches {address}", hint="check the pattern; `**` crosses directories")
    return [(name.removeprefix(root).lstrip("/"), f"hf://{name}", int(facts.get("size") or 0)) for name, facts in rows]
