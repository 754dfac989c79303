"""Fill in the middle: documents come back from their parts, marks are special tokens, batches change nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from llmctl import Artifact, InputError, TempFail, UsageError
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl.text.shards import TokenShards
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize import TOKENIZE, encoding, shard_formats
from llmctl_tokenize.infill import Infill
from llmctl_tokenize.params import INFILL_TOKENS, TokenizeParams

PREFIX, SUFFIX, MIDDLE = INFILL_TOKENS
SOURCE = (Path(json.__file__).parent.parent / "textwrap.py").read_text(encoding="utf-8")
TYPED = f"\tx = '{PREFIX}a{SUFFIX}b{MIDDLE}'  # 你好 é \r\n"
TEXTS = [f"def f{n}(a):\n\treturn a + {n}  \n" + TYPED * (n % 3) for n in range(200)] + ["", "x", SOURCE]
HALF = {"vocab_size": 500, "infill": 0.5}


def dataset(directory: Path) -> Artifact:
    with DatasetWriter(directory, "dataset.text", ("train", "validation")) as writer:
        for split, texts in (("train", TEXTS), ("validation", TEXTS[:20])):
            for number, text in enumerate(texts):
                writer.add(split, {"id": f"{split}{number}", "source": "s", "text": text})
    return Artifact(directory, "dataset.text")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, text):
    return run_stage(TOKENIZE, tmp_path_factory.mktemp("made"), HALF, text=text)


def rebuilt(ids: list[int], peer) -> tuple[str, str]:
    """(order, text) of a document's ids by transformers' tokenizer; from the paper, section 3 and appendix D."""
    before, suffix_at, middle_at = peer.convert_tokens_to_ids([PREFIX, SUFFIX, MIDDLE])
    assert ids[0] == peer.bos_token_id and ids[-1] == peer.eos_token_id
    ids = ids[1:-1]
    if before not in ids:
        return "plain", peer.decode(ids)
    assert ids[0] == before and [ids.count(mark) for mark in (before, suffix_at, middle_at)] == [1, 1, 1]
    one, two = ids.index(suffix_at), ids.index(middle_at)
    assert 0 < one < two
    prefix, suffix, middle = peer.decode(ids[1:one]), peer.decode(ids[one + 1 : two]), peer.decode(ids[two + 1 :])
    if one == 1:
        return "spm", middle + suffix  # prefix and middle stand together, nothing between them
    return "psm", prefix + middle + suffix


def documents(result, split: str) -> list[list[int]]:
    tokens = TokenShards.open(result.outputs["tokens"]).split(split)
    return [tokens.document(number).tolist() for number in range(len(tokens))]


def test_every_document_comes_back_in_its_order(made):
    peer = AutoTokenizer.from_pretrained(made.outputs["tokenizer"].path)
    found = [rebuilt(ids, peer) for ids in documents(made, "train")]
    assert [text for _, text in found] == TEXTS
    orders = Counter(order for order, _ in found)
    assert 70 < orders["plain"] < 130 and min(orders["psm"], orders["spm"]) > 25
    told = {name.partition(".")[2]: value for name, value in made.metrics.items() if name.startswith("infill.")}
    # PSM with an empty prefix reads as SPM.
    assert told["plain"] == orders["plain"] and told["psm"] + told["spm"] == orders["psm"] + orders["spm"]
    assert abs(told["psm"] - orders["psm"]) <= 5


@pytest.mark.parametrize(
    "kind",
    [
        {"coverage": "byte-fallback"},
        {"span_words": True},
        {"kind": "char", "coverage": "byte-level", "vocab_size": 265},
        {"kind": "unigram", "vocab_size": 400},
    ],
    ids=str,
)
def test_documents_of_other_kinds_come_back(kind, text, tmp_path):
    result = run_stage(TOKENIZE, tmp_path, {"vocab_size": 500, "infill": 1.0, **kind}, text=text)
    peer = AutoTokenizer.from_pretrained(result.outputs["tokenizer"].path)
    found = [rebuilt(ids, peer) for ids in documents(result, "train")]
    assert [text for _, text in found] == TEXTS and "plain" not in {order for order, _ in found}


def test_other_splits_stay_as_they_are(made, text, tmp_path):
    peer = AutoTokenizer.from_pretrained(made.outputs["tokenizer"].path)
    assert {rebuilt(ids, peer)[0] for ids in documents(made, "validation")} == {"plain"}
    without = run_stage(TOKENIZE, tmp_path, {"emit": "tokens"}, text=text, tokenizer=made.outputs["tokenizer"])
    assert documents(without, "validation") == documents(made, "validation")
    assert documents(without, "train") != documents(made, "train")
    assert without.metrics["bytes_per_token.train"] >= made.metrics["bytes_per_token.train"] > 1
    assert shard_formats.check_shards(
        TokenShards.open(made.outputs["tokens"]), Tokenizer.load(made.outputs["tokenizer"].path)
    ) == []  # fmt: skip


def test_marks_are_special_tokens_and_typed_ones_stay_text(made):
    tokenizer = Tokenizer.load(made.outputs["tokenizer"].path)
    marks = [tokenizer.special_tokens()[name] for name in INFILL_TOKENS]
    assert not {*marks} & {*tokenizer.encode(TYPED)}
    # The control: marks written into the text are plain text, and nobody could tell them from typed ones.
    assert not {*marks} & {*tokenizer.encode(f"{PREFIX}a{SUFFIX}b{MIDDLE}c")}
    assert tokenizer.encode(PREFIX, special=True) == marks[:1]


def infill(rate: float = 1.0, spm: float = 0.5, seed: int = 0) -> Infill:
    return Infill(rate, spm, seed, 1, 2, 3)


@settings(max_examples=300)
@given(st.text(), st.integers(0, 10**6), st.floats(0, 1), st.integers(0, 9))
def test_any_text_comes_back_from_its_parts(text, number, spm, seed):
    made = infill(1.0, spm, seed)
    prefix, middle, suffix = made.cut(number, text)
    assert prefix + middle + suffix == text
    parts = made.parts(number, text)
    if parts[1] == 2:
        assert parts == [1, 2, suffix, 3, prefix, middle]
    else:
        assert parts == [1, prefix, 2, suffix, 3, middle]


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 1000))
def test_any_text_comes_back_from_its_ids(made, text, number):
    tokenizer = Tokenizer.load(made.outputs["tokenizer"].path)
    marks = [tokenizer.special_tokens()[name] for name in INFILL_TOKENS]
    peer = AutoTokenizer.from_pretrained(tokenizer.directory)
    ids = Infill(1.0, 0.5, 0, *marks).encode(tokenizer, [text], number)[0]
    assert rebuilt(tokenizer.frame_document(ids), peer)[1] == text


def test_rates_and_cuts_are_those_asked_for():
    made, many = infill(0.7, 0.2), 20_000
    counts = made.counts(many)
    assert sum(counts.values()) == many
    assert abs(counts["plain"] / many - 0.3) < 4 * (0.3 * 0.7 / many) ** 0.5
    cut = counts["psm"] + counts["spm"]
    assert abs(counts["spm"] / cut - 0.2) < 4 * (0.2 * 0.8 / cut) ** 0.5
    # Two uniform cuts in order: the three parts have equal means, and each of 11 places is cut equally often.
    text = "0123456789"
    places = Counter(place for n in range(many) for p, m, _ in [made.cut(n, text)] for place in (len(p), len(p + m)))
    squares = sum((places[place] - 2 * many / 11) ** 2 for place in range(11)) / (2 * many / 11)
    assert squares < 29.6  # chi-square with 10 degrees of freedom, 0.999
    assert infill(0.0).counts(50) == {"plain": 50, "psm": 0, "spm": 0}
    assert infill(1.0, 1.0).counts(50)["spm"] == 50 and infill(1.0, 0.0).counts(50)["psm"] == 50
    assert infill(seed=1).cut(7, text * 9) != infill(seed=2).cut(7, text * 9)


def test_workers_batches_and_interruptions_change_nothing(made, text, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 700)
    monkeypatch.setattr(encoding, "CHECKPOINT_BYTES", 1500)
    bound = {"text": text, "tokenizer": made.outputs["tokenizer"]}
    values = {"infill": 0.5, "emit": "tokens"}
    parallel = run_stage(TOKENIZE, tmp_path / "parallel", {**values, "workers": 2}, **bound)
    with pytest.raises(TempFail):
        run_stage(TOKENIZE, tmp_path / "stopped", values, stop_after=4, **bound)
    stopped = run_stage(TOKENIZE, tmp_path / "stopped", values, **bound)
    for other in (parallel, stopped):
        assert documents(other, "train") == documents(made, "train")
        assert other.metrics["infill.spm"] == made.metrics["infill.spm"]
    seeded = run_stage(TOKENIZE, tmp_path / "seeded", {**values, "infill_seed": 1}, **bound)
    assert documents(seeded, "train") != documents(made, "train")


def test_a_tokenizer_without_the_marks_is_refused(text, tmp_path):
    plain = run_stage(TOKENIZE, tmp_path / "plain", {"vocab_size": 400, "emit": "tokenizer"}, text=text)
    with pytest.raises(InputError, match=r"no special token '<\|fim_prefix\|>'") as caught:
        run_stage(TOKENIZE, tmp_path / "a", {"infill": 0.5}, text=text, tokenizer=plain.outputs["tokenizer"])
    assert "infill_tokens" in str(caught.value.hint) and "<|bos|>" in str(caught.value.hint)


def test_marks_of_other_names(text, tmp_path):
    values = {"vocab_size": 400, "infill": 1.0, "infill_tokens": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]}
    result = run_stage(TOKENIZE, tmp_path / "own", {**values, "further_special": ["<fim_middle>"]}, text=text)
    special = Tokenizer.load(result.outputs["tokenizer"].path).special_tokens()
    assert special.keys() >= {*values["infill_tokens"]} and result.metrics["infill.plain"] == 0
    with pytest.raises(UsageError, match="infill_tokens"):
        run_stage(TOKENIZE, tmp_path / "taken", {**values, "infill_tokens": ["<|pad|>", "<s>", "<m>"]}, text=text)


def test_a_text_without_training_documents_is_refused(made, tmp_path):
    with DatasetWriter(tmp_path / "text", "dataset.text") as writer:
        writer.add("validation", {"id": "1", "text": "a text"})
    only = Artifact(tmp_path / "text", "dataset.text")
    params = {"infill": 0.5, "emit": "tokens"}
    with pytest.raises(UsageError, match="infill cuts documents of the split `train`, which .* lacks"):
        run_stage(TOKENIZE, tmp_path / "out", params, text=only, tokenizer=made.outputs["tokenizer"])


def test_a_tokenizer_that_puts_a_space_before_a_text_is_refused(tmp_path, text):
    """As Llama 2's does: prefix and middle of SPM would have a space between them."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Peer

    alphabet = sorted({char for one in TEXTS for char in one} | {"▁"})
    peer = Peer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    peer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    peer.decoder = decoders.Metaspace(prepend_scheme="always")
    peer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in INFILL_TOKENS])
    (tmp_path / "peer").mkdir()
    peer.save(str(tmp_path / "peer" / "tokenizer.json"))
    bound = Artifact(tmp_path / "peer", "tokenizer")
    assert Tokenizer.load(bound.path).decode(Tokenizer.load(bound.path).encode(TEXTS[0])) == TEXTS[0]
    with pytest.raises(InputError, match="does not give back document 1 of `train` from its parts"):
        run_stage(TOKENIZE, tmp_path / "out", {"infill": 0.5, "emit": "tokens"}, text=text, tokenizer=bound)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"infill_spm": 0.2}, "infill_spm has no meaning without infill"),
        ({"infill_seed": 3}, "infill_seed has no meaning without infill"),
        ({"infill": 0.5, "emit": "tokenizer"}, "further_special"),
        ({"infill": 0.5, "infill_tokens": ["<a>", "<a>", "<b>"]}, "twice"),
        ({"infill": 0.5, "infill_tokens": ["<a>", "<b>"]}, "at least 3"),
        ({"infill": 0.5, "kind": "wordpiece"}, "gives back any text"),
        ({"infill": 1.5}, "less than or equal to 1"),
    ],
)
def test_parameters_that_do_not_fit(values, match):
    with pytest.raises(ValidationError, match=match):
        TokenizeParams.model_validate(values)
