"""Where two directories of results differ, by name: a tensor, a number in JSON, a file. Free of numpy and torch."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CLOCKS = ("tokens_per_s", "utilisation", "peak_memory_bytes", "seconds")
"""Last parts of the names of numbers that two equal runs need not share."""
PARTS, INDEX = "rank-", "index.json"
"""How files of tensors begin of which every rank has written one, and what says beside them who has written what."""
MANIFEST = "llmctl.json"


def differences(first: Path, second: Path) -> Iterator[str]:
    """Every difference of two directory trees; tensors and JSON are looked into, other files compared by bytes."""
    names = [files(directory) for directory in (first, second)]
    parts = [{name for name in found if name.rpartition("/")[2].startswith(PARTS)} for found in names]
    for folder in sorted({name.rpartition("/")[0] for found in parts for name in found}):
        written = [
            sorted(directory / name for name in found if name.rpartition("/")[0] == folder)
            for directory, found in zip((first, second), parts, strict=True)
        ]
        yield from (f"{folder}: {what}" for what in tensor_differences(*written))
        names = [found - {f"{folder}/{INDEX}"} for found in names]
    for name in sorted((names[0] - parts[0]) | (names[1] - parts[1])):
        if name not in names[0] or name not in names[1]:
            yield f"{name} is there only {'after the stop' if name in names[1] else 'without a stop'}"
            continue
        a, b = first / name, second / name
        if name.endswith(".safetensors"):
            yield from (f"{name}: {what}" for what in tensor_differences([a], [b]))
        elif name.endswith((".json", ".jsonl")):
            yield from (f"{name}: {what}" for what in value_differences(values(a), values(b)))
        elif a.read_bytes() != b.read_bytes():
            yield f"{name}: its bytes"


def files(directory: Path) -> set[str]:
    """Names of all files below a directory, but for manifests, which say when something was made."""
    found = (path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(directory).as_posix() for path in found}


def values(path: Path) -> Any:
    """What a file of JSON, or of JSON lines, holds."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def value_differences(a: Any, b: Any, name: str = "") -> Iterator[str]:
    """Differences of two JSON values, as `curve.3.loss 1.5 is now 1.25`; those of clocks are none."""
    if isinstance(a, list) and isinstance(b, list):
        a, b = ({str(number): item for number, item in enumerate(items)} for items in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in CLOCKS:
                yield from value_differences(a.get(key), b.get(key), f"{name}.{key}" if name else str(key))
    elif a != b or type(a) is not type(b):
        yield f"{name or 'its value'} is {json.dumps(a)} without a stop, {json.dumps(b)} after it"


def header(data: mmap.mmap) -> tuple[dict[str, dict[str, Any]], int]:
    """The header of a safetensors file, and where its tensors begin."""
    length = int.from_bytes(data[:8], "little")
    found: dict[str, dict[str, Any]] = json.loads(data[8 : 8 + length])
    found.pop("__metadata__", None)
    return found, 8 + length


def tensor_differences(first: Sequence[Path], second: Sequence[Path]) -> Iterator[str]:
    """The tensors, or parts of them, of two sets of safetensors files that are not bit for bit the same."""
    a, b = hashed(first), hashed(second)
    for name in sorted(a | b):
        if name not in a or name not in b:
            yield f"{name} is there only {'after the stop' if name in b else 'without a stop'}"
        elif a[name][0] != b[name][0]:
            yield f"{name} has another shape or dtype"
        elif a[name] != b[name]:
            yield f"{name} has other bits"


def hashed(paths: Sequence[Path]) -> dict[str, tuple[str, str]]:
    """Kind and hash of every tensor, or part of one, in some files."""
    found = {}
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            entries, begin = header(data)
            for name, entry in entries.items():
                low, high = entry["data_offsets"]
                digest = hashlib.sha256(data[begin + low : begin + high]).hexdigest()
                found[name] = (f"{entry['dtype']} {entry['shape']}", digest)
    return found


def counted(directory: Path) -> tuple[int, int]:
    """Tensors in safetensors files, and files, below a directory."""
    tensors, names = 0, files(directory)
    for name in names:
        if name.endswith(".safetensors"):
            with (directory / name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                tensors += len(header(data)[0])
    return tensors, len(names)


def damage(directory: Path, start: str = "optimizer/") -> str:
    """Set one tensor of the newest checkpoint to zero, one called `start…` if there is any; returns its name.

    ValueError if no file below the directory holds any.
    """
    for path in sorted(directory.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
            found, begin = header(data)
            floats = [name for name, entry in found.items() if entry["dtype"] in ("F32", "BF16", "F64")]
            if not floats:
                continue
            name = next((name for name in floats if name.startswith(start)), floats[0])
            low, high = found[name]["data_offsets"]
            data[begin + low : begin + high] = bytes(high - low)
            return name
    raise ValueError("no tensors")
