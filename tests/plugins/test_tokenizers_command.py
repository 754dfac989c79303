"""`llmctl tokenizers`: numbers equal to hand counts, worst cases, problems found, the shell's encode and decode."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer as Peer
from tokenizers import models

from llmctl import InputError, StageError, UsageError
from llmctl.text.datasets import DatasetWriter
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize import comparison, files, training
from llmctl_tokenize.commands import tokenizers
from llmctl_tokenize.inspection import inspect
from llmctl_tokenize.params import TokenizeParams
from llmctl_tokenize.special import SPECIAL

LIBRARY = Path(json.__file__).parent.parent
TEXT = "the cat sat on the mat\nthe dog sat on the log\n"


def run(*words: object, input: str | None = None):
    return CliRunner().invoke(tokenizers, [str(word) for word in words], input=input)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bpe")
    params = TokenizeParams(vocab_size=300)
    tokenizer = training.train(lambda: iter([(LIBRARY / "heapq.py").read_text()]), params, SPECIAL["gpt"])
    files.save(tokenizer, directory, SPECIAL["gpt"].names, SPECIAL["gpt"].further, SPECIAL["gpt"].template)
    return directory


def test_the_table_equals_hand_counts(tmp_path):
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "new.txt").write_text("the cat sat on the zebra\n")
    options = ["--train", tmp_path / "train.txt", "--width", 10, "--weight-bytes", 4, "--json"]
    texts = ["--text", f"seen={tmp_path / 'train.txt'}", "--text", f"new={tmp_path / 'new.txt'}"]
    result = run("compare", "word", "char", "bpe:265", *texts, *options)
    assert result.exit_code == 0, result.output
    found = {(m["text"], m["tokenizer"]): m for m in json.loads(result.output)["measures"]}
    word = found["seen", "word"]
    # the, cat, sat, on, mat, dog, log and seven special tokens
    assert word["vocab_size"] == 7 + 7
    assert (word["tokens"], word["words"], word["unknown"], word["bytes"]) == (12, 12, 0, len(TEXT))
    assert word["fertility"] == 1 and word["embedding_bytes"] == 14 * 10 * 4
    assert word["vocabulary_use"] == 7 / 14 and word["longest"] == 12
    new = found["new", "word"]
    assert (new["unknown"], new["tokens"], new["unknown_rate"]) == (1, 6, 1 / 6)
    char = found["seen", "char"]
    assert char["tokens"] == len(TEXT) and char["bytes_per_token"] == 1
    assert char["vocab_size"] == 7 + len(set(TEXT)) and found["new", "char"]["unknown"] == 3  # z, b, r
    assert found["new", "char"]["sequence_length"] == 25
    # Three merges after 6 special tokens and 256 bytes, each of a pair that occurs 4 times: a-t, h-e, t-he.
    bpe = found["seen", "bpe:265"]
    assert (bpe["vocab_size"], bpe["embedding_bytes"]) == (265, 265 * 10 * 4)
    assert bpe["tokens"] == len(TEXT) - 4 - 2 * 4 == 34 and bpe["fertility"] == 34 / 12
    assert bpe["vocabulary_use"] == len({*"csonmdgl \n"} | {"at", "the"}) / 265 == 12 / 265
    assert (found["new", "bpe:265"]["tokens"], found["new", "bpe:265"]["unknown"]) == (25 - 2 - 2 * 2, 0)


def test_bytes_are_never_unknown(tmp_path, bpe):
    (tmp_path / "a.txt").write_text("zymurgical 你好")
    result = run("compare", bpe, "--text", tmp_path / "a.txt", "--json")
    found = json.loads(result.output)
    assert found["measures"][0]["unknown"] == 0
    worst = {case["input"]: case for case in found["worst_cases"]}
    assert all(case["returned"] for case in worst.values())
    assert worst["Chinese"]["tokens"] == worst["Chinese"]["bytes"] == 3 * comparison.LONG  # no merge has ever seen it
    assert worst["one letter repeated"]["tokens"] <= comparison.LONG
    assert found["longest_words"][bpe.name][0][0] == "zymurgical"


def test_columns_and_pages(tmp_path, bpe):
    with DatasetWriter(tmp_path / "rows", "dataset.text") as writer:
        for number, (language, text) in enumerate([("en", "hello"), ("de", "grüße"), ("en", "world")]):
            writer.add("train", {"id": str(number), "source": "s", "lang": language, "text": text})
    page = tmp_path / "page.html"
    result = run("compare", bpe, "bpe:270", "--text", tmp_path / "rows", "--by", "lang", "--html", page)
    assert result.exit_code == 0, result.output
    assert [line.split()[:2] for line in result.output.splitlines()[1:5]] == [
        ["en", bpe.name], ["en", "bpe:270"], ["de", bpe.name], ["de", "bpe:270"],
    ]  # fmt: skip
    named = run("compare", bpe, "--text", f"x={tmp_path / 'rows'}", "--text", f"y={tmp_path / 'rows'}", "--by", "lang")
    assert [line.split()[0] for line in named.output.splitlines()[1:5]] == ["x/en", "x/de", "y/en", "y/de"]
    shown = page.read_text()
    HTMLParser().feed(shown)
    assert shown.count("<svg") == 4 and "<script" not in shown and "bpe:270" in shown
    assert isinstance(run("compare", bpe, "--text", tmp_path / "rows", "--by", "x").exception, UsageError)


def test_inspection_finds_problems(bpe, tmp_path):
    found = inspect(Tokenizer.load(bpe))
    assert found["kind"] == "BPE" and found["vocab_size"] == 300 and len(found["first_merges"]) == 8
    assert found["pre_tokenizer"] == "ByteLevel" and found["chat_template"]
    assert found["problems"] == ["300 tokens are no multiple of 64: matrix products are slower (20 more would be one)"]
    state = json.loads((bpe / "tokenizer.json").read_text())
    # A token that no merge makes, a hole, no EOS, and a special token that text can spell.
    state["model"]["vocab"] |= {"qzx": 303, "~": state["model"]["vocab"]["~"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    faults = " / ".join(inspect(Tokenizer.load(tmp_path))["problems"])
    for part in ("no EOS", "no PAD", "3 ids below 304 stand for nothing", "1 tokens are never the encoding", "'qzx'"):
        assert part in faults
    leaky = tmp_path / "leaky"
    peer = Peer(models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    peer.add_special_tokens(["<s>", "<unk>"])
    files.save(peer, leaky, {"unk_token": "<unk>"})
    faults = inspect(Tokenizer.load(leaky))["problems"]
    assert "typed text becomes a special token: <s>" in faults
    assert any("text does not always come back" in fault for fault in faults)
    assert isinstance(run("inspect", leaky, "--strict").exception, StageError)
    assert "problem: no PAD" in run("inspect", leaky).output
    assert json.loads(run("inspect", bpe, "--json").output)["eos"] == 1


def test_encode_and_decode(bpe):
    ours = Tokenizer.load(bpe)
    assert run("encode", bpe, "return x").output.split() == [str(id) for id in ours.encode("return x")]
    assert run("encode", bpe, input="return x").output == run("encode", bpe, "return x").output
    assert run("encode", bpe, "<|end|>", "--special").output == "1\n"
    assert len(run("encode", bpe, "<|end|>").output.split()) > 1
    assert json.loads(run("encode", bpe, "é", "--json").output)["tokens"] == ["Ã", "©"]
    assert run("encode", bpe, "a", "--pieces").output == f"{ours.encode('a')[0]}\ta\n"
    assert run("encode", bpe, "a", "--frame").output.split() == ["0", str(ours.encode("a")[0]), "1"]
    ids = run("encode", bpe, "héllo\n").output
    assert run("decode", bpe, *ids.split()).output == run("decode", bpe, input=ids).output == "héllo\n"
    assert run("decode", bpe, "1").output == "<|end|>" and run("decode", bpe, "1", "--skip-special").output == ""
    for wrong in (run("decode", bpe, "300"), run("decode", bpe, input="x")):
        assert isinstance(wrong.exception, InputError)
    assert isinstance(run("encode", bpe, "a", "--special", "--frame").exception, UsageError)


def test_import_command(bpe, tmp_path):
    result = run("import", bpe, tmp_path / "copy")
    assert result.exit_code == 0 and "300 tokens, from huggingface" in result.output
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (bpe / "tokenizer.json").read_bytes()
    for wrong in (["--encoding", "x"], ["--special", "x"]):
        assert isinstance(run("import", bpe, tmp_path / "other", *wrong).exception, UsageError)
