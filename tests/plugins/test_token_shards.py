"""Token shards: the same whatever encodes them, whole again after a kill, checked, exported and imported."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from llmctl import Artifact, InputError, StageError, TempFail, UsageError
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl.text.shards import ShardWriter, TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl_data import DATA
from llmctl_tokenize import TOKENIZE, encoding, shard_formats
from llmctl_tokenize.commands import tokenizers

TEXTS = [f"document {number}: " + "some words, 你好 " * (number % 7) for number in range(300)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    with DatasetWriter(root / "text", "dataset.text", ("train", "validation")) as writer:
        for number, text in enumerate(TEXTS):
            row = {"id": str(number), "source": f"s{number % 3}", "text": text}
            writer.add("validation" if number % 10 == 0 else "train", row)
    text = Artifact(root / "text", "dataset.text")
    return text, run_stage(TOKENIZE, root / "made", {"vocab_size": 300}, text=text)


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def same_tokens(shards: Path, imported: Path) -> bool:
    """Whether an import has the bytes of the shards; what was exported does not tell sources."""
    meta = json.loads((shards / "meta.json").read_text())
    for entry in meta["splits"].values():
        del entry["sources"]
    names = sorted(path.name for path in shards.iterdir())
    return (
        names == sorted(path.name for path in imported.iterdir())
        and json.loads((imported / "meta.json").read_text()) == meta
        and all((shards / name).read_bytes() == (imported / name).read_bytes() for name in names if name != "meta.json")
    )


def test_worker_processes_write_the_same_bytes(made, tmp_path, monkeypatch):
    text, serial = made
    monkeypatch.setattr(encoding, "BATCH_BYTES", 700)
    parallel = run_stage(TOKENIZE, tmp_path, {"workers": 2}, text=text, tokenizer=serial.outputs["tokenizer"])
    assert same_files(serial.outputs["tokens"].path, parallel.outputs["tokens"].path)


def test_sources_are_counted_as_planted(tmp_path):
    """Without merges every byte is a token, and BOS and EOS frame a document: all counts are known beforehand."""
    raw = tmp_path / "raw"
    planted = {
        "web": [f"a page of the web, the {number}th; 你好" for number in range(7)],
        "books": [f"# Chapter {number}\n\nIt was a dark night." for number in range(3)],
        "talk": [f"said {'so ' * number}and no more" for number in range(1, 6)],
    }
    for name in planted:
        (raw / name).mkdir(parents=True)
    (raw / "talk/all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in planted["talk"]))
    for name, ending in (("web", "txt"), ("books", "md")):
        for number, text in enumerate(planted[name]):
            (raw / name / f"{number}.{ending}").write_text(text, encoding="utf-8")
    told = [{"path": f"{name}/*", "name": name} for name in planted]
    params = {"emit": ["text"], "validation_share": 0.0, "workers": 1, "sources": told}
    text = run_stage(DATA, tmp_path / "data", params, files=[Artifact(raw, "files")]).outputs["text"]
    made = run_stage(TOKENIZE, tmp_path / "tokens", {"vocab_size": 262}, text=text).outputs["tokens"]
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in planted.items()}
    entry = TokenShards.open(made).meta["splits"]["train"]
    assert entry["sources"] == {
        name: {"documents": len(texts), "tokens": sizes[name] + 2 * len(texts), "bytes": sizes[name]}
        for name, texts in planted.items()
    }
    shown = run("check-shards", made.path).output
    assert f"  web: 7 documents, {sizes['web'] + 14} tokens, {sizes['web']} bytes" in shown
    audit = json.loads((text.path / "audit.json").read_text())
    assert {told["name"]: told["kept"] for told in audit["sources"]} == {"web": 7, "books": 3, "talk": 5}


def test_sources_add_up_to_their_split(made):
    for entry in TokenShards.open(made[1].outputs["tokens"]).meta["splits"].values():
        assert list(entry["sources"]) == ["s0", "s1", "s2"]
        for what in ("documents", "tokens", "bytes"):
            assert sum(counts[what] for counts in entry["sources"].values()) == entry[what] > 0


def test_sources_beyond_the_most_are_counted_together(tmp_path, made, monkeypatch):
    """As of a flat folder, where each file is a source. In the order of documents, however they are batched."""
    names = ["b", "other", "a", "z", "b", "y", "x", "a", "y", "c"]
    with DatasetWriter(tmp_path / "text", "dataset.text") as writer:
        for number, name in enumerate(names):
            writer.add("train", {"id": str(number), "source": name, "text": "xyz"})
    text, bound = Artifact(tmp_path / "text", "dataset.text"), made[1].outputs["tokenizer"]
    monkeypatch.setattr("llmctl.text.shards.MOST_SOURCES", 3)
    expected = {"a": 2, "b": 2, "z": 1, "other": 5}
    found = []
    for workers, size in ((0, 1 << 20), (0, 1), (2, 6)):
        monkeypatch.setattr(encoding, "BATCH_BYTES", size)
        params = {"emit": "tokens", "workers": workers}
        out = run_stage(TOKENIZE, tmp_path / f"{workers}-{size}", params, text=text, tokenizer=bound).outputs["tokens"]
        entry = TokenShards.open(out).meta["splits"]["train"]
        assert {name: counts["documents"] for name, counts in entry["sources"].items()} == expected
        assert all(sum(one[what] for one in entry["sources"].values()) == entry[what] for what in ("tokens", "bytes"))
        found.append(out.path)
    assert same_files(found[0], found[1]) and same_files(found[0], found[2])
    monkeypatch.setattr(encoding, "BATCH_BYTES", 1)
    monkeypatch.setattr(encoding, "CHECKPOINT_BYTES", 1)
    params = {"emit": "tokens", "workers": 0}
    with pytest.raises(TempFail):
        run_stage(TOKENIZE, tmp_path / "again", params, stop_after=8, text=text, tokenizer=bound)
    again = run_stage(TOKENIZE, tmp_path / "again", params, text=text, tokenizer=bound).outputs["tokens"]
    assert same_files(found[0], again.path)


def test_workers_are_chosen_by_size(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert encoding.worker_count(None, encoding.WORTH_WORKERS + 1) == 3
    assert encoding.worker_count(None, 1000) == 0 and encoding.worker_count(5, 1000) == 5


def test_a_worker_ends_with_its_parent():
    """After kill -9 of the one that writes, nobody else would end the others."""
    code = (
        "import multiprocessing as m, time, os, threading\n"
        "from llmctl_tokenize.encoding import _end_with\n"
        "def work(pipe):\n"
        "    threading.Thread(target=_end_with, args=(m.parent_process(), os._exit), daemon=True).start()\n"
        "    pipe.send(os.getpid()); time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    near, far = m.Pipe()\n"
        "    p = m.get_context('fork').Process(target=work, args=(far,)); p.start()\n"
        "    print(near.recv(), flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while not ended(worker):
        assert time.monotonic() < until
        time.sleep(0.05)


def ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:  # it goes away while it is looked at
        return True


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


@pytest.mark.parametrize("after", [1, 3, 8])
def test_an_interrupted_run_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch, after):
    text, whole = made
    monkeypatch.setattr(encoding, "BATCH_BYTES", 700)
    monkeypatch.setattr(encoding, "CHECKPOINT_BYTES", 1500)
    real, seen = ShardWriter.add_encoded, []

    def add(self, split, documents):
        real(self, split, documents)
        seen.append(len(documents.lengths))
        if len(seen) == after:
            self._splits[split].tokens.write(b"torn")  # what was not flushed by a checkpoint may be anything
            raise Killed

    monkeypatch.setattr(ShardWriter, "add_encoded", add)
    with pytest.raises(Killed):
        run_stage(TOKENIZE, tmp_path, {"vocab_size": 300}, text=text)
    monkeypatch.setattr(ShardWriter, "add_encoded", real)
    trained = []
    monkeypatch.setattr("llmctl_tokenize.run._train", lambda *_: trained.append(1))
    again = run_stage(TOKENIZE, tmp_path, {"vocab_size": 300}, text=text)
    assert same_files(whole.outputs["tokens"].path, again.outputs["tokens"].path)
    assert not trained  # the tokenizer was there already
    written = [
        fields["step"] for kind, fields in again.events if kind == "progress" and fields.get("phase") == "encode"
    ]
    if after == 8:
        assert written[0] > seen[0]  # it did not begin anew


def test_stopping_leaves_a_checkpoint(made, tmp_path):
    text, whole = made
    with pytest.raises(TempFail):
        run_stage(TOKENIZE, tmp_path, {"vocab_size": 300}, text=text, stop_after=1)
    again = run_stage(TOKENIZE, tmp_path, {"vocab_size": 300}, text=text)
    assert same_files(whole.outputs["tokens"].path, again.outputs["tokens"].path)


def run(*words: object):
    return CliRunner().invoke(tokenizers, [str(word) for word in words])


def test_the_checker_finds_what_is_wrong(made, tmp_path):
    _, whole = made
    tokens, tokenizer = whole.outputs["tokens"].path, whole.outputs["tokenizer"].path
    result = run("check-shards", tokens, "--tokenizer", tokenizer)
    assert result.exit_code == 0 and "270 documents" in result.output

    def broken(name: str, change) -> list[str]:
        copy = tmp_path / name
        copy.mkdir()
        for path in tokens.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        change(copy)
        result = run("check-shards", copy, "--tokenizer", tokenizer, "--json")
        assert isinstance(result.exception, StageError)
        return json.loads(result.output)["faults"]

    def write(path: Path, at: int, values: bytes) -> None:
        data = bytearray(path.read_bytes())
        data[at : at + len(values)] = values
        path.write_bytes(data)

    bin_, idx = "train-00000.bin", "train-00000.idx"
    assert "1 ids are not below 300, the first at token 7" in broken("a", lambda d: write(d / bin_, 14, b"\xff\xff"))[0]
    assert "offsets do not rise" in broken("b", lambda d: write(d / idx, 16, b"\xff" * 7))[0]
    assert "bytes, expected" in broken("c", lambda d: (d / bin_).write_bytes(b"xx"))[0]
    assert "tokens of" in broken("d", lambda d: write(d / bin_, 2, struct.pack("<H", 299)))[0]

    def rename(directory: Path) -> None:
        meta = json.loads((directory / "meta.json").read_text())
        (directory / "meta.json").write_text(json.dumps({**meta, "tokenizer": "sha256:0"}))

    assert "names the tokenizer sha256:0" in broken("e", rename)[0]


def test_nanogpt_there_and_back(made, tmp_path):
    _, whole = made
    shards = TokenShards.open(whole.outputs["tokens"])
    tokenizer = Tokenizer.load(whole.outputs["tokenizer"].path)
    result = run("export-shards", shards.directory, tmp_path / "out", "--format", "nanogpt")
    assert result.exit_code == 0
    # As nanoGPT's train.py reads it.
    data = np.memmap(tmp_path / "out" / "train.bin", dtype=np.uint16, mode="r")
    assert data.tolist() == shards.split("train").tokens.tolist()
    back = run(
        "import-shards", f"train={tmp_path}/out/train.bin", f"validation={tmp_path}/out/val.bin", tmp_path / "back",
        "--tokenizer", tokenizer.directory, "--format", "nanogpt",
    )  # fmt: skip
    assert back.exit_code == 0, back.output
    assert same_tokens(shards.directory, tmp_path / "back")
    (tmp_path / "empty").mkdir()
    for target, source, fault in (
        (tmp_path / "back", "out/train.bin", "back is not empty"), (tmp_path / "empty", "none.bin", "does not exist"),
    ):  # fmt: skip
        before = {path: path.read_bytes() for path in target.iterdir()}
        refused = run(
            "import-shards", f"train={tmp_path / source}", target, "--tokenizer", tokenizer.directory,
            "--format", "nanogpt",
        )  # fmt: skip
        assert isinstance(refused.exception, InputError) and fault in refused.exception.message
        assert {path: path.read_bytes() for path in target.glob("*")} == before
    twice = run("import-shards", "train=a", "train=b", tmp_path / "x", "--tokenizer", "t", "--format", "nanogpt")
    assert isinstance(twice.exception, UsageError)


def test_long_documents_of_nanogpt_cross_parts(made, tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(made[1].outputs["tokenizer"].path)
    monkeypatch.setattr(shard_formats, "PART", 4)
    ids = [7] * 9 + [1] + [8, 1] + [9, 9, 9]
    np.array(ids, np.uint16).tofile(tmp_path / "a.bin")
    shards = shard_formats.import_shards({"train": tmp_path / "a.bin"}, tmp_path / "made", tokenizer, "nanogpt")
    split = shards.split("train")
    assert split.tokens.tolist() == ids and split.offsets.tolist() == [0, 10, 12, 15]
    np.array([299, 300], np.uint16).tofile(tmp_path / "b.bin")
    with pytest.raises(InputError, match="id 300 is not in"):
        shard_formats.import_shards({"train": tmp_path / "b.bin"}, tmp_path / "b", tokenizer, "nanogpt")


def test_megatron_there_and_back(made, tmp_path):
    _, whole = made
    shards = TokenShards.open(whole.outputs["tokens"])
    shard_formats.export_shards(shards, tmp_path / "out", "megatron")
    # The layout of megatron/core/datasets/indexed_dataset.py, field by field.
    raw = (tmp_path / "out" / "train.idx").read_bytes()
    split = shards.split("train")
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack("<QBQQ", raw[9:34])
    assert (version, code, sequences, documents) == (1, 8, 270, 271)
    lengths = np.frombuffer(raw, np.int32, 270, 34)
    pointers = np.frombuffer(raw, np.int64, 270, 34 + lengths.nbytes)
    bounds = np.frombuffer(raw, np.int64, 271, 34 + lengths.nbytes + pointers.nbytes)
    assert len(raw) == 34 + lengths.nbytes + pointers.nbytes + bounds.nbytes
    assert lengths.tolist() == np.diff(split.offsets).tolist() and bounds.tolist() == list(range(271))
    data = (tmp_path / "out" / "train.bin").read_bytes()
    for number in (0, 1, 269):
        found = np.frombuffer(data, np.uint16, lengths[number], pointers[number])
        assert found.tolist() == split.document(number).tolist()
    tokenizer = Tokenizer.load(whole.outputs["tokenizer"].path)
    sources = {name: tmp_path / "out" / f"{name}.bin" for name in ("train", "validation")}
    shard_formats.import_shards(sources, tmp_path / "back", tokenizer, "megatron")
    assert same_tokens(shards.directory, tmp_path / "back")
    (tmp_path / "out" / "train.idx").write_bytes(raw[:40])
    with pytest.raises(InputError, match="damaged"):
        shard_formats.read_index(tmp_path / "out" / "train.idx")


def test_nanogpt_has_no_room_for_large_ids(tmp_path):
    with ShardWriter(tmp_path / "large", vocab_size=70_000, tokenizer="sha256:1", splits=["train"]) as writer:
        writer.add("train", [69_999], 3)
    with pytest.raises(UsageError, match="16 bits") as caught:
        shard_formats.export_shards(TokenShards.open(tmp_path / "large"), tmp_path / "out", "nanogpt")
    assert caught.value.hint == "export them as megatron"  # which has room, as follows
    shard_formats.export_shards(TokenShards.open(tmp_path / "large"), tmp_path / "out", "megatron")
    dtype, lengths, _ = shard_formats.read_index(tmp_path / "out" / "train.idx")
    assert dtype == np.int32 and lengths.tolist() == [1]


@pytest.mark.parametrize("format", ["nanogpt", "megatron", "litdata"])
def test_an_export_overwrites_nothing(made, tmp_path, format):
    shards = TokenShards.open(made[1].outputs["tokens"])
    out = tmp_path / "deep" / "out"
    first = shard_formats.export_shards(shards, out, format)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert sorted(before) == sorted(first)  # nothing else, no folder of what was being written
    again = run("export-shards", shards.directory, out, "--format", format)
    assert isinstance(again.exception, InputError) and "exists" in again.exception.message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_splits_of_one_name_are_refused(tmp_path):
    with ShardWriter(tmp_path / "both", vocab_size=9, tokenizer="sha256:1", splits=["val", "validation"]) as writer:
        writer.add("val", [1, 2], 3)
        writer.add("validation", [3], 3)
    shards = TokenShards.open(tmp_path / "both")
    with pytest.raises(UsageError, match=r"val and validation would both be val\.bin"):
        shard_formats.export_shards(shards, tmp_path / "out", "nanogpt")
    assert not (tmp_path / "out").exists()
    assert len(shard_formats.export_shards(shards, tmp_path / "out", "megatron")) == 4


def test_an_export_that_fails_leaves_nothing(made, tmp_path, monkeypatch):
    shards = TokenShards.open(made[1].outputs["tokens"])
    whole = shard_formats._copy

    def full(split, path, dtype):
        whole(split, path, dtype)
        if path.stem == "validation":
            raise OSError("no space left")

    monkeypatch.setattr(shard_formats, "_copy", full)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept.txt").write_text("mine")
    for directory in ("new", "old"):
        with pytest.raises(OSError, match="no space"):
            shard_formats.export_shards(shards, tmp_path / directory, "megatron")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept.txt", "old"]


RUN = """
import resource, sys
from pathlib import Path
from llmctl import Artifact
from llmctl.testing import run_stage
from llmctl_tokenize import TOKENIZE, encoding

if __name__ == "__main__":
    text, tokenizer, where, workers, batch, checkpoint = sys.argv[1:]
    encoding.BATCH_BYTES, encoding.CHECKPOINT_BYTES = int(batch), int(checkpoint)
    params = {"workers": int(workers), "emit": "tokens"}
    run_stage(TOKENIZE, Path(where), params, text=Artifact(Path(text), "dataset.text"),
              tokenizer=Artifact(Path(tokenizer), "tokenizer"))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def large(directory: Path, megabytes: int) -> Path:
    """A dataset of documents that differ, of about so much text."""
    with DatasetWriter(directory, "dataset.text", ("train", "validation")) as writer:
        for number in range(megabytes * 20):
            words = " ".join(f"word{(number * 7919 + i * 104729) % 5003}" for i in range(5000))
            writer.add("train", {"id": str(number), "source": "s", "text": words})
    return directory


@pytest.mark.slow
def test_kill_9_and_again_gives_the_same_bytes(made, tmp_path):
    tokenizer = made[1].outputs["tokenizer"].path
    script = tmp_path / "run.py"
    script.write_text(RUN)
    text = large(tmp_path / "text", 4)

    def command(where: str, workers: int) -> list[str]:
        return [
            sys.executable,
            str(script),
            str(text),
            str(tokenizer),
            str(tmp_path / where),
            str(workers),
            "60000",
            "200000",
        ]

    subprocess.run(command("whole", 0), check=True, stdout=subprocess.DEVNULL)
    running = subprocess.Popen(command("torn", 2), stdout=subprocess.DEVNULL)
    meta = tmp_path / "torn" / ".resume" / "tokens" / "meta.json"
    until = time.monotonic() + 120
    while not meta.exists() and time.monotonic() < until:
        time.sleep(0.002)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    so_far = json.loads(meta.read_text())["splits"]["train"]["documents"]
    assert 0 < so_far < 80
    subprocess.run(command("torn", 0), check=True, stdout=subprocess.DEVNULL)
    assert same_files(tmp_path / "whole" / "tokens", tmp_path / "torn" / "tokens")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(made, tmp_path):
    tokenizer = made[1].outputs["tokenizer"].path
    script = tmp_path / "run.py"
    script.write_text(RUN)
    peaks = []
    for megabytes in (2, 20):
        text = large(tmp_path / f"text{megabytes}", megabytes)
        words = [str(script), str(text), str(tokenizer), str(tmp_path / str(megabytes)), "0", "1000000", "4000000"]
        done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 12, peaks  # MiB, of 18 MB more text
