"""The header of a safetensors file, read without the library: shapes, dtypes, and whether the file is whole."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per value; https://github.com/huggingface/safetensors#format. Sub-byte types have none and are not checked."""
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """One tensor of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a file. Raises ValueError if the header is damaged or the data does not fill the file exactly."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it is too short")
        (length,) = struct.unpack("<Q", start)
        if length > min(LARGEST_HEADER, size - 8):
            raise ValueError("its header is damaged")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise ValueError("its header is damaged") from None
    try:
        header = {name: row for name, row in header.items() if name != "__metadata__"}
        tensors = [Tensor(name, str(row["dtype"]), tuple(row["shape"])) for name, row in header.items()]
        spans = sorted((row["data_offsets"][0], row["data_offsets"][1], name) for name, row in header.items())
    except (AttributeError, KeyError, TypeError, IndexError):
        raise ValueError("its header is damaged") from None
    _check_spans(spans, {tensor.name: tensor for tensor in tensors}, size - 8 - length)
    return tensors


def _check_spans(spans: list[tuple[int, int, str]], tensors: dict[str, Tensor], data: int) -> None:
    """The tensors lie one after the other, each as long as its shape says, and fill the data exactly."""
    position = 0
    for begin, end, name in spans:
        tensor = tensors[name]
        width = SIZES.get(tensor.dtype)
        if begin != position or (width and end - begin != tensor.values * width):
            raise ValueError(f"tensor `{name}` has wrong offsets")
        position = end
    if position != data:
        raise ValueError(f"it holds {data} bytes of tensors, its header says {position}")
