"""Token shards as nanoGPT's, Megatron's and litdata's flat binaries, and those as token shards.

Megatron's index (`megatron/core/datasets/indexed_dataset.py`): `MMIDIDX\\0\\0`, version 1 (uint64), code of the dtype
(uint8), number of sequences and of document bounds (uint64), lengths (int32) and byte pointers (int64) of the
sequences, document bounds (int64). nanoGPT: nothing but uint16 ids, which says nothing about documents. litdata's are
in `litdata_chunks`.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmctl import InputError, UsageError
from llmctl.text.shards import Encoded, ShardWriter, SplitTokens, TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize import litdata_chunks

MAGIC = b"MMIDIDX\x00\x00"
CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
SPLIT_FILES = {"train": "train.bin", "validation": "val.bin"}
PART = 1 << 22
"""Tokens or documents that are copied together."""


def export_shards(shards: TokenShards, directory: Path, format: str) -> list[Path]:
    """Write every split and return the files.

    UsageError if the format cannot hold the ids or gives two splits one name, InputError if a file is there already;
    then nothing is written.
    """
    places = [place for name in shards.splits for place in _places(name, format)]
    if twice := next((place for place in places if places.count(place) > 1), None):
        owners = [name for name in shards.splits if twice in _places(name, format)]
        raise UsageError(f"the splits {' and '.join(owners)} would both be {twice}", hint="export them as megatron")
    if there := next((directory / place for place in places if (directory / place).exists()), None):
        raise InputError(f"{there} exists", hint="give a new directory")
    made = next((path for path in reversed([directory, *directory.parents]) if not path.exists()), None)
    directory.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".export-", dir=directory))
    try:
        written = [path for name in shards.splits for path in _export(shards, shards.split(name), part, format)]
        for place in places:
            (part / place).rename(directory / place)
        part.rmdir()
    except BaseException:  # an interrupt leaves nothing half-written either
        shutil.rmtree(made or part, ignore_errors=True)
        raise
    return [directory / path.relative_to(part) for path in written]


def _places(split: str, format: str) -> list[str]:
    """What a split becomes in the directory: files, or a folder of litdata's chunks."""
    if format == "nanogpt":
        return [SPLIT_FILES.get(split, f"{split}.bin")]
    return [split] if format == "litdata" else [f"{split}.bin", f"{split}.idx"]


def _export(shards: TokenShards, split: SplitTokens, directory: Path, format: str) -> list[Path]:
    if format == "nanogpt":
        return [_to_nanogpt(shards, split, directory)]
    if format == "litdata":
        return litdata_chunks.write_chunks(split, directory / split.name, shards.vocab_size)
    return _to_megatron(shards, split, directory)


def _to_nanogpt(shards: TokenShards, split: SplitTokens, directory: Path) -> Path:
    if shards.vocab_size > 65536:
        said = f"nanoGPT's files have 16 bits per token, the vocabulary has {shards.vocab_size} tokens"
        raise UsageError(said, hint="export them as megatron")
    (name,) = _places(split.name, "nanogpt")
    path = directory / name
    _copy(split, path, np.dtype("<u2"))
    return path


def _to_megatron(shards: TokenShards, split: SplitTokens, directory: Path) -> list[Path]:
    code = 8 if shards.vocab_size < 65500 else 4  # as Megatron chooses
    dtype = np.dtype(CODES[code])
    data, index = (directory / place for place in _places(split.name, "megatron"))
    _copy(split, data, dtype)
    count = len(split)
    with index.open("wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", 1, code, count, count + 1))
        for lengths in _parts(np.diff, split.offsets):
            if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
                raise UsageError("a document has more than 2^31 tokens, which Megatron's index cannot say")
            file.write(lengths.astype("<i4").tobytes())
        for start in range(0, count, PART):
            file.write(
                (split.offsets[start : min(start + PART, count)] * np.uint64(dtype.itemsize)).astype("<i8").tobytes()
            )
        for start in range(0, count + 1, PART):
            file.write(np.arange(start, min(start + PART, count + 1), dtype="<i8").tobytes())
    return [data, index]


def _parts(of: Any, offsets: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(offsets) - 1, PART):
        yield of(offsets[start : start + PART + 1])


def _copy(split: SplitTokens, path: Path, dtype: np.dtype[Any]) -> None:
    with path.open("wb") as file:
        for start in range(0, int(split.offsets[-1]), PART):
            file.write(split.tokens[start : start + PART].astype(dtype).tobytes())


def import_shards(sources: dict[str, Path], directory: Path, tokenizer: Tokenizer, format: str) -> TokenShards:
    """Token shards of the files of each split. A nanoGPT file is cut into documents after EOS, where there is one.

    The bytes of text, which such files do not tell, are counted from the tokens. InputError for a directory that holds
    something, for damaged files and for ids that the tokenizer does not have; then nothing is left behind.
    """
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory} is not empty", hint="give a new directory")
    try:
        _write_shards(sources, directory, tokenizer, format)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return TokenShards.open(directory)


def _write_shards(sources: dict[str, Path], directory: Path, tokenizer: Tokenizer, format: str) -> None:
    sizes = np.asarray(tokenizer.token_bytes(), np.int64)
    writer = ShardWriter(directory, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.digest, splits=list(sources))
    with writer:
        for name, path in sources.items():
            for ids, lengths in _parts_of(path, tokenizer, format):
                if len(ids) and ids.max() >= tokenizer.vocab_size:
                    raise InputError(
                        f"{path}: id {ids.max()} is not in the tokenizer's {tokenizer.vocab_size}",
                        hint="give the tokenizer that the file was written with",
                    )
                writer.add_encoded(name, Encoded(ids, lengths, int(sizes[ids].sum())))


def _parts_of(path: Path, tokenizer: Tokenizer, format: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, lengths of the documents) of a file or a directory, part by part."""
    if format == "litdata":
        return litdata_chunks.read_chunks(path)
    return _from_nanogpt(path, tokenizer.eos_id) if format == "nanogpt" else _from_megatron(path)


def _from_nanogpt(path: Path, eos: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    tokens = _mapped(path, np.dtype("<u2"))
    at = 0
    while at < len(tokens):
        end = min(at + PART, len(tokens))
        ends = np.flatnonzero(tokens[at:end] == eos) + 1 if eos is not None else np.empty(0, np.int64)
        while end < len(tokens) and not len(ends):  # one document longer than a part
            end = min(end + PART, len(tokens))
            ends = np.flatnonzero(tokens[at:end] == eos) + 1 if eos is not None else ends
        if end == len(tokens) and (not len(ends) or ends[-1] < end - at):
            ends = np.append(ends, end - at)
        yield np.asarray(tokens[at : at + int(ends[-1])]), np.diff(ends, prepend=0)
        at += int(ends[-1])


def _from_megatron(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    stem = path.with_suffix("")
    dtype, lengths, bounds = read_index(stem.with_suffix(".idx"))
    if dtype.kind == "f":
        raise InputError(f"{stem}.idx says that the tokens are {dtype.name}", hint="give a file of token ids")
    tokens = _mapped(stem.with_suffix(".bin"), dtype)
    total = int(lengths.sum(dtype=np.int64))
    if len(tokens) != total:
        raise InputError(f"{stem}.bin has {len(tokens)} tokens, its index says {total}")
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[bounds]
    for start in range(0, len(offsets) - 1, 1 << 16):
        cut = offsets[start : start + (1 << 16) + 1]
        values = np.asarray(tokens[int(cut[0]) : int(cut[-1])])
        if len(values) and values.min() < 0:
            raise InputError(f"{stem}.bin holds {values.min()}, which is no id")
        yield values.astype(np.uint32), np.diff(cut)


def read_index(path: Path) -> tuple[np.dtype[Any], np.ndarray, np.ndarray]:
    """(dtype, lengths of the sequences, bounds of the documents in sequences) of a Megatron index."""
    if not path.is_file():
        raise InputError(f"{path} is missing", hint="Megatron's data are a .bin and an .idx of the same name")
    raw = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    head = bytes(raw[:34])
    if len(head) < 34 or head[:9] != MAGIC:
        raise InputError(f"{path} is no index of Megatron's", hint="give the .idx of an indexed dataset")
    version, code, sequences, bounds = struct.unpack("<QBQQ", head[9:])
    if version != 1 or code not in CODES or len(raw) < 34 + 12 * sequences + 8 * bounds:
        raise InputError(f"{path} is damaged: version {version}, type {code}, {sequences} sequences")
    lengths = np.frombuffer(raw, "<i4", sequences, 34)
    return np.dtype(CODES[code]), lengths, np.frombuffer(raw, "<i8", bounds, 34 + 12 * sequences)


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise InputError(f"{path} has {size} bytes, which is no number of {dtype.name} values")
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)


def check_shards(shards: TokenShards, tokenizer: Tokenizer | None) -> list[str]:
    """What is wrong with token shards, one line each; opening a split checks sizes and offsets."""
    faults = []
    if tokenizer is not None and tokenizer.digest != shards.tokenizer:
        faults.append(f"meta.json names the tokenizer {shards.tokenizer}, this one is {tokenizer.digest}")
    if tokenizer is not None and tokenizer.vocab_size != shards.vocab_size:
        faults.append(f"meta.json has a vocabulary of {shards.vocab_size}, the tokenizer one of {tokenizer.vocab_size}")
    for name in shards.splits:
        try:
            split = shards.split(name)
        except InputError as error:
            faults.append(error.message)
            continue
        counted = np.zeros(shards.vocab_size, np.int64)
        for start in range(0, int(split.offsets[-1]), PART):
            ids = np.asarray(split.tokens[start : start + PART])
            if wrong := int((ids >= shards.vocab_size).sum()):
                first = start + int(np.argmax(ids >= shards.vocab_size))
                faults.append(f"{name}: {wrong} ids are not below {shards.vocab_size}, the first at token {first}")
            elif tokenizer is not None and len(counted) == tokenizer.vocab_size:
                counted += np.bincount(ids, minlength=len(counted))
        faults += _check_text(name, split, counted, tokenizer)
    return faults


def _check_text(name: str, split: SplitTokens, counted: np.ndarray, tokenizer: Tokenizer | None) -> list[str]:
    """A tokenizer of bytes loses none: the bytes of the tokens must be those of the text."""
    if tokenizer is None or not tokenizer.byte_level or tokenizer.normalizes or not counted.any():
        return []
    stand_for = int(counted @ np.asarray(tokenizer.token_bytes(), np.int64))
    return [] if stand_for == split.bytes else [f"{name}: tokens of {stand_for} bytes, meta.json says {split.bytes}"]
