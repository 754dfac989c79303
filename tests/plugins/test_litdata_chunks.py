"""Token shards and litdata's chunks: against files that litdata 0.2.44 wrote (benchmarks/peers/litdata_chunks.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from llmctl import InputError, UsageError
from llmctl.text.shards import ShardWriter, TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize import litdata_chunks, shard_formats
from llmctl_tokenize.commands import tokenizers

from .conftest import write_byte_tokenizer

WRITTEN = Path(__file__).parent / "litdata"
DOCUMENTS: list[list[int]] = json.loads((WRITTEN / "documents.json").read_text())


def shards(directory: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 300) -> TokenShards:
    with ShardWriter(directory, vocab_size=vocab_size, tokenizer="sha256:1", splits=["train", "test"]) as writer:
        for ids in documents:
            writer.add("train", ids, len(ids))
    return TokenShards.open(directory)


def read(directory: Path) -> list[list[int]]:
    found = []
    for ids, lengths in litdata_chunks.read_chunks(directory):
        found += [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    return found


@pytest.mark.parametrize("kind", ["int32", "uint16"])
def test_what_litdata_wrote_is_read(kind: str) -> None:
    assert read(WRITTEN / kind) == DOCUMENTS


def test_what_we_write_is_what_litdata_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litdata_chunks, "CHUNK_BYTES", 600)
    files = shard_formats.export_shards(shards(tmp_path / "tokens"), tmp_path / "out", "litdata")
    theirs = sorted(path for path in (WRITTEN / "int32").glob("*.bin"))
    assert [path.name for path in files if path.parent.name == "train"] == [
        *(path.name for path in theirs),
        "index.json",
    ]
    for path in theirs:
        assert (tmp_path / "out/train" / path.name).read_bytes() == path.read_bytes(), path.name
    ours, index = (json.loads((place / "index.json").read_text()) for place in (tmp_path / "out/train", path.parent))
    assert ours | {"updated_at": ""} == index | {"updated_at": ""}
    assert read(tmp_path / "out/test") == []


def test_there_and_back_by_the_commands(tmp_path: Path) -> None:
    held = write_byte_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(held)
    given = [[id % tokenizer.vocab_size for id in ids] for ids in DOCUMENTS]
    sizes = tokenizer.token_bytes()
    with ShardWriter(
        tmp_path / "tokens", vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.digest, splits=["train"]
    ) as writer:
        for ids in given:
            writer.add("train", ids, sum(sizes[id] for id in ids))
    run = CliRunner().invoke
    out = run(tokenizers, ["export-shards", str(tmp_path / "tokens"), str(tmp_path / "out"), "--format", "litdata"])
    assert out.exit_code == 0, out.output
    words = ["import-shards", f"train={tmp_path}/out/train", str(tmp_path / "back"), "--format", "litdata"]
    back = run(tokenizers, [*words, "--tokenizer", str(held)])
    assert back.exit_code == 0, back.output
    for path in (tmp_path / "tokens").iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def spoilt(tmp_path: Path, change: Any) -> Path:
    place = shutil.copytree(WRITTEN / "int32", tmp_path / "spoilt")
    change(place)
    return place


def index(place: Path, **config: Any) -> None:
    told = json.loads((place / "index.json").read_text())
    told["config"] |= config
    (place / "index.json").write_text(json.dumps(told))


def cut(place: Path) -> None:
    path = place / "chunk-0-2.bin"
    path.write_bytes(path.read_bytes()[:-4])


def negative(place: Path) -> None:
    path = place / "chunk-0-2.bin"
    path.write_bytes(path.read_bytes()[:-4] + b"\xff\xff\xff\xff")


def swapped(place: Path) -> None:
    (place / "chunk-0-2.bin").write_bytes((place / "chunk-0-1.bin").read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: (place / "index.json").unlink(), r"index\.json is missing"),
        (lambda place: (place / "index.json").write_text("{"), r"is no index of litdata's"),
        (lambda place: (place / "index.json").write_text('{"config": {}, "chunks": []}'), r"KeyError\('data_format'\)"),
        (lambda place: (place / "chunk-0-3.bin").unlink(), r"chunk-0-3\.bin is missing"),
        (lambda place: (place / "chunk-0-3.bin").write_bytes(b""), r"chunk-0-3\.bin is damaged: 0 bytes"),
        (cut, r"chunk-0-2\.bin is damaged: 544 bytes, 6 documents"),
        (negative, r"chunk-0-2\.bin holds -1, which is no id"),
        (swapped, r"chunk-0-2\.bin has 3 documents of 150 tokens, index\.json says 6 of 129"),
        (lambda place: index(place, compression="zstd"), "packed or encrypted"),
        (lambda place: index(place, item_loader="PyTreeLoader"), "for PyTreeLoader"),
        (lambda place: index(place, data_format=["no_header_tensor:1"]), "items of no_header_tensor:1"),
        (lambda place: index(place, data_format=["int", "int"]), "items of int, int"),
    ],
)
def test_what_is_damaged_or_no_tokens_is_named(tmp_path: Path, change: Any, message: str) -> None:
    place = spoilt(tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        read(place)
    assert caught.value.hint


def test_what_litdata_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = shards(tmp_path / "tokens", [[], [1, 2], []])
    shard_formats.export_shards(held, tmp_path / "out", "litdata")
    assert read(tmp_path / "out/train") == [[], [1, 2], []]
    with pytest.raises(UsageError, match="vocabulary has 4294967296"):
        litdata_chunks.write_chunks(held.split("train"), tmp_path / "x", 1 << 32)
