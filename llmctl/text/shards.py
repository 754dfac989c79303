"""Token shards: one flat array of ids per split, memory-mapped, with the offsets of its documents."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmctl.errors import InputError
from llmctl.stage import Artifact
from llmctl.text.remote_files import Remote, RemoteValues

FORMAT = "dataset.tokens"
OFFSET = np.dtype("<u8")
OFFSETS = 1 << 20
"""Offsets that are looked at together."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id: uint16, or uint32 for a vocabulary above 65535."""
    return np.dtype("<u2" if vocab_size <= 65535 else "<u4")


@dataclass(frozen=True)
class SplitTokens:
    """The documents of one split. `tokens` is a read-only memory map, shape `(n_tokens,)`, or reads slices from afar;
    `offsets` is uint64, shape `(n_documents + 1,)`: document `i` is `tokens[offsets[i]:offsets[i + 1]]`."""

    name: str
    tokens: np.ndarray | RemoteValues
    offsets: np.ndarray
    bytes: int
    """UTF-8 bytes of the source text of all documents."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, BOS and EOS included."""
        return self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1])]


class TokenShards:
    """An opened `dataset.tokens` directory.

    If its `meta.json` has a `url`, the other files are read from there; what they hold is taken on trust.
    """

    def __init__(self, directory: Path, meta: dict[str, Any]) -> None:
        self.directory = directory
        self.meta = meta
        self.vocab_size: int = meta["vocab_size"]
        self.tokenizer: str = meta["tokenizer"]

    @classmethod
    def open(cls, source: Artifact | Path | str) -> TokenShards:
        """Open shards; InputError if they are missing or damaged."""
        directory = source.path if isinstance(source, Artifact) else Path(source)
        path = directory / "meta.json"
        if not path.is_file():
            raise InputError(f"{directory} holds no token shards", hint="make them with `llmctl tokenize`")
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is no valid JSON: {error}", hint="make the tokens again") from error
        missing = {"dtype", "vocab_size", "tokenizer", "splits"} - set(meta) if isinstance(meta, dict) else {"dtype"}
        if missing:
            raise InputError(f"{path} lacks {', '.join(sorted(missing))}", hint="make the tokens again")
        return cls(directory, meta)

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self.meta["splits"])

    def split(self, name: str) -> SplitTokens:
        """Open one split; InputError if it is missing, or its files do not fit what `meta.json` says."""
        if name not in self.meta["splits"]:
            raise InputError(f"{self.directory} has no split `{name}`", hint=f"it has: {', '.join(self.splits)}")
        entry = self.meta["splits"][name]
        stem = self.directory / f"{name}-00000"
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        if url := self.meta.get("url"):
            return _remote_split(f"{url}/{name}-00000", name, dtype, entry)
        tokens = _map(stem.with_suffix(".bin"), dtype, entry["tokens"])
        offsets = _map(stem.with_suffix(".idx"), OFFSET, entry["documents"] + 1)
        if not _rise(offsets, len(tokens)):
            raise InputError(f"{stem.with_suffix('.idx')} is damaged: offsets do not rise from 0 to {len(tokens)}")
        return SplitTokens(name, tokens, offsets, entry["bytes"])


def _remote_split(stem: str, name: str, dtype: np.dtype[Any], entry: dict[str, Any]) -> SplitTokens:
    """A split at a URL: its offsets are fetched, its tokens when they are read."""
    offsets = np.frombuffer(Remote(f"{stem}.idx").read(0, OFFSET.itemsize * (entry["documents"] + 1)), OFFSET)
    if not _rise(offsets, entry["tokens"]):
        raise InputError(f"{stem}.idx is damaged: offsets do not rise from 0 to {entry['tokens']}")
    tokens = RemoteValues(f"{stem}.bin", dtype, entry["tokens"]) if entry["tokens"] else np.empty(0, dtype)
    return SplitTokens(name, tokens, offsets, entry["bytes"])


def _rise(offsets: np.ndarray, last: int) -> bool:
    """Whether offsets go from 0 to `last` and never fall; a part of them at a time."""
    parts = (offsets[start : start + OFFSETS + 1] for start in range(0, len(offsets), OFFSETS))
    return offsets[0] == 0 and offsets[-1] == last and not any(np.any(part[1:] < part[:-1]) for part in parts)


def _map(path: Path, dtype: np.dtype[Any], count: int) -> np.ndarray:
    """`count` values of a file as a read-only map; InputError if it holds another number of bytes."""
    if not path.is_file():
        raise InputError(f"{path} is missing", hint="make the tokens again")
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise InputError(
            f"{path} has {size} bytes, expected {count * dtype.itemsize}", hint="it is damaged; make the tokens again"
        )
    if count == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r", shape=(count,))


Counts = dict[str, int]
"""`documents`, `tokens` (BOS and EOS included) and `bytes` of text."""


MOST_SOURCES = 1000
"""Sources of a split that are counted by name, so that `meta.json` does not grow with the documents."""
OTHER = "other"
"""Where the sources beyond are counted together."""


@dataclass(frozen=True)
class Encoded:
    """Documents as they go into shards: `ids` one after the other, shape `(sum(lengths),)`, BOS and EOS included."""

    ids: np.ndarray
    lengths: np.ndarray
    """Tokens of each document, int64."""
    bytes: int
    """UTF-8 bytes of text that they stand for."""
    sources: Mapping[str, Counts] = field(default_factory=dict)
    """What there is of each source, for documents whose source is known."""


@dataclass
class _Open:
    tokens: BinaryIO
    index: BinaryIO
    count: int = 0
    documents: int = 0
    bytes: int = 0
    files: list[str] = field(default_factory=list)
    sources: dict[str, Counts] = field(default_factory=dict)

    def count_source(self, name: str, more: Counts) -> None:
        """Add to a source. In the order of documents, so that the same names are kept whatever the batches were."""
        if name not in self.sources and len(self.sources.keys() - {OTHER}) >= MOST_SOURCES:
            name = OTHER
        known = self.sources.setdefault(name, dict.fromkeys(more, 0))
        for what, count in more.items():
            known[what] += count

    def entry(self) -> dict[str, Any]:
        """What `meta.json` says of it; nothing of sources where none is known, as after an import."""
        known = {"sources": self.sources} if self.sources else {}
        counts = {"tokens": self.count, "documents": self.documents, "bytes": self.bytes}
        return {**counts, "files": self.files, **known}


class ShardWriter:
    """Writes token shards document by document; memory does not grow. Use as a context manager or call `close`.

    Every split in `splits` exists when closed, empty if nothing was added to it. `resume` is the `meta.json` of a
    `checkpoint` in the same directory: what was written after it is cut off, and writing goes on from there.
    """

    def __init__(
        self,
        directory: Path,
        *,
        vocab_size: int,
        tokenizer: str,
        splits: Sequence[str] = (),
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._vocab_size, self._tokenizer = directory, vocab_size, tokenizer
        self._dtype = token_dtype(vocab_size)
        self._splits: dict[str, _Open] = {}
        for split in splits:
            self._open(split, (resume or {}).get("splits", {}).get(split))

    def _open(self, split: str, entry: Mapping[str, Any] | None = None) -> _Open:
        names = [f"{split}-00000.bin", f"{split}-00000.idx"]
        if entry and (reopened := self._reopen(names, entry)):
            self._splits[split] = reopened
            return reopened
        tokens, index = ((self._directory / name).open("wb") for name in names)
        index.write(np.zeros(1, OFFSET).tobytes())
        self._splits[split] = _Open(tokens, index, files=names)
        return self._splits[split]

    def _reopen(self, names: list[str], entry: Mapping[str, Any]) -> _Open | None:
        """The files of a checkpoint, cut to what it vouches for; None if they hold less."""
        sizes = (entry["tokens"] * self._dtype.itemsize, (entry["documents"] + 1) * OFFSET.itemsize)
        paths = [self._directory / name for name in names]
        if any(not path.is_file() or path.stat().st_size < size for path, size in zip(paths, sizes, strict=True)):
            return None
        files = [path.open("r+b") for path in paths]
        for file, size in zip(files, sizes, strict=True):
            file.truncate(size)
            file.seek(size)
        sources = {name: dict(counts) for name, counts in entry.get("sources", {}).items()}
        return _Open(files[0], files[1], entry["tokens"], entry["documents"], entry["bytes"], names, sources)

    def documents(self, split: str) -> int:
        """How many documents `split` has so far."""
        return self._splits[split].documents if split in self._splits else 0

    def add(self, split: str, ids: Sequence[int], bytes: int) -> None:
        """Append a document of `ids` (below `vocab_size`, BOS and EOS included) that stands for `bytes` of text."""
        values = np.asarray(ids, dtype=np.int64)
        self.add_encoded(split, Encoded(values, np.array([len(values)]), bytes))

    def add_encoded(self, split: str, documents: Encoded) -> None:
        """Append several documents; ValueError if an id is not below `vocab_size`."""
        values = documents.ids
        if len(values) and not 0 <= values.min() <= values.max() < self._vocab_size:
            raise ValueError(f"token id {values.max()} in a vocabulary of {self._vocab_size}")
        part = self._splits.get(split) or self._open(split)
        part.tokens.write(values.astype(self._dtype, copy=False).tobytes())
        part.index.write((part.count + np.cumsum(documents.lengths)).astype(OFFSET).tobytes())
        part.count += len(values)
        part.documents += len(documents.lengths)
        part.bytes += documents.bytes
        for name, counts in documents.sources.items():
            part.count_source(name, counts)

    def checkpoint(self) -> None:
        """Bring all that was added to disk, then write `meta.json`: a writer with `resume` goes on from here."""
        for part in self._splits.values():
            for file in (part.tokens, part.index):
                file.flush()
                os.fsync(file.fileno())
        self._write_meta()

    def meta(self) -> dict[str, Any]:
        """What `meta.json` says, for the documents added so far."""
        return {
            "format": FORMAT,
            "dtype": self._dtype.newbyteorder("=").name,
            "vocab_size": self._vocab_size,
            "tokenizer": self._tokenizer,
            "splits": {name: part.entry() for name, part in self._splits.items()},
        }

    def close(self) -> None:
        """Close the files and write `meta.json`."""
        self._release()
        self._write_meta()

    def _write_meta(self) -> None:
        text = json.dumps(self.meta(), indent=2, sort_keys=True) + "\n"
        part = self._directory / ".meta.json.part"
        part.write_text(text, encoding="utf-8")
        part.replace(self._directory / "meta.json")

    def _release(self) -> None:
        for part in self._splits.values():
            part.tokens.close()
            part.index.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._release()
