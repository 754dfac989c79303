"""`eval` against closed forms, scipy and hand-computed values; controls that must fail or show nothing."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import subprocess
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llmctl import Artifact, InputError, TempFail, UsageError
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl.text.shards import ShardWriter
from llmctl.text.tokenizer import Tokenizer
from llmctl_eval import EVAL
from llmctl_eval.baselines import KneserNeyBigram, discount, pairs, xz_bits_per_byte
from llmctl_eval.conversations import read_question, with_candidates
from llmctl_eval.intervals import Bootstrap
from llmctl_eval.matching import matches, squad, strict
from llmctl_eval.params import EvalParams
from llmctl_eval.perplexity import windows
from llmctl_eval.samples import SampleLog

# Normalisation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The U.S.A.  isn't  an Answer!", "usa isnt answer"),
        ("Án  é café—x", "án é café—x"),
        ("A an the", ""),
        ("theory of another", "theory of another"),
        ("well-known, the thing", "wellknown thing"),
        ("os.path.join(a, *p)", "ospathjoina p"),
        ("(a, b)", "b"),
        ("“quoted”", "“quoted”"),
        ("\tx\n y ", "x y"),
    ],
)
def test_squad_normalisation(text, expected):
    assert squad(text) == expected


def test_squad_normalisation_is_transformers_own():
    metrics = pytest.importorskip("transformers.data.metrics.squad_metrics")
    for text in ("The U.S.A.  isn't  an Answer!", "Án  é café—x", "a-an-the", "The\u00a0a  x", "1,000 $ (an)", "_a_"):
        assert squad(text) == metrics.normalize_answer(text), text


@given(st.text(max_size=30))
def test_matching_is_reflexive_and_ignores_the_order_of_references(text):
    for normalise in (squad, strict):
        assert matches(text, [text], normalise)
        assert matches(text, ["other", text], normalise) == matches(text, [text, "other"], normalise)


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Paris", ["paris."], True),
        ("not Paris", ["Paris"], False),
        ("Paris, France", ["Paris"], False),
        ("", ["Paris"], False),
        ("", ["the"], False),
        ("the", ["the"], True),
        ("+", ["-"], False),
        ("b", ["a", "the b"], True),
    ],
)
def test_squad_matches(answer, expected, same):
    assert matches(answer, expected, squad) is same


def test_strict_matches_only_the_same_text():
    assert matches(" Paris\n", ["Paris"], strict)
    assert not matches("paris", ["Paris"], strict)


# Intervals


def test_intervals_are_scipys():
    values = np.random.default_rng(0).random(60) < 0.7
    found = Bootstrap(0.9, 999, 5).mean(values)
    expected = stats.bootstrap(
        (values.astype(float),), np.mean, n_resamples=999, confidence_level=0.9, method="BCa",
        rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.value == values.mean()
    assert Bootstrap(0.9, 999, 6).mean(values) != found
    assert Bootstrap(0.99, 999, 5).mean(values).low < found.low


def test_intervals_of_answers_that_are_all_alike_are_exact():
    found = Bootstrap().mean([1.0] * 20)
    # Clopper and Pearson for n of n: (alpha / 2) ** (1 / n)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 20), abs=1e-12)
    assert Bootstrap().mean([0.0] * 20).high == pytest.approx(1 - 0.025 ** (1 / 20), abs=1e-12)


def test_difference_and_ratio():
    boot = Bootstrap(resamples=500)
    same = boot.difference([1, 0, 1], [1, 0, 1])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    random = np.random.default_rng(1)
    base = random.random(300) < 0.4
    better = base | (random.random(300) < 0.2)
    assert boot.difference(better, base).low > 0
    quick, covered = Bootstrap(resamples=200), 0
    for _ in range(60):
        tokens = random.integers(5, 50, 100)
        found = quick.ratio(tokens * 2.0 + random.normal(0, 1, 100), tokens)
        covered += found.low < 2.0 < found.high
    assert 51 <= covered < 60  # 57 expected of an interval of 95 %
    assert boot.ratio([2.0, 4.0, 6.0], [1, 2, 3]) == boot.ratio([2.0, 4.0, 6.0], [1, 2, 3])
    assert boot.ratio([2.0, 4.0, 6.0, 8.0], [1, 2, 3, 4]).low == 2.0


# Baselines


def naive_kneser_ney(documents, vocab_size):
    """The textbook's sums, one dictionary at a time."""
    bigrams = Counter((a, b) for d in documents for a, b in zip(d[:-1], d[1:], strict=True))
    context = Counter()
    follow = Counter()
    before = Counter()
    for (a, b), count in bigrams.items():
        context[a] += count
        follow[a] += 1
        before[b] += 1

    def cut(counts):
        n1, n2 = sum(c == 1 for c in counts), sum(c == 2 for c in counts)
        return n1 / (n1 + 2 * n2) if n1 else 0.5

    d2, d1 = cut(bigrams.values()), cut(before.values())
    total = sum(before.values())

    def unigram(w):
        return max(before[w] - d1, 0) / total + d1 * len(before) / total / vocab_size

    def bigram(v, w):
        if not context[v]:
            return unigram(w)
        return max(bigrams[v, w] - d2, 0) / context[v] + d2 * follow[v] / context[v] * unigram(w)

    return bigram


def flat(documents):
    return np.concatenate([np.array(d) for d in documents]), np.cumsum([0, *map(len, documents)])


def test_kneser_ney_is_the_textbooks_and_sums_to_one():
    random = np.random.default_rng(0)
    documents = [random.zipf(1.5, size).clip(0, 18).tolist() for size in (40, 7, 90, 1)]
    model = KneserNeyBigram(*flat(documents), 20)  # token 19 never occurs
    naive = naive_kneser_ney(documents, 20)
    every = np.array([(v, w) for v in range(20) for w in range(20)])
    found = model.probabilities(every[:, 0], every[:, 1]).reshape(20, 20)
    assert found == pytest.approx(np.array([[naive(v, w) for w in range(20)] for v in range(20)]), abs=1e-15)
    assert found.sum(axis=1) == pytest.approx(np.ones(20), abs=1e-12)
    assert found.min() > 0


def test_kneser_ney_by_hand():
    # "a b a b a c" as 0 1 0 1 0 2, vocabulary of 3: counts ab 2, ba 2, ac 1.
    model = KneserNeyBigram(np.array([0, 1, 0, 1, 0, 2]), np.array([0, 6]), 3)
    # n1 = 1, n2 = 2: D = 1/5. Each token follows one context: n1 = 3, D1 = 1, so p(w) = 1/3 throughout.
    assert model.probabilities(np.array([0]), np.array([1]))[0] == pytest.approx((2 - 0.2) / 3 + 0.2 * 2 / 3 / 3)
    assert model.probabilities(np.array([0]), np.array([2]))[0] == pytest.approx((1 - 0.2) / 3 + 0.2 * 2 / 3 / 3)
    assert model.probabilities(np.array([2]), np.array([0]))[0] == pytest.approx(1 / 3)


def test_pairs_do_not_cross_documents():
    previous, following = pairs(*flat([[1, 2, 3], [], [4], [5, 6]]))
    assert list(zip(previous.tolist(), following.tolist(), strict=True)) == [(1, 2), (2, 3), (5, 6)]
    assert discount(np.array([3, 3])) == 0.5


def test_xz_is_the_programs_own(tmp_path):
    text = ("the quick brown fox\n" * 50).encode()
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    try:
        packed = subprocess.run(["xz", "-9e", "-c"], input=text, capture_output=True, check=True).stdout
    except FileNotFoundError:
        return
    assert xz_bits_per_byte(text) == pytest.approx(8 * len(packed) / len(text), rel=0.02)


# Perplexity


@pytest.mark.parametrize("length", [0, 1, 2, 8, 9, 15, 16, 40])
def test_windows_predict_every_token_once(length):
    found = list(windows(np.arange(length), 8))
    assert all(2 <= len(window) <= 8 for window in found)
    assert [token for window in found for token in window[1:].tolist()] == list(range(1, length))
    assert all(window[0] == window[1] - 1 for window in found)


class Table:
    """A bigram table as a model; the context before the last token does not matter."""

    backend = "table"
    eos_ids = frozenset({1})

    def __init__(self, tokenizer, context_length=16):
        self.context_length, self.vocab_size = context_length, tokenizer.vocab_size
        self.table = np.log(np.random.default_rng(0).dirichlet(np.ones(self.vocab_size), self.vocab_size))
        self.calls = 0

    def logprobs(self, tokens):
        assert len(tokens) <= self.context_length
        self.calls += 1
        return self.table[np.array(tokens[:-1]), np.array(tokens[1:])].astype(np.float32)


def write_tokens(directory, tokenizer, texts):
    with ShardWriter(directory, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.digest) as writer:
        for split, documents in texts.items():
            for text in documents:
                writer.add(split, tokenizer.encode_document(text), len(text.encode()))
    return Artifact(directory, "dataset.tokens")


TEXTS = {
    "train": ["the cat sat on the mat", "the dog sat on the log"] * 3,
    "validation": ["the cat sat on the log and slept", "é", "a dog"],
}


@pytest.fixture
def tokens(tmp_path, byte_tokenizer):
    return write_tokens(tmp_path / "tokens", byte_tokenizer, TEXTS)


def test_perplexity_is_that_of_the_table(tmp_path, model_dir, byte_tokenizer, tokens, opens):
    table = Table(byte_tokenizer)
    opens({model_dir: table})
    model = Artifact(model_dir, "model.onnx")
    result = run_stage(EVAL, tmp_path / "a", {"baselines": ["kneser-ney-bigram", "xz"]}, model=model, data=[tokens])
    documents = [byte_tokenizer.encode_document(text) for text in TEXTS["validation"]]
    # By hand: every transition but that to the closing token; the table needs no context, so windows change nothing.
    nats = [-table.table[a, b] for d in documents for a, b in zip(d[:-2], d[1:-1], strict=True)]
    size = sum(len(text.encode()) for text in TEXTS["validation"])
    assert len(nats) == size  # one token per byte
    m = result.metrics
    assert m["perplexity.nats"] == pytest.approx(np.mean(nats), rel=1e-6)
    assert m["perplexity.value"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert m["perplexity.bits_per_byte"] == pytest.approx(np.sum(nats) / math.log(2) / size, rel=1e-6)
    assert (m["perplexity.tokens"], m["perplexity.documents"]) == (size, 3)
    assert m["perplexity.nats_low"] <= m["perplexity.nats"] <= m["perplexity.nats_high"]
    naive = naive_kneser_ney([byte_tokenizer.encode_document(t) for t in TEXTS["train"]], byte_tokenizer.vocab_size)
    bigram = np.mean([-math.log(naive(a, b)) for d in documents for a, b in zip(d[:-2], d[1:-1], strict=True)])
    assert m["perplexity.bigram_nats"] == pytest.approx(bigram, abs=1e-12)
    assert m["perplexity.nats_below_bigram"] == pytest.approx(bigram - np.mean(nats), rel=1e-6)
    text = "".join(TEXTS["validation"]).encode()
    assert m["perplexity.xz_bits_per_byte"] == xz_bits_per_byte(text)


def test_perplexity_does_not_depend_on_the_context_of_a_table(tmp_path, model_dir, byte_tokenizer, tokens, opens):
    found = []
    for length in (3, 7, 64):
        opens({model_dir: Table(byte_tokenizer, length)})
        result = run_stage(EVAL, tmp_path / str(length), model=Artifact(model_dir, "model.onnx"), data=[tokens])
        found.append(result.metrics["perplexity.nats"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_limits_of_perplexity(tmp_path, model_dir, byte_tokenizer, tokens, opens):
    opens({model_dir: Table(byte_tokenizer)})
    model = Artifact(model_dir, "model.onnx")

    def measured(name, **params):
        return run_stage(EVAL, tmp_path / name, params, model=model, data=[tokens]).metrics["perplexity.documents"]

    assert measured("a", limit=2) == 2
    assert measured("b", max_tokens=34) == 1
    assert measured("c", max_tokens=38) == 2
    assert measured("d", max_tokens=2) == 1
    assert measured("e", split="train") == 6
    assert measured("f", splits={"perplexity": "train"}, limit=4) == 4


def test_empty_documents_before_the_first_text_are_told_with_what_to_raise(tmp_path, model_dir, byte_tokenizer, opens):
    opens({model_dir: Table(byte_tokenizer)})
    model = Artifact(model_dir, "model.onnx")
    tokens = write_tokens(tmp_path / "t", byte_tokenizer, {"validation": ["", "", "some words"], "test": [""]})

    def refused(name, **params):
        with pytest.raises(InputError) as caught:
            run_stage(EVAL, tmp_path / name, params, model=model, data=[tokens])
        return caught.value.message, caught.value.hint

    message, hint = refused("a", max_tokens=5)
    assert message.endswith("holds no text to measure on: the first 2 documents are empty")
    assert hint == "there are 3; raise `max_tokens` (5)"
    assert refused("b", limit=1, max_tokens=5)[1] == "there are 3; raise `limit` (1) or `max_tokens` (5)"
    message, hint = refused("c", split="test", max_tokens=5)
    assert message.startswith("split `test` of") and "split" in hint
    assert run_stage(EVAL, tmp_path / "d", {"max_tokens": 64}, model=model, data=[tokens]).metrics


def test_tokens_of_another_tokenizer_are_refused(tmp_path, model_dir, byte_tokenizer, opens):
    opens({model_dir: Table(byte_tokenizer)})
    with ShardWriter(tmp_path / "t", vocab_size=300, tokenizer="sha256:other") as writer:
        writer.add("validation", [0, 7, 1], 1)
    with pytest.raises(InputError, match="another tokenizer"):
        run_stage(
            EVAL,
            tmp_path / "a",
            model=Artifact(model_dir, "model.onnx"),
            data=[Artifact(tmp_path / "t", "dataset.tokens")],
        )


# Conversations


def question(number, text, answer, kind="module", **more):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"id": f"q{number}", "messages": messages, "kind": kind, **more}


QUESTIONS = [
    question(0, "Which module has dedent?", "textwrap"),
    question(1, "Which module has loads?", "json"),
    question(2, "Which module has gcd?", "math"),
    question(3, "What does dedent do?", "Removes leading whitespace.", "doc"),
    question(4, "What does gcd do?", "The greatest common divisor.", "doc", aliases=["It divides."]),
]
ANSWERS = {
    "module has dedent": "Textwrap.",
    "module has loads": "not json",
    "module has gcd": "math",
    "does dedent": "Removes whitespace.",
    "does gcd": "it divides",
}


@pytest.fixture
def chat(tmp_path):
    with DatasetWriter(tmp_path / "chat", "dataset.chat") as writer:
        for row in QUESTIONS:
            writer.add("validation", row)
        writer.add("test", question(9, "x" * 600, "json"))
    return Artifact(tmp_path / "chat", "dataset.chat")


def test_exact_match_overall_and_by_kind(tmp_path, model_dir, byte_tokenizer, chat, opens, scripted):
    opens({model_dir: scripted(byte_tokenizer, ANSWERS)})
    model = Artifact(model_dir, "model.hf")
    result = run_stage(EVAL, tmp_path / "a", model=model, data=[chat])
    m = result.metrics
    assert (m["exact_match.value"], m["exact_match.n"]) == (3 / 5, 5)
    assert (m["exact_match.module.value"], m["exact_match.doc.value"]) == (2 / 3, 1 / 2)
    assert m["exact_match.low"] < 3 / 5 < m["exact_match.high"]
    samples = [json.loads(line) for line in (result.outputs["metrics"] / "samples.jsonl").read_text().splitlines()]
    assert [sample["ok"] for sample in samples] == [True, False, True, False, True]
    assert samples[0] == {
        "task": "exact-match",
        "id": "q0",
        "question": "Which module has dedent?",
        "expected": "textwrap",
        "kind": "module",
        "answer": "Textwrap.",
        "ok": True,
    }
    assert (
        run_stage(EVAL, tmp_path / "b", {"match": "strict"}, model=model, data=[chat]).metrics["exact_match.value"]
        == 1 / 5
    )
    short = run_stage(EVAL, tmp_path / "c", {"max_new_tokens": 4}, model=model, data=[chat]).metrics
    assert short["exact_match.value"] == 1 / 5


def test_numbers_do_not_depend_on_the_batch(tmp_path, model_dir, byte_tokenizer, chat, opens, scripted):
    found = {}
    for size in (1, 2, 16):
        generator = scripted(byte_tokenizer, ANSWERS)
        opens({model_dir: generator})
        result = run_stage(
            EVAL, tmp_path / str(size), {"batch_size": size}, model=Artifact(model_dir, "model.hf"), data=[chat]
        )
        found[size] = (result.metrics, (result.outputs["metrics"] / "samples.jsonl").read_bytes())
        assert max(generator.batches) == min(size, 5)
    assert found[1] == found[2] == found[16]


def test_a_question_without_room_counts_as_wrong(tmp_path, model_dir, byte_tokenizer, chat, opens, scripted):
    opens({model_dir: scripted(byte_tokenizer, default="json")})
    result = run_stage(EVAL, tmp_path / "a", {"split": "test"}, model=Artifact(model_dir, "model.hf"), data=[chat])
    assert result.metrics["exact_match.value"] == 0
    assert any("1 of 1 rows exceed the context" in e["text"] for kind, e in result.events if kind == "warning")


def test_accuracy_by_likelihood(tmp_path, model_dir, byte_tokenizer, chat, opens, scripted):
    # The scripted model gives its script's letters 0.9 each, so the likeliest candidate is the script itself.
    right = {"module has dedent": "textwrap", "module has loads": "math", "module has gcd": "math"}
    opens({model_dir: scripted(byte_tokenizer, right, default="The greatest common divisor.")})
    result = run_stage(
        EVAL,
        tmp_path / "a",
        {"tasks": ["accuracy"], "candidates": 3},
        model=Artifact(model_dir, "model.hf"),
        data=[chat],
    )
    m = result.metrics
    samples = [json.loads(line) for line in (result.outputs["metrics"] / "samples.jsonl").read_text().splitlines()]
    assert [sample["ok"] for sample in samples] == [True, False, True, False, True]
    assert samples[1]["answer"] == "math"
    assert m["accuracy.value"] == 3 / 5
    assert m["accuracy.chance"] == pytest.approx((3 / 3 + 2 / 2) / 5)


def test_candidates_are_wrong_answers_of_the_same_kind():
    questions = [read_question(row, i) for i, row in enumerate(QUESTIONS)]
    found = with_candidates(questions, EvalParams(candidates=2, seed=1))
    assert all(one.candidates[0] == one.expected[0] and len(set(one.candidates)) == 2 for one in found)
    assert found[3].candidates[1] == "The greatest common divisor."
    assert found == with_candidates(questions, EvalParams(candidates=2, seed=1))
    seeds = {with_candidates(questions, EvalParams(candidates=2, seed=s))[0].candidates for s in range(9)}
    assert len(seeds) == 2
    with pytest.raises(InputError, match="no wrong answer"):
        with_candidates(questions[:1], EvalParams())


# Ranking


def pair(number, text, chosen, rejected):
    say = lambda role, content: [{"role": role, "content": content}]  # noqa: E731
    return {
        "id": f"p{number}",
        "prompt": say("user", text),
        "chosen": say("assistant", chosen),
        "rejected": say("assistant", rejected),
    }


PAIRS = [pair(i, f"question {i}?", f"right{i}", f"wrong{i}") for i in range(24)]


@pytest.fixture
def preference(tmp_path):
    with DatasetWriter(tmp_path / "preference", "dataset.preference") as writer:
        for row in PAIRS:
            writer.add("validation", row)
    return Artifact(tmp_path / "preference", "dataset.preference")


def knows(numbers, wrong=()):
    return {f"question {i}?": f"wrong{i}" if i in wrong else f"right{i}" for i in numbers}


def test_ranking_and_margin(tmp_path, model_dir, byte_tokenizer, preference, opens, scripted):
    opens({model_dir: scripted(byte_tokenizer, knows(range(24), wrong=range(6)))})
    m = run_stage(EVAL, tmp_path / "a", model=Artifact(model_dir, "model.hf"), data=[preference]).metrics
    assert (m["ranking.value"], m["ranking.n"]) == (18 / 24, 24)
    # By hand: the script costs ln .9 per letter and for the end; another word leaves it at its first letter, and every
    # letter after that, the end included, is one of V equally likely ones.
    letters, vocabulary = len("right0") + 1, byte_tokenizer.vocab_size
    likely = letters * math.log(0.9)
    unlikely = math.log(0.1 / (vocabulary - 1)) - (letters - 1) * math.log(vocabulary)
    extra = [len(str(i)) - 1 for i in range(24)]
    margins = [likely - unlikely + e * (math.log(0.9) + math.log(vocabulary)) for e in extra]
    signed = [-margin if i < 6 else margin for i, margin in enumerate(margins)]
    assert m["ranking.margin"] == pytest.approx(np.mean(signed), rel=1e-5)
    assert m["ranking.margin_low"] < m["ranking.margin"] < m["ranking.margin_high"]


def test_rise_over_a_reference(tmp_path, model_dir, byte_tokenizer, preference, opens, scripted):
    from shutil import copytree

    other = copytree(model_dir, tmp_path / "other")
    models = {
        model_dir: scripted(byte_tokenizer, knows(range(24), wrong=range(3))),
        other: scripted(byte_tokenizer, knows(range(24), wrong=range(12))),
    }
    opens(models)
    model, reference = Artifact(model_dir, "model.hf"), Artifact(other, "model.hf")

    def rise(name, model, reference):
        return run_stage(EVAL, tmp_path / name, model=model, reference=reference, data=[preference]).metrics

    up = rise("up", model, reference)
    assert (up["ranking.value"], up["ranking.reference"]) == (21 / 24, 12 / 24)
    assert up["ranking.rise"] == pytest.approx(9 / 24)
    assert 0 < up["ranking.rise_low"] < 9 / 24 < up["ranking.rise_high"]
    assert up["ranking.margin_rise"] > 0
    # Controls: the swapped pair falls, a model against itself does neither.
    down = rise("down", reference, model)
    assert down["ranking.rise"] == pytest.approx(-9 / 24)
    assert down["ranking.rise_high"] < 0
    same = rise("same", model, model)
    assert (same["ranking.rise_low"], same["ranking.rise"], same["ranking.rise_high"]) == (0, 0, 0)


# The stage


def test_one_model_on_everything_at_once(
    tmp_path, model_dir, byte_tokenizer, tokens, chat, preference, opens, scripted
):
    opens({model_dir: scripted(byte_tokenizer, ANSWERS)})
    model = Artifact(model_dir, "model.onnx")
    result = run_stage(EVAL, tmp_path / "a", model=model, data=[preference, tokens, chat])
    names = {name.partition(".")[0] for name in result.metrics}
    assert names == {"perplexity", "exact_match", "ranking", "backend", "tokenizer"}
    assert result.metrics["backend"] == "scripted"
    assert result.metrics["tokenizer"] == byte_tokenizer.digest
    written = json.loads((result.outputs["metrics"] / "metrics.json").read_text())
    assert written == result.metrics
    assert {e["task"] for kind, e in result.events if kind == "progress"} == {"perplexity", "exact-match", "ranking"}


def test_what_does_not_fit_together(tmp_path, model_dir, byte_tokenizer, tokens, chat, opens, scripted):
    opens({model_dir: scripted(byte_tokenizer)})

    def refused(match, data, **params):
        with pytest.raises(UsageError, match=match):
            run_stage(EVAL, tmp_path / "a", params, model=Artifact(model_dir, "model.onnx"), data=data)

    refused("task ranking needs dataset.preference", [chat], tasks=["ranking"])
    refused("two of dataset.chat", [chat, chat])
    refused("baseline xz belongs to task perplexity", [chat], baselines=["xz"])
    refused("splits names ranking", [chat], splits={"ranking": "test"})
    with pytest.raises(ValueError, match="task twice"):
        EvalParams(tasks=["ranking", "ranking"])
    with pytest.raises(InputError, match="no split `dev`"):
        run_stage(EVAL, tmp_path / "b", {"split": "dev"}, model=Artifact(model_dir, "model.onnx"), data=[chat])
    result = run_stage(
        EVAL, tmp_path / "c", {"tasks": ["exact-match"]}, model=Artifact(model_dir, "model.onnx"), data=[chat, tokens]
    )
    assert any("no task uses the dataset.tokens" in e["text"] for kind, e in result.events if kind == "warning")


def test_damaged_rows_are_named(tmp_path, model_dir, byte_tokenizer, opens, scripted):
    opens({model_dir: scripted(byte_tokenizer)})
    path = tmp_path / "rows.jsonl.gz"

    def run(kind, row, **params):
        path.write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
        params = {"split": "train", **params}
        run_stage(EVAL, tmp_path / "a", params, model=Artifact(model_dir, "model.hf"), data=[Artifact(path, kind)])

    with pytest.raises(InputError, match=r"row 0 \(x\) is no question"):
        run("dataset.chat", {"id": "x", "messages": [{"role": "user", "content": "?"}]})
    with pytest.raises(InputError, match="no `rejected` messages"):
        run("dataset.preference", {"prompt": PAIRS[0]["prompt"], "chosen": PAIRS[0]["chosen"]})


def test_a_stopped_run_goes_on_where_it_was(tmp_path, model_dir, byte_tokenizer, chat, opens, scripted):
    generator = scripted(byte_tokenizer, ANSWERS)
    opens({model_dir: generator})
    model = Artifact(model_dir, "model.hf")
    whole = run_stage(EVAL, tmp_path / "whole", {"batch_size": 2}, model=model, data=[chat])
    assert generator.batches == [2, 2, 1]
    generator.batches.clear()
    with pytest.raises(TempFail):
        run_stage(EVAL, tmp_path / "a", {"batch_size": 2}, stop_after=2, model=model, data=[chat])
    log = tmp_path / "a" / ".resume" / "model-exact-match.jsonl"
    log.write_bytes(log.read_bytes() + b'{"row": 2, "ok": tr')  # what a crash leaves
    rest = run_stage(EVAL, tmp_path / "a", {"batch_size": 2}, model=model, data=[chat])
    assert generator.batches == [2, 2, 1]  # nothing was asked twice
    assert rest.metrics == whole.metrics
    assert (rest.outputs["metrics"] / "samples.jsonl").read_bytes() == (
        whole.outputs["metrics"] / "samples.jsonl"
    ).read_bytes()


def test_the_log_keeps_whole_lines_only(tmp_path):
    log = SampleLog(tmp_path / "log.jsonl")
    log.add(1, {"ok": True})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"row": 0')
    again = SampleLog(tmp_path / "log.jsonl")
    again.add(0, {"ok": False})
    assert [sample["row"] for sample in SampleLog(tmp_path / "log.jsonl").in_order()] == [0, 1]


def test_every_parameter_is_read():
    """A parameter that no module mentions would do nothing."""
    from pathlib import Path

    import llmctl_eval

    source = "".join(p.read_text() for p in Path(llmctl_eval.__file__).parent.glob("*.py") if p.name != "params.py")
    for name in EvalParams.model_fields:
        assert f"params.{name}" in source, name


# Real models


def test_torch_and_onnx_give_the_numbers_of_transformers(tmp_path, real_models, chat, preference):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    hf, onnx = real_models
    tokenizer = Tokenizer.load(hf.path)
    tokens = write_tokens(tmp_path / "t", tokenizer, TEXTS)
    params = {"device": "cpu", "threads": 1, "max_new_tokens": 8}
    a, b = (
        run_stage(EVAL, tmp_path / kind.type, params, model=kind, data=[tokens, chat, preference])
        for kind in (hf, onnx)
    )
    model = AutoModelForCausalLM.from_pretrained(hf.path, dtype=torch.float32).eval()

    def logprobs(ids):
        with torch.inference_mode():
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return [float(scores[i, token]) for i, token in enumerate(ids[1:])]

    nats = [-x for text in TEXTS["validation"] for x in logprobs(tokenizer.encode_document(text))[:-1]]
    assert a.metrics["perplexity.nats"] == pytest.approx(np.mean(nats), abs=1e-5)
    assert b.metrics["perplexity.nats"] == pytest.approx(np.mean(nats), abs=1e-5)
    row = PAIRS[3]
    margin = []
    for part in ("chosen", "rejected"):
        ids = tokenizer.encode_chat([*row["prompt"], *row[part]]).ids
        margin.append(sum(logprobs(ids)[-len(row[part][0]["content"]) - 1 :]))
    for result in (a, b):
        samples = [json.loads(x) for x in (result.outputs["metrics"] / "samples.jsonl").read_text().splitlines()]
        found = next(sample["margin"] for sample in samples if sample["id"] == "p3")
        assert found == pytest.approx(margin[0] - margin[1], abs=1e-4)
    for name in ("exact_match.value", "ranking.value", "ranking.low", "exact_match.n"):
        assert a.metrics[name] == b.metrics[name]
    assert a.metrics["backend"].startswith("torch")
    assert b.metrics["backend"].startswith("onnxruntime")


@pytest.mark.parametrize("kind", [0, 1], ids=["torch", "onnx"])
def test_real_numbers_do_not_depend_on_the_batch(tmp_path, real_models, chat, kind):
    found = []
    for size in (1, 3, 5):
        params = {"device": "cpu", "threads": 1, "max_new_tokens": 24, "batch_size": size, "match": "strict"}
        result = run_stage(EVAL, tmp_path / str(size), params, model=real_models[kind], data=[chat])
        found.append((result.metrics, (result.outputs["metrics"] / "samples.jsonl").read_bytes()))
    assert found[0] == found[1] == found[2]
