"""Token shards: raw little-endian ids that numpy reads alone, and damage that is noticed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import InputError
from llmctl.text.shards import ShardWriter, TokenShards


def write(directory, documents, vocab_size=1000):
    with ShardWriter(directory, vocab_size=vocab_size, tokenizer="sha256:x", splits=["train", "validation"]) as writer:
        for ids in documents:
            writer.add("train", ids, bytes=3)
    return directory


@settings(max_examples=30)
@given(documents=st.lists(st.lists(st.integers(0, 69999), max_size=8), max_size=8), wide=st.booleans())
def test_documents_come_back(tmp_path_factory, documents, wide):
    vocab = 70000 if wide else 65535
    documents = [[i % vocab for i in ids] for ids in documents]
    shards = TokenShards.open(write(tmp_path_factory.mktemp("shards"), documents, vocab))
    train = shards.split("train")
    assert train.tokens.dtype == (np.uint32 if wide else np.uint16)
    assert len(train) == len(documents) and train.bytes == 3 * len(documents)
    assert [train.document(i).tolist() for i in range(len(train))] == documents
    assert len(shards.split("validation")) == 0


def test_files_are_what_numpy_reads(tmp_path):
    write(tmp_path, [[1, 2, 3], [], [4]])
    assert np.fromfile(tmp_path / "train-00000.bin", "<u2").tolist() == [1, 2, 3, 4]
    assert np.fromfile(tmp_path / "train-00000.idx", "<u8").tolist() == [0, 3, 3, 4]
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta == {
        "format": "dataset.tokens",
        "dtype": "uint16",
        "vocab_size": 1000,
        "tokenizer": "sha256:x",
        "splits": {
            "train": {"tokens": 4, "documents": 3, "bytes": 9, "files": ["train-00000.bin", "train-00000.idx"]},
            "validation": {
                "tokens": 0,
                "documents": 0,
                "bytes": 0,
                "files": ["validation-00000.bin", "validation-00000.idx"],
            },
        },
    }


def test_counts_are_not_limited_to_32_bits(tmp_path):
    """Five billion tokens, a hole in the file, are there already when two documents more are written."""
    many = 5_000_000_000
    write(tmp_path, [])
    with (tmp_path / "train-00000.bin").open("wb") as file:
        file.truncate(2 * many)
    np.array([0, many], "<u8").tofile(tmp_path / "train-00000.idx")
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["splits"]["train"] |= {"tokens": many, "documents": 1, "bytes": 3 * many}
    with ShardWriter(
        tmp_path, vocab_size=1000, tokenizer="sha256:x", splits=["train", "validation"], resume=meta
    ) as writer:
        for ids in ([1, 2, 3], [4]):
            writer.add("train", ids, bytes=3)
    shards = TokenShards.open(tmp_path)
    train = shards.split("train")
    assert shards.meta["splits"]["train"]["tokens"] == many + 4 == len(train.tokens)
    assert train.bytes == 3 * many + 6
    assert train.offsets.tolist() == [0, many, many + 3, many + 4]
    assert [train.document(1).tolist(), train.document(2).tolist()] == [[1, 2, 3], [4]]


def test_tokens_are_mapped_read_only(tmp_path):
    tokens = TokenShards.open(write(tmp_path, [[1, 2]])).split("train").tokens
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 5


@pytest.mark.parametrize("bad", [[1000], [-1]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="vocabulary of 1000"):
        write(tmp_path, [bad])
    assert not (tmp_path / "meta.json").exists()


def test_damage_is_noticed(tmp_path):
    with pytest.raises(InputError, match="holds no token shards"):
        TokenShards.open(tmp_path)
    write(tmp_path, [[1, 2, 3], [4]])
    with pytest.raises(InputError, match="no split `test`"):
        TokenShards.open(tmp_path).split("test")
    data = (tmp_path / "train-00000.bin").read_bytes()
    (tmp_path / "train-00000.bin").write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"has 7 bytes, expected 8"):
        TokenShards.open(tmp_path).split("train")
    (tmp_path / "train-00000.bin").unlink()
    with pytest.raises(InputError, match=r"train-00000\.bin is missing"):
        TokenShards.open(tmp_path).split("train")
    (tmp_path / "train-00000.bin").write_bytes(data)
    np.array([0, 5, 4], "<u8").tofile(tmp_path / "train-00000.idx")
    with pytest.raises(InputError, match="offsets do not rise"):
        TokenShards.open(tmp_path).split("train")
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(InputError, match="lacks dtype"):
        TokenShards.open(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(InputError, match="no valid JSON"):
        TokenShards.open(tmp_path)
