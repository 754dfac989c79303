"""A corpus that does not fit a limit of memory: the stages go through it, their twins that hold all of it die.

A child goes through a tenth of the corpus first, so that all that is loaded once is there. Then it may not have more
than `HEADROOM` of private memory beside that (Linux: RLIMIT_DATA), and goes through the whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl import Artifact
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter, read_rows
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize import TOKENIZE

pytestmark = [
    pytest.mark.slow,  # children that import what the stages need, and some tens of megabytes
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux alone"),
]
HEADROOM = 64 << 20
DOCUMENT = 8000
"""Bytes of text, about."""

CHILD = r"""
import json, re, resource, sys
from pathlib import Path
from llmctl import Artifact
from llmctl.testing import run_stage

root, headroom = Path(sys.argv[1]), int(sys.argv[2])


def limited(work):
    work("small")
    held = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held + headroom,) * 2)
    work("large")
"""
DATA = """
from llmctl_data import DATA


def work(name):
    params = {"emit": ["text"], "validation_share": 0.0, "task_bytes": 4 << 20, "workers": 1,
              "steps": [{"name": "exact-duplicates"}]}
    run_stage(DATA, root / name / "out", params, files=[Artifact(root / f"{name}.jsonl", "files")])


limited(work)
"""
DATA_TWIN = """
from llmctl.text.datasets import DatasetWriter


def work(name):
    with (root / f"{name}.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    kept = {row["text"]: row for row in reversed(rows)}
    with DatasetWriter(root / name / "out/text", "dataset.text", ("train",)) as writer:
        for number, row in enumerate(rows):
            if kept[row["text"]] is row:
                writer.add("train", {"id": str(number), "source": "s", "text": row["text"]})


limited(work)
"""
TOKENS = """
from llmctl_tokenize import TOKENIZE


def work(name):
    params = {"emit": "tokens", "workers": 0}
    run_stage(TOKENIZE, root / name / "out", params, text=Artifact(root / name / "text", "dataset.text"),
              tokenizer=Artifact(root / "tokenizer", "tokenizer"))


limited(work)
"""
TOKENS_TWIN = """
from llmctl.text.datasets import read_rows
from llmctl.text.shards import ShardWriter
from llmctl.text.tokenizer import Tokenizer


def work(name):
    tokenizer = Tokenizer.load(root / "tokenizer")
    texts = [row["text"] for row in read_rows(root / name / "text", "train")]
    found = [tokenizer.frame_document(ids) for ids in tokenizer.encode_batch(texts)]
    where = root / name / "out/tokens"
    with ShardWriter(where, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.digest, splits=["train"]) as writer:
        for text, ids in zip(texts, found):
            writer.add("train", ids, len(text.encode()))


limited(work)
"""


def texts(megabytes: float) -> list[str]:
    """Documents that differ, every ninth of them twice."""
    made = []
    for number in range(int(megabytes * 1e6) // DOCUMENT):
        seed = number - 1 if number % 9 == 8 else number
        made.append(" ".join(f"w{(seed * 7919 + place * place) % 50021}" for place in range(DOCUMENT // 6)))
    return made


def child(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", CHILD + code, str(root), str(HEADROOM)]
    # One thread: the stack of each counts, and how many there are depends on the machine.
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=250, env={**os.environ, **one})


def died_of_memory(done: subprocess.CompletedProcess[str]) -> bool:
    """Python says MemoryError, what is written in Rust aborts."""
    return done.returncode != 0 and ("MemoryError" in done.stderr or "memory allocation of" in done.stderr)


@pytest.mark.timeout(280)
def test_data_goes_through_what_its_twin_cannot_hold(tmp_path: Path) -> None:
    found = {}
    for name, code in (("streamed", DATA), ("held", DATA_TWIN)):
        root = tmp_path / name
        root.mkdir()
        for size, megabytes in (("small", 10), ("large", 100)):
            lines = (json.dumps({"text": text}) + "\n" for text in texts(megabytes))
            with (root / f"{size}.jsonl").open("w") as file:
                file.writelines(lines)
        found[name] = child(root, code)
    assert found["streamed"].returncode == 0, found["streamed"].stderr
    assert died_of_memory(found["held"]), found["held"].stderr

    def kept(name: str, size: str) -> set[str]:
        return {row["text"] for row in read_rows(tmp_path / name / size / "out/text", "train")}

    assert kept("streamed", "small") == kept("held", "small") == {*texts(10)}
    assert kept("streamed", "large") == {*texts(100)}


@pytest.mark.timeout(280)
def test_tokenize_goes_through_what_its_twin_cannot_hold(tmp_path: Path) -> None:
    found, made = {}, None
    for name, code in (("streamed", TOKENS), ("held", TOKENS_TWIN)):
        root = tmp_path / name
        for size, megabytes in (("small", 1), ("large", 10)):
            with DatasetWriter(root / size / "text", "dataset.text", ("train",)) as writer:
                for number, text in enumerate(texts(megabytes)):
                    writer.add("train", {"id": str(number), "source": "s", "text": text})
        made = made or run_stage(
            TOKENIZE,
            root / "made",
            {"vocab_size": 400, "emit": "tokenizer"},
            text=Artifact(root / "small/text", "dataset.text"),
        )
        tokenizer = made.outputs["tokenizer"].path
        (root / "tokenizer").symlink_to(tokenizer)
        found[name] = child(root, code)
    assert found["streamed"].returncode == 0, found["streamed"].stderr
    assert died_of_memory(found["held"]), found["held"].stderr
    small = [(tmp_path / name / "small/out/tokens/train-00000.bin").read_bytes() for name in found]
    assert small[0] == small[1]
    shards = TokenShards.open(tmp_path / "streamed/large/out/tokens").split("train")
    last = texts(10)[-1]
    opened = Tokenizer.load(tokenizer)
    assert shards.document(len(shards) - 1).tolist() == opened.frame_document(opened.encode(last))
