"""`eval` on text, apart by language: equal to token shards, by hand, and what sampling does to the small language."""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil

import numpy as np
import pytest

from llmctl import Artifact, InputError, UsageError
from llmctl.registry import get_registry
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl.text.shards import ShardWriter
from llmctl_eval import EVAL

ROWS = [
    {"text": "the cat sat", "meta": {"language": "en"}},
    {"text": "der Bär", "meta": {"language": "de"}},
    {"text": "a dog and a log", "meta": {"language": "en"}},
    {"text": "", "meta": {"language": "en"}},
    {"text": "?"},
]


class Table:
    """A bigram table as a model."""

    backend = "table"
    eos_ids = frozenset({1})

    def __init__(self, tokenizer, seed=0):
        self.context_length, self.vocab_size = 6, tokenizer.vocab_size
        self.table = np.log(np.random.default_rng(seed).dirichlet(np.ones(self.vocab_size), self.vocab_size))

    def logprobs(self, tokens):
        return self.table[np.array(tokens[:-1]), np.array(tokens[1:])].astype(np.float32)


def write_text(directory, rows):
    with DatasetWriter(directory, "dataset.text") as writer:
        for number, row in enumerate(rows):
            writer.add("validation", {"id": str(number), **row})
    return Artifact(directory, "dataset.text")


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text", ROWS)


def measured(folder, model_dir, data, **params):
    return run_stage(EVAL, folder, params, model=Artifact(model_dir, "model.onnx"), data=data).metrics


def test_each_language_has_its_own_loss(tmp_path, model_dir, byte_tokenizer, text, opens):
    table = Table(byte_tokenizer)
    opens({model_dir: table})
    m = measured(tmp_path / "o", model_dir, [text], by="language")
    for group, said in (("en", [ROWS[0], ROWS[2]]), ("de", [ROWS[1]]), ("unknown", [ROWS[4]])):
        framed = [byte_tokenizer.encode_document(row["text"]) for row in said]
        # By hand: every transition but that to the closing token, a token per byte.
        nats = [-table.table[a, b] for ids in framed for a, b in zip(ids[:-2], ids[1:-1], strict=True)]
        own = f"perplexity.language.{group}"
        assert m[f"{own}.nats"] == pytest.approx(np.mean(nats), rel=1e-6)
        assert m[f"{own}.value"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
        assert m[f"{own}.bits_per_byte"] == pytest.approx(np.mean(nats) / math.log(2), rel=1e-6)
        assert (m[f"{own}.tokens"], m[f"{own}.documents"]) == (len(nats), len(said))
        assert m[f"{own}.bytes_per_token"] == 1
    parts = [
        (m[f"perplexity.language.{g}.nats"], m[f"perplexity.language.{g}.tokens"]) for g in ("en", "de", "unknown")
    ]
    assert sum(nats * tokens for nats, tokens in parts) == pytest.approx(m["perplexity.nats"] * m["perplexity.tokens"])
    assert m["perplexity.documents"] == 4  # the empty one says nothing


def test_text_gives_the_numbers_of_its_token_shards(tmp_path, model_dir, byte_tokenizer, text, opens):
    opens({model_dir: Table(byte_tokenizer)})
    with ShardWriter(
        tmp_path / "tokens", vocab_size=byte_tokenizer.vocab_size, tokenizer=byte_tokenizer.digest
    ) as writer:
        for row in ROWS:
            writer.add("validation", byte_tokenizer.encode_document(row["text"]), len(row["text"].encode()))
    tokens = Artifact(tmp_path / "tokens", "dataset.tokens")
    for number, params in enumerate(({}, {"limit": 2}, {"max_tokens": 24}, {"max_tokens": 2}, {"baselines": ["xz"]})):
        by_text, by_shards = (
            measured(tmp_path / f"{name}{number}", model_dir, [data], **params)
            for name, data in (("t", text), ("s", tokens))
        )
        assert by_text == by_shards, params


@pytest.mark.parametrize(("params", "documents"), [({"limit": 2}, 2), ({"max_tokens": 25}, 2)])
def test_what_is_behind_the_limits_is_not_read(tmp_path, model_dir, byte_tokenizer, text, opens, params, documents):
    opens({model_dir: Table(byte_tokenizer)})
    file = next(text.path.glob("*.jsonl.gz"))
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    file.write_bytes(gzip.compress("\n".join([*lines[:3], "{broken", ""]).encode()))
    assert measured(tmp_path / "o", model_dir, [text], **params)["perplexity.documents"] == documents
    with pytest.raises(InputError):
        measured(tmp_path / "all", model_dir, [text])


def test_groups_are_those_of_data_and_a_reference_is_beside(tmp_path, model_dir, byte_tokenizer, opens):
    rows = [{"text": "one", "source": "x/a.txt", "meta": {"code": "c"}}, {"text": "two", "meta": {"corpus": "z"}}]
    rows[1]["dialect"] = "north"
    other = tmp_path / "other"
    other.mkdir()
    for path in model_dir.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    opens({model_dir: Table(byte_tokenizer), other: Table(byte_tokenizer, seed=1)})
    data = write_text(tmp_path / "rows", rows)
    m = run_stage(
        EVAL, tmp_path / "o", {"by": "source"}, model=Artifact(model_dir, "model.onnx"), data=[data],
        reference=Artifact(other, "model.onnx"),
    ).metrics  # fmt: skip
    assert "perplexity.language.code: c.nats" in measured(tmp_path / "l", model_dir, [data], by="language")
    assert "perplexity.dialect.north.nats" in measured(tmp_path / "d", model_dir, [data], by="dialect")
    alone = measured(tmp_path / "alone", other, [data], by="source")
    assert {name.split(".")[2] for name in m if name.startswith("perplexity.source.")} == {"x", "z"}
    for own in ("perplexity", "perplexity.source.x", "perplexity.source.z"):
        assert m[f"{own}.reference_nats"] == alone[f"{own}.nats"] != m[f"{own}.nats"]


def test_a_reference_of_other_tokens_does_not_compare(tmp_path, model_dir, byte_tokenizer, text, opens):
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    changed = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(changed, indent=7))
    opens({model_dir: Table(byte_tokenizer), other: Table(byte_tokenizer)})
    given = {"model": Artifact(model_dir, "model.onnx"), "reference": Artifact(other, "model.onnx")}
    with pytest.raises(UsageError, match="have different tokenizers: their nats per token do not compare"):
        run_stage(EVAL, tmp_path / "o", data=[text], **given)


def test_what_cannot_be_told_apart_is_said(tmp_path, model_dir, byte_tokenizer, text, opens):
    opens({model_dir: Table(byte_tokenizer)})
    tokens = Artifact(tmp_path / "tokens", "dataset.tokens")

    def refused(error, match, data, **params):
        with pytest.raises(error, match=match):
            measured(tmp_path / "o", model_dir, data, **params)

    refused(UsageError, "by: language tells the rows of a dataset.text apart", [tokens], by="language")
    refused(UsageError, "has dataset.tokens and dataset.text to measure on", [tokens, text])
    refused(UsageError, "counts the training tokens of a dataset.tokens", [text], baselines=["kneser-ney-bigram"])
    refused(InputError, "no row of split `validation` of .* has a `dialect`", [text], by="dialect")
    refused(InputError, "holds no text to measure on", [write_text(tmp_path / "e", [{"text": ""}])])
    refused(InputError, "row 0 of split `validation` has no text", [write_text(tmp_path / "n", [{"body": "x"}])])


# Sampling

torch = pytest.importorskip("torch")
SYLLABLES = {"large": ["ba", "de", "ki", "lo", "mu", "na"], "small": ["zor", "vek", "xil", "quu", "jat", "wem"]}


def spoken(language, drawn):
    """A sentence of a language: each syllable follows one of two before it."""
    parts, place = SYLLABLES[language], drawn.randrange(6)
    found = []
    for _ in range(14):
        found.append(parts[place])
        place = (place * 2 + drawn.randrange(2)) % 6
    return " ".join(found)


@pytest.mark.slow
def test_natural_sampling_leaves_the_small_language_behind_and_even_sampling_does_not(tmp_path):
    """2400 sentences of one language, 60 of another; the same model, steps and seed."""
    stages, drawn = get_registry().stages, random.Random(1)
    counts = {"large": 2400, "small": 60}
    texts = {}
    for language, count in counts.items():
        with DatasetWriter(tmp_path / language, "dataset.text") as writer:
            for number in range(count + 40):
                row = {"id": f"{language}-{number}", "text": spoken(language, drawn)}
                split = "train" if number < count else "validation"
                writer.add(split, {**row, "meta": {"language": language}})
        texts[language] = Artifact(tmp_path / language, "dataset.text")
    both = [{"text": spoken(language, drawn), "meta": {"language": language}} for language in counts for _ in range(40)]
    held_out = write_text(tmp_path / "held-out", both)
    with DatasetWriter(tmp_path / "all", "dataset.text") as writer:
        for number, row in enumerate(both):
            writer.add("train", {"id": str(number), "text": row["text"]})
    tokenizer = run_stage(
        stages["tokenize"], tmp_path / "tok", {"kind": "word", "vocab_size": 19},
        text=Artifact(tmp_path / "all", "dataset.text"),
    ).outputs["tokenizer"]  # fmt: skip
    tokens = [
        run_stage(stages["tokenize"], tmp_path / f"{language}-tokens", text=text, tokenizer=tokenizer).outputs["tokens"]
        for language, text in texts.items()
    ]
    shape = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 2, "ff_dim": 64, "context": 64}
    steps = {"max_steps": 60, "batch_size": 8, "lr": 3e-3, "warmup_steps": 5, "threads": 1, "seed": 0}
    losses = {}
    for name, alpha in (("natural", 1.0), ("even", 0.0)):
        params = {**shape, **steps, "mixture": {"alpha": alpha, "names": list(counts)}}
        model = run_stage(stages["train-pretrain"], tmp_path / name, params, tokens=tokens, tokenizer=tokenizer)
        m = run_stage(
            EVAL, tmp_path / f"{name}-eval", {"by": "language", "device": "cpu", "threads": 1},
            model=model.outputs["model"], data=[held_out],
        ).metrics  # fmt: skip
        losses[name] = {language: m[f"perplexity.language.{language}.nats"] for language in counts}
    assert losses["natural"]["small"] > losses["natural"]["large"] + 0.3
    assert losses["natural"]["small"] > losses["even"]["small"] + 0.3
    assert abs(losses["even"]["small"] - losses["even"]["large"]) < 0.3
