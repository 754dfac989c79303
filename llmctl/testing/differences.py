"""Where two trainings differ: in which tensor of their checkpoints, in which number, in which file.

Reads safetensors by their format alone, so that nothing here needs torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ORDER = ("model", "optimizer", "mean", "random")
"""Parts of a checkpoint, the most telling first."""
FORMATS = {"F64": "d", "F32": "f", "I64": "q", "I32": "i", "U8": "B", "I8": "b", "BOOL": "?"}
MEASURED = ("tokens_per_s", "peak_memory_bytes", "utilisation")
"""Numbers of speed and memory are another every time."""


@dataclass(frozen=True)
class Difference:
    """One place, and what the first and the second have there."""

    place: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.place}: {self.first} and {self.second}"


def checkpoint_differences(first: Path, second: Path) -> tuple[list[Difference], int]:
    """Differences of two checkpoints of one process, tensors before numbers; and how many tensors there are."""
    a, b = stored(first), stored(second)
    names = sorted(a.keys() | b.keys(), key=lambda name: (ORDER.index(name.partition("/")[0]), name))
    found = [one for name in names if (one := _tensor(name, a.get(name), b.get(name))) is not None]
    values = [json.loads((path / "values.json").read_text(encoding="utf-8")) for path in (first, second)]
    return [*found, *_values("", *values)], len(names)


def stored(checkpoint: Path) -> dict[str, tuple[str, bytes]]:
    """dtype and bytes of every tensor."""
    found: dict[str, tuple[str, bytes]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + size])
        for name, row in header.items():
            if name != "__metadata__":
                begin, end = row["data_offsets"]
                found[name] = row["dtype"], data[8 + size + begin : 8 + size + end]
    return found


def _tensor(name: str, a: tuple[str, bytes] | None, b: tuple[str, bytes] | None) -> Difference | None:
    if a == b:
        return None
    if a is None or b is None or a[0] != b[0] or len(a[1]) != len(b[1]):
        described = ["nothing" if one is None else f"{len(one[1])} bytes of {one[0]}" for one in (a, b)]
        return Difference(name, *described)
    letter = FORMATS.get(a[0], "H" if a[0] in ("BF16", "F16") else "B")
    width = struct.calcsize(letter)
    at = next(i for i in range(0, len(a[1]), width) if a[1][i : i + width] != b[1][i : i + width])
    numbers = [f"{struct.unpack_from('<' + letter, one[1], at)[0]!r}" for one in (a, b)]
    return Difference(f"{name}, element {at // width} of {len(a[1]) // width}", *numbers)


def _values(place: str, a: Any, b: Any) -> Iterator[Difference]:
    """Differing leaves of two JSON values, speed aside."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in sorted(a.keys() | b.keys()):
            if name not in MEASURED:
                yield from _values(f"{place}.{name}" if place else name, a.get(name), b.get(name))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _values(f"{place}[{number}]", one, other)
    elif repr(a) != repr(b):  # NaN is itself
        yield Difference(place, repr(a)[:60], repr(b)[:60])


def file_differences(first: Path, second: Path) -> Iterator[Difference]:
    """Files of two directories that are not the same bytes; those of `metrics`, which hold speed, as values."""
    names = sorted(
        {str(path.relative_to(root)) for root in (first, second) for path in root.rglob("*") if path.is_file()}
    )
    for name in names:
        texts = [path.read_bytes() if (path := root / name).is_file() else None for root in (first, second)]
        if texts[0] == texts[1]:
            continue
        if None in texts or not name.startswith("metrics/"):
            yield Difference(f"the file {name}", *("nothing" if one is None else f"{len(one)} bytes" for one in texts))
            continue
        rows = [_parsed(one) for one in texts if one is not None]
        yield from (Difference(f"{name}: {one.place}", one.first, one.second) for one in _values("", *rows))


def _parsed(text: bytes) -> Any:
    """JSON, or a list of its lines."""
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]
