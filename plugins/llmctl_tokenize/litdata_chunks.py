"""Token shards as litdata's chunks for its `TokensLoader` (what litgpt trains on), and those as token shards.

A directory for each split: `index.json` and chunks of `uint32 n`, `uint32[n + 1]` places of the items in the file, and
their ids one after the other (litdata 0.2.44, `streaming/writer.py`). An item is a document; a chunk is closed before
the item that would make it larger than `CHUNK_BYTES`. The index names the type of the ids by litdata's own numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmctl import InputError, UsageError
from llmctl.text.shards import SplitTokens

INDEX = "index.json"
CHUNK_BYTES = 64_000_000
LOADER = "TokensLoader"
WRITTEN = "no_header_tensor:16"
"""int32 tensors, as litgpt writes them."""
LEAF = '[1, {"type": null, "context": null, "children_spec": []}]'
"""torch's description of an item that is one tensor."""
TENSORS = {11: "<u1", 12: "<i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8"}
ARRAYS = {0: "<i1", 1: "<i2", 2: "<i4", 3: "<i8", 4: "<u1", 5: "<u2", 6: "<u4", 7: "<u8"}
KINDS = {"no_header_tensor": TENSORS, "no_header_numpy": ARRAYS}
PART = 1 << 22
"""Tokens that are copied together."""
WAY_OUT = "write it with litdata.optimize(…, item_loader=TokensLoader()), without compression"


def write_chunks(split: SplitTokens, directory: Path, vocab_size: int) -> list[Path]:
    """Write one split into `directory` and return the files. UsageError for what litdata cannot hold."""
    if vocab_size > 1 << 31:
        raise UsageError(f"litdata's tokens are int32, the vocabulary has {vocab_size} tokens")
    directory.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    told: list[dict[str, Any]] = []
    for start, end in _cuts(split.offsets):
        path = directory / f"chunk-0-{len(files)}.bin"
        _write_chunk(split, start, end, path)
        tokens = int(split.offsets[end]) - int(split.offsets[start])
        size = path.stat().st_size
        told.append({"chunk_bytes": size, "chunk_size": end - start, "dim": tokens, "filename": path.name})
        files.append(path)
    config = {
        "chunk_bytes": CHUNK_BYTES,
        "chunk_size": None,
        "compression": None,
        "data_format": [WRITTEN],
        "data_spec": LEAF,
        "encryption": None,
        "item_loader": LOADER,
    }
    # litdata puts the time here; equal shards give equal files.
    text = json.dumps({"chunks": told, "config": config, "updated_at": "0"}, sort_keys=True)
    (directory / INDEX).write_text(text, encoding="utf-8")
    return [*files, directory / INDEX]


def _cuts(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first document, one past the last) of every chunk."""
    start = 0
    while start < len(offsets) - 1:
        last = np.uint64(int(offsets[start]) + CHUNK_BYTES // 4)
        end = max(int(np.searchsorted(offsets, last, "right")) - 1, start + 1)
        yield start, end
        start = end


def _write_chunk(split: SplitTokens, start: int, end: int, path: Path) -> None:
    offsets = np.asarray(split.offsets[start : end + 1], np.int64)
    places = (offsets - offsets[0]) * 4 + 4 * (len(offsets) + 1)
    if places[-1] >= 1 << 32:
        raise UsageError(
            f"document {start} of `{split.name}` has {offsets[1] - offsets[0]:,} tokens, litdata's chunks hold 2^30",
            hint="cut the documents shorter",
        )
    with path.open("wb") as file:
        file.write(np.uint32(end - start).tobytes() + places.astype("<u4").tobytes())
        for at in range(int(offsets[0]), int(offsets[-1]), PART):
            file.write(split.tokens[at : min(at + PART, int(offsets[-1]))].astype("<i4").tobytes())


def read_chunks(directory: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, lengths of the documents) of every chunk. InputError names the file that is damaged or holds no ids."""
    told, dtype = _index(directory)
    for chunk in told:
        path = directory / str(chunk["filename"])
        ids, lengths = _chunk(path, dtype)
        # Where the first document of a chunk is empty, litdata notes no number of tokens.
        if len(lengths) != chunk["chunk_size"] or chunk["dim"] not in (None, len(ids)):
            raise InputError(
                f"{path} has {len(lengths)} documents of {len(ids)} tokens, {INDEX} says {chunk['chunk_size']} of "
                f"{chunk['dim']}",
                hint="copy the directory again",
            )
        yield ids, lengths


def _index(directory: Path) -> tuple[list[dict[str, Any]], np.dtype[Any]]:
    """The chunks that the index names, and the type of the ids."""
    path = directory / INDEX
    if not path.is_file():
        raise InputError(f"{path} is missing", hint="give the directory that litdata wrote")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        config, chunks = told["config"], list(told["chunks"])
        formats = list(config["data_format"])
        if missing := next(
            (name for name in ("filename", "chunk_size", "dim") for one in chunks if name not in one), ""
        ):
            raise KeyError(missing)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no index of litdata's: {error!r}", hint="copy the directory again") from error
    kind, _, number = str(formats[0]).partition(":") if len(formats) == 1 else ("", "", "")
    code = KINDS.get(kind, {}).get(int(number) if number.isdigit() else -1)
    if config.get("item_loader") != LOADER or code is None:
        raise InputError(
            f"{path}: items of {', '.join(map(str, formats))} for {config.get('item_loader')}", hint=WAY_OUT
        )
    if config.get("compression") or config.get("encryption"):
        raise InputError(f"{path}: the chunks are packed or encrypted", hint=WAY_OUT)
    return chunks, np.dtype(code)


def _chunk(path: Path, dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and lengths of one chunk."""
    if not path.is_file():
        raise InputError(f"{path} is missing", hint="copy the directory again")
    raw = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    count = int(np.frombuffer(raw[:4], "<u4")[0]) if len(raw) >= 4 else 0
    head = 4 * (count + 2)
    places = np.frombuffer(raw[4:head], "<u4").astype(np.int64) if count and len(raw) >= head else np.empty(0, np.int64)
    sizes = np.diff(places)
    whole = len(places) and places[0] == head and places[-1] == len(raw) and (sizes >= 0).all()
    if not whole or (sizes % dtype.itemsize).any():
        raise InputError(f"{path} is damaged: {len(raw)} bytes, {count} documents", hint="copy the directory again")
    ids = np.frombuffer(raw[head:], dtype)
    if len(ids) and (ids.min() < 0 or ids.max() >= 1 << 32):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise InputError(f"{path} holds {wrong}, which is no id", hint="give a directory of token ids")
    return ids.astype(np.uint32), sizes // dtype.itemsize
