"""Datasets: what is written is read back, bytes are reproducible, damage is named with file and line."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from llmctl.errors import InputError
from llmctl.stage import Artifact
from llmctl.text.datasets import DatasetWriter, info, read_rows, splits

ROWS = [{"id": str(i), "source": "s", "text": f"héllo {i}\u2028\n🙂"} for i in range(5)]


def write(directory, **options):
    with DatasetWriter(directory, "dataset.text", ("train", "validation"), **options) as writer:
        for row in ROWS[:4]:
            writer.add("train", row)
        writer.add("test", ROWS[4])
    return directory


def test_rows_come_back_in_order(tmp_path):
    write(tmp_path / "d")
    assert list(read_rows(tmp_path / "d", "train")) == ROWS[:4]
    assert list(read_rows(Artifact(tmp_path / "d", "dataset.text"), "test")) == ROWS[4:]
    assert list(read_rows(tmp_path / "d", "validation")) == []
    assert splits(tmp_path / "d") == ["train", "validation", "test"]


def test_info_describes_the_files(tmp_path):
    contents = info(write(tmp_path))
    assert contents["format"] == "dataset.text" and contents["columns"] == ["id", "source", "text"]
    train = contents["splits"]["train"]
    assert train["rows"] == 4 and train["bytes"] == sum(len(row["text"].encode()) for row in ROWS[:4])
    assert train["files"] == ["train-00000-of-00001.jsonl.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["dataset_info.json", *(f"{name}-00000-of-00001.jsonl.gz" for name in contents["splits"])]
    )


def test_equal_rows_are_equal_bytes(tmp_path):
    write(tmp_path / "a"), write(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_large_splits_go_to_several_files(tmp_path):
    write(tmp_path, shard_bytes=60)
    files = info(tmp_path)["splits"]["train"]["files"]
    assert files == [f"train-{i:05d}-of-{len(files):05d}.jsonl.gz" for i in range(len(files))] and len(files) > 1
    assert list(read_rows(tmp_path, "train")) == ROWS[:4]


def test_readable_by_gzip_and_json(tmp_path):
    write(tmp_path)
    with gzip.open(tmp_path / "train-00000-of-00001.jsonl.gz", "rt", encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == ROWS[:4]


def test_bytes_of_conversations(tmp_path):
    with DatasetWriter(tmp_path, "dataset.chat") as writer:
        writer.add("train", {"messages": [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "x"}]})
        writer.add(
            "train", {"prompt": [{"content": "ab"}], "chosen": [{"content": "c"}], "rejected": [{"content": ""}]}
        )
        assert (writer.rows("train"), writer.bytes("train"), writer.rows("other")) == (2, 7, 0)


def test_foreign_files(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "my-data.jsonl").write_text("\ufeff" + lines + "\n", encoding="utf-8")
    assert list(read_rows(tmp_path / "my-data.jsonl", "train")) == ROWS
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert list(read_rows(tmp_path / "x.jsonl.gz")) == ROWS
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "y.parquet")
    assert list(read_rows(tmp_path / "y.parquet")) == ROWS
    hub = tmp_path / "hub"
    hub.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:2]), hub / "train-00000-of-00002.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[2:]), hub / "train-00001-of-00002.parquet")
    (hub / "test.jsonl").write_text(lines)
    assert splits(hub) == ["train", "test"] and list(read_rows(hub, "train")) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: no valid JSON"),
        ("b.jsonl", b'{"text": "x"}\n[1]\n', r"b\.jsonl:2: a list, not an object"),
        ("c.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"c\.jsonl:2: byte 0xff at column 11 is no UTF-8"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9000)[:-20], r"d\.jsonl\.gz:\d+: the gzip data is cut short"),
        ("e.jsonl.gz", b"no gzip at all", r"e\.jsonl\.gz:1: the gzip data is cut short or damaged"),
        ("f.parquet", b"PAR1 no parquet", r"f\.parquet: row 1: no readable Parquet"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_rows(tmp_path / name))


def test_wrong_paths_and_splits(tmp_path):
    write(tmp_path / "d")
    with pytest.raises(InputError, match="no split `dev`") as caught:
        read_rows(tmp_path / "d", "dev")
    assert caught.value.hint == "it has: train, validation, test"
    with pytest.raises(InputError, match="does not exist"):
        splits(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no dataset"):
        splits(tmp_path / "empty")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match="no dataset file"):
        splits(tmp_path / "a.csv")
    (tmp_path / "d" / "train-00000-of-00001.jsonl.gz").unlink()
    with pytest.raises(InputError, match="is missing, though"):
        splits(tmp_path / "d")
    (tmp_path / "d" / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset_info\.json is no valid JSON"):
        splits(tmp_path / "d")


def test_failed_writer_leaves_no_finished_dataset(tmp_path):
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path, "dataset.text") as writer:
        writer.add("train", ROWS[0])
        raise RuntimeError
    assert not (tmp_path / "dataset_info.json").exists()
