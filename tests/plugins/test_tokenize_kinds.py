"""Every kind of tokenizer: exact size, round trips, special tokens that stay text, the same files in any order."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer as Peer
from transformers import AutoTokenizer

from llmctl import Artifact, StageError, UsageError
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl.text.streaming import Detokenizer
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize import TOKENIZE
from llmctl_tokenize.params import TokenizeParams

LIBRARY = Path(json.__file__).parent.parent
# Texts full of what must stay text: with whole lines as pieces, a trainer would make pieces of these.
BAIT = "say <0x41> <|bos|> [MASK] <s> </s> <|end|> [UNK] <unk> <|unk|> <extra_id_0> ▁ é 你好"
PROSE = [(LIBRARY / name).read_text(encoding="utf-8") for name in ("textwrap.py", "heapq.py")]
KINDS = {
    "bpe": {"vocab_size": 500},
    "bpe-fallback": {"coverage": "byte-fallback", "vocab_size": 500},
    "bpe-unk": {"coverage": "unk", "vocab_size": 400},
    "bpe-span": {"span_words": True, "vocab_size": 500},
    "bpe-span-fallback": {"span_words": True, "coverage": "byte-fallback", "vocab_size": 500},
    "wordpiece": {"kind": "wordpiece", "special": "bert", "vocab_size": 500},
    "wordpiece-spaces": {"kind": "wordpiece", "pattern": "spaces", "lowercase": False, "vocab_size": 500},
    "unigram": {"kind": "unigram", "special": "t5", "vocab_size": 700, "sentinels": 9},
    "unigram-bytes": {"kind": "unigram", "coverage": "byte-level", "vocab_size": 500},
    "unigram-span": {"kind": "unigram", "span_words": True, "vocab_size": 500},
    "word": {"kind": "word", "special": "roberta", "vocab_size": 300},
    "word-spaces": {"kind": "word", "pattern": "spaces", "vocab_size": 300},
    "char": {"kind": "char", "vocab_size": 80},
    "char-fallback": {"kind": "char", "coverage": "byte-fallback", "vocab_size": 330},
    "bytes": {"kind": "char", "coverage": "byte-level", "vocab_size": 262},
}
LOSSLESS = [name for name, params in KINDS.items() if TokenizeParams.model_validate(params).lossless]


def dataset(directory: Path, texts: list[str]) -> Artifact:
    with DatasetWriter(directory, "dataset.text", ("train", "validation")) as writer:
        for number, text in enumerate(texts):
            writer.add("train", {"id": str(number), "source": "s", "text": text})
    return Artifact(directory, "dataset.text")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    text = dataset(root / "text", [*PROSE, *[BAIT] * 30])
    found = {}

    def make(name: str) -> Tokenizer:
        if name not in found:
            params = {**KINDS[name], "emit": "tokenizer"}
            found[name] = run_stage(TOKENIZE, root / name, params, text=text).outputs["tokenizer"].path
        return Tokenizer.load(found[name])

    return make


@pytest.mark.parametrize("name", KINDS)
def test_size_is_exact_and_transformers_agrees(made, name):
    ours = made(name)
    peer = AutoTokenizer.from_pretrained(ours.directory)
    library = Peer.from_file(str(ours.directory / "tokenizer.json"))
    assert ours.vocab_size == len(peer) == KINDS[name]["vocab_size"]
    assert set(ours.special_ids) == set(peer.all_special_ids)
    for text in [PROSE[1][:2000], BAIT, "Hello, wörld 🙂 12345\t\n\n x"]:
        ids = ours.encode(text)
        assert ids == peer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert max(ids) < ours.vocab_size
        library.encode_special_tokens = True
        assert ids == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", KINDS)
def test_typed_special_tokens_stay_text(made, name):
    ours = made(name)
    unknown = {ours.unk_id}
    for text in (BAIT, *ours.special_tokens(), "".join(ours.special_tokens()), "x<|bos|>y <s>z [MASK]"):
        assert not {*ours.encode(text)} & ours.special_ids - unknown, text
    token = next(iter(ours.special_tokens()))
    assert ours.encode(token, special=True) == [ours.special_tokens()[token]]  # the control


OWN = (
    "end", "END", "##ing", "###", "<<", "@tool", "/think", "[INST]", "<|tool|>", "Ġend", "Ã©t", "Ã", "é", "a", "'s",
    "123", "<0x41>", " end", "\n\n", "▁end", "<s", "stop it",
)  # fmt: skip
CUTS = {
    "bpe": {"vocab_size": 600},
    "bpe-llama3": {"vocab_size": 600, "pattern": "llama3"},
    "bpe-spaces": {"vocab_size": 600, "pattern": "spaces"},
    "bpe-words": {"vocab_size": 600, "pattern": "words"},
    "bpe-fallback": {"vocab_size": 600, "coverage": "byte-fallback", "pattern": "gpt2"},
    "wordpiece": {"kind": "wordpiece", "vocab_size": 500},
    "wordpiece-gpt2": {"kind": "wordpiece", "pattern": "gpt2", "vocab_size": 500},
    "unigram": {"kind": "unigram", "vocab_size": 500},
    "unigram-gpt2": {"kind": "unigram", "pattern": "gpt2", "vocab_size": 500},
    "word": {"kind": "word", "min_frequency": 1, "vocab_size": 40},
    "word-spaces": {"kind": "word", "min_frequency": 1, "pattern": "spaces", "vocab_size": 40},
    "char-fallback": {"kind": "char", "coverage": "byte-fallback", "vocab_size": 300},
}


@pytest.mark.parametrize("name", CUTS)
def test_special_tokens_of_ones_own_stay_text_or_are_refused(tmp_path, name):
    """Whatever a token is called: if it is taken, no text in which it is typed becomes it."""
    said = (
        "the end, END of doing: ### << @tool /think [INST] <|tool|> été a it's 123 <0x41>\n\nstop it  end ▁end Ġend <s "
    )
    text = dataset(tmp_path / "text", [PROSE[1], *[said] * 40])
    refused = set()
    for number, own in enumerate(OWN):
        params = {**CUTS[name], "further_special": [own], "emit": "tokenizer"}
        try:
            found = run_stage(TOKENIZE, tmp_path / str(number), params, text=text).outputs["tokenizer"].path
        except UsageError as error:
            assert "could be a piece of plain text" in error.message
            refused.add(own)
            continue
        ours = Tokenizer.load(found)
        id = ours.special_tokens()[own]
        for typed in (said, *(f"{x}{own}{y}" for x in ("", "a", "the ", "(", "\n") for y in ("", "ing", " b", "."))):
            assert id not in ours.encode(typed), (own, typed)
            assert id in ours.encode(typed, special=True) or own not in typed
    assert "<|tool|>" not in refused and {"é", "a"} <= refused
    assert ("end" in refused) == (name not in ("bpe-spaces", "unigram", "word-spaces", "char-fallback"))


def test_bytes_of_bert_words_are_all_there(tmp_path):
    text = dataset(tmp_path / "text", PROSE)
    params = {"pattern": "words", "vocab_size": 500, "emit": "tokenizer"}
    ours = Tokenizer.load(run_stage(TOKENIZE, tmp_path / "made", params, text=text).outputs["tokenizer"].path)
    assert ours.decode(ours.encode("ab 你好 naïve 🙂")) == "ab你好naïve🙂"  # nothing but the white space is lost


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=60)
@given(data=st.binary(max_size=60), text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_bytes_and_any_text_come_back(made, name, data, text):
    ours = made(name)
    sizes = ours.token_bytes()
    for some in (data.decode("latin-1"), data.decode("utf-8", "replace"), text, text + BAIT):
        ids = ours.encode(some)
        assert ours.decode(ids, skip_special=False) == some
        assert sum(sizes[id] for id in ids) == len(some.encode())
        stream = Detokenizer(ours)
        assert "".join([*(stream.add(id) for id in ids), stream.flush()]) == some


def test_lossless_kinds_are_those_of_bytes():
    assert LOSSLESS == [
        "bpe", "bpe-fallback", "bpe-span", "bpe-span-fallback", "unigram", "unigram-bytes", "unigram-span",
        "char-fallback", "bytes",
    ]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_the_order_of_the_texts_does_not_matter(made, tmp_path, name):
    texts = [*PROSE, *[BAIT] * 30]
    random.Random(1).shuffle(texts)
    params = {**KINDS[name], "emit": "tokenizer"}
    again = run_stage(TOKENIZE, tmp_path / "made", params, text=dataset(tmp_path / "text", texts))
    for path in made(name).directory.iterdir():
        assert path.read_bytes() == (again.outputs["tokenizer"].path / path.name).read_bytes(), path.name


def test_special_tokens_in_the_texts_are_folded_like_all_text(made):
    ours = made("wordpiece")
    assert any("[MASK]" in text for text in [*PROSE, BAIT])
    assert {piece for piece in ours.vocabulary() if piece != piece.lower()} == set(ours.special_tokens())


def test_words_and_characters_equal_hand_counts(made):
    texts = [*PROSE, *[BAIT] * 30]
    counts = Counter(char for text in texts for char in text)
    frequent = sorted((c for c in counts if counts[c] >= 2), key=lambda c: (-counts[c], c))
    vocabulary = made("char").vocabulary()
    assert [token for token in vocabulary if len(token) == 1] and len(frequent) >= 73
    assert {token for token in vocabulary if len(token) == 1} == set(frequent[: 80 - 7])
    words = Counter(word for text in texts for word in re.findall(r"\n+| ?[^ \n]+| +", text))
    ours = made("word-spaces")
    kept = sorted((w for w in words if words[w] >= 2), key=lambda w: (-words[w], w))
    special = set(ours.special_tokens())
    # Cut further where a special token is spelt: those words are left out of the comparison.
    assert {w for w in kept[:200] if "<" not in w and "[" not in w} <= set(ours.vocabulary()) - special
    assert ours.encode("zymurgical") == [ours.unk_id]
    assert made("bpe").encode("zymurgical") and made("bpe").unk_id is None


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_that_span_words_give_fewer_tokens(tmp_path, kind):
    prose = (LIBRARY / "pydoc_data" / "topics.py").read_text(encoding="utf-8").replace("\\n", "\n")[:60_000]
    text = dataset(tmp_path / "text", [prose])

    def train(name: str, **params) -> Tokenizer:
        params = {"kind": kind, "vocab_size": 1500, "emit": "tokenizer", **params}
        return Tokenizer.load(run_stage(TOKENIZE, tmp_path / name, params, text=text).outputs["tokenizer"].path)

    spanning, without = train("a", span_words=True), train("b", pattern="spaces")
    inner = re.compile(r"[^ Ġ][ Ġ]+[^ Ġ]")
    pieces, control = ({*made.vocabulary()} - {*made.special_tokens()} for made in (spanning, without))
    assert sum(bool(inner.search(piece)) for piece in pieces) > 20
    assert not any(inner.search(piece) for piece in control)
    assert len(spanning.encode(prose)) < len(without.encode(prose))
    assert spanning.decode(spanning.encode(prose)) == prose


def test_options_do_what_they_say(tmp_path):
    text = dataset(tmp_path / "text", ["Ärger ＡＢ 12345 67 naïve Ünder the the bridge " * 20])

    def train(**params) -> Tokenizer:
        name = str(len(list(tmp_path.iterdir())))
        return Tokenizer.load(
            run_stage(TOKENIZE, tmp_path / name, {"emit": "tokenizer", **params}, text=text).outputs["tokenizer"].path
        )

    digits = train(vocab_size=275, digits=2)
    assert max(len(t) for t in digits.vocabulary() if t.isdigit()) == 2
    assert train(vocab_size=270, normalizer="nfkc").encode("ＡＢ") == train(vocab_size=270, normalizer="nfkc").encode(
        "AB"
    )
    lower = train(kind="wordpiece", vocab_size=60, min_frequency=1)
    assert lower.encode("ÄRGER") == lower.encode("arger") and lower.decode(lower.encode("Bridge")) == "bridge"
    cased = train(kind="wordpiece", vocab_size=60, min_frequency=1, lowercase=False)
    assert cased.decode(cased.encode("Ärger")) == "Ärger"
    short = train(kind="unigram", vocab_size=288, max_piece_length=2)
    assert max(len(t) for t in short.vocabulary() if t not in short.special_tokens() and "<0x" not in t) == 2
    few = train(coverage="byte-fallback", vocab_size=272, limit_alphabet=5)
    assert len([t for t in few.vocabulary() if len(t) == 1]) == 5
    assert few.decode(few.encode("naïve")) == "naïve"
    own = train(vocab_size=270, further_special=["<|tool|>", "<|think|>"])
    assert (
        own.special_tokens()["<|think|>"] == 7
        and AutoTokenizer.from_pretrained(own.directory).convert_tokens_to_ids("<|tool|>") == 6
    )
    for again in ({"further_special": ["<|bos|>"]}, {"further_special": ["<extra_id_1>"], "sentinels": 2}):
        with pytest.raises(UsageError, match="has already"):
            train(**again)
    with pytest.raises(StageError, match="allows a vocabulary of"):
        train(kind="word", vocab_size=200)
    with pytest.raises(StageError, match="allows a vocabulary of|has \\d+ characters|could not train"):
        train(kind="unigram", vocab_size=8000)
    with pytest.raises(StageError, match="so many characters"):
        train(kind="wordpiece", vocab_size=12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "word", "coverage": "byte-level"}, "coverage: byte-level is not for kind: word"),
        ({"kind": "word", "span_words": True}, "span_words is for kind: bpe or unigram"),
        ({"kind": "wordpiece", "max_piece_length": 3}, "max_piece_length is for kind"),
        ({"limit_alphabet": 9}, "limit_alphabet has no meaning"),
        ({"span_words": True, "pattern": "gpt2"}, "asks for uncut lines"),
        ({"kind": "char", "pattern": "words"}, "leave pattern unset"),
        ({"kind": "unigram", "min_frequency": 5}, "min_frequency is not for kind: unigram"),
        ({"further_special": ["a", "a"]}, "holds a token twice"),
        ({"kind": "char", "coverage": "byte-level"}, "is 262, not 8192"),
    ],
)
def test_what_does_not_fit_together_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        TokenizeParams.model_validate(wrong)


def test_words_are_joined_as_their_kind_does(made):
    ours = made("wordpiece")
    continues, _ = ours.word_joins()
    assert all(
        continues[id] == token.startswith("##") for token, id in ours.vocabulary().items() if id not in ours.special_ids
    )
    words = made("word")
    assert not any(words.word_joins()[0])
    sizes = np.array(made("bpe-unk").token_bytes())
    assert sizes[made("bpe-unk").encode("def heap")].sum() == 8
