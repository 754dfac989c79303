"""`probe`: beside scikit-learn, its states beside transformers, and a planted grammar that is learnt step by step."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest

from llmctl import Artifact, InputError, TempFail, UsageError
from llmctl.registry import get_registry
from llmctl.testing import run_stage
from llmctl.text.datasets import DatasetWriter
from llmctl_embed import PROBE
from llmctl_embed.probe_params import ProbeParams

torch = pytest.importorskip("torch")

from llmctl_embed.linear_probe import Labelled, fit, labels_by_chance, probe  # noqa: E402  # needs torch

TOPICS, EACH = ("sea", "farm", "town", "sky"), 12
KINDS = ("noun", "verb", "adj")
SHARED = {"det": [f"det{n}" for n in "abcdef"], "conj": ["and", "or", "but", "so"]}


def sentence(drawn):
    """(topic, words, their classes): two clauses of one topic, in a fixed order of classes."""
    topic, words, classes = drawn.choice(TOPICS), [], []
    for clause in range(2):
        for kind in (["conj"] if clause else []) + ["det", "adj", "noun", "verb", "det", "noun"]:
            words.append(drawn.choice(SHARED.get(kind) or [f"{topic}{kind}{n}" for n in "abcdefghijkl"]))
            classes.append(kind)
    return topic, words, classes


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    drawn = random.Random(5)
    folder = tmp_path_factory.mktemp("labelled") / "rows"
    with DatasetWriter(folder, "dataset.labelled") as writer:
        for split, count in (("train", 250), ("validation", 120)):
            for _ in range(count):
                topic, words, classes = sentence(drawn)
                writer.add(split, {"tokens": words, "labels": classes, "topic": topic})
    return Artifact(folder, "dataset.labelled")


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """The same grammar as text, every word a token."""
    base, drawn = tmp_path_factory.mktemp("grammar"), random.Random(6)
    with DatasetWriter(base / "text", "dataset.text") as writer:
        for number in range(4000):
            split = "validation" if number % 50 == 0 else "train"
            writer.add(split, {"id": str(number), "text": " ".join(sentence(drawn)[1])})
    params = {"kind": "word", "vocab_size": 159, "special": "roberta"}
    text = Artifact(base / "text", "dataset.text")
    return run_stage(get_registry().stages["tokenize"], base / "tokens", params, text=text).outputs


STEPS = (20, 100, 1000)
MODEL = {"preset": "roberta", "dim": 24, "layers": 2, "heads": 2, "ff_dim": 48, "context": 32}
TRAIN = {"batch_size": 64, "lr": 5e-3, "embedding_lr": 5e-3, "schedule": "constant", "warmup_steps": 5, "threads": 1}


def train(folder, tokenized, steps, kept):
    """The model after each of `steps` of one training, which goes on where it ended."""
    found = []
    for step in steps:
        inputs = {"tokens": tokenized["tokens"], "tokenizer": tokenized["tokenizer"]}
        params = {**MODEL, **TRAIN, "max_steps": step}
        made = run_stage(get_registry().stages["train-pretrain"], folder, params, **inputs).outputs["model"]
        found.append(Artifact(shutil.copytree(made.path, kept / f"step-{step}"), "model.hf"))
    return found


@pytest.fixture(scope="module")
def early(tmp_path_factory, tokenized):
    """A model after two steps, for what does not depend on what it has learnt."""
    folder = tmp_path_factory.mktemp("early")
    return train(folder / "run", tokenized, [2], folder)[0]


@pytest.mark.slow
def test_classes_and_topics_are_learnt_step_by_step_and_shuffled_labels_never(tmp_path, tokenized, labelled):
    models = train(tmp_path / "run", tokenized, STEPS, tmp_path)
    params = {"labels": ["labels", "topic"], "steps": list(STEPS)}
    result = run_stage(PROBE, tmp_path / "probe", params, models=models, data=labelled)
    rows = json.loads((result.outputs["report"] / "probe.json").read_text())
    for column in params["labels"]:
        own = [row for row in rows if row["column"] == column]
        assert [row["step"] for row in own] == [0, *STEPS]
        right, selective = ([row[name] for row in own] for name in ("accuracy", "selectivity"))
        assert right[-1] > right[0] + 0.15
        assert right[-1] >= 0.95
        assert selective[-1] > selective[0] + 0.15
        # Not one step falls back by more than the few words that a probe gets right by accident.
        assert all(later > earlier - 0.02 for earlier, later in zip(right, right[1:], strict=False))
        assert all(row["shuffled"] < row["majority"] + 0.1 for row in own)
    # The grammar's classes are there when nothing is known of topics yet.
    early = {row["column"]: row for row in rows if row["step"] == STEPS[0]}
    assert early["labels"]["accuracy"] > 0.9 > 0.5 > early["topic"]["accuracy"]
    assert result.metrics["topic.gain"] == pytest.approx(right[-1] - right[0])


def gaussian(drawn, count, apart):
    classes = drawn.integers(0, 3, count)
    return drawn.standard_normal((count, 6)) * [1, 5, 1, 0.1, 1, 30] + apart * np.eye(3, 6)[classes], classes


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_probe_is_scikit_learns_logistic_regression(l2):
    linear = pytest.importorskip("sklearn.linear_model")
    drawn = np.random.default_rng(0)
    (train, classes), (test, _) = gaussian(drawn, 400, 1.5), gaussian(drawn, 200, 1.5)
    found = fit(train.astype(np.float32), classes, 3, l2)
    scaled = (train.astype(np.float32).astype(np.float64) - found.mean) / found.scale
    # They sum over examples where ours takes the mean.
    theirs = linear.LogisticRegression(C=1 / (l2 * len(train)), tol=1e-10, max_iter=10_000).fit(scaled, classes)
    assert np.abs(found.weights.T - theirs.coef_).max() < 1e-4
    centred = found.bias - found.bias.mean(), theirs.intercept_ - theirs.intercept_.mean()
    assert np.abs(centred[0] - centred[1]).max() < 1e-4
    assert np.array_equal(found.predict(test), theirs.predict((test - found.mean) / found.scale))


def words_of(drawn, count, kinds=40, size=8, said=0.0):
    """Vectors of words that know their word by noise of its own, and `said` of its class."""
    names = [f"w{n}" for n in range(kinds)]
    own = np.random.default_rng(9).standard_normal((kinds, size))
    rows = drawn.integers(0, kinds, count)
    classes = rows % 2
    vectors = own[rows] + said * np.eye(2, size)[classes] + 0.1 * drawn.standard_normal((count, size))
    return Labelled(vectors, [names[row] for row in rows], [f"c{one}" for one in classes])


def test_selectivity_tells_what_is_said_from_what_is_learnt_by_heart():
    drawn = np.random.default_rng(1)
    wide = [words_of(drawn, 600, size=64) for _ in range(2)]
    by_heart = probe(*wide, 1e-3, 1)
    assert by_heart.accuracy > 0.95  # 40 words in 64 numbers: any labels can be told apart,
    assert abs(by_heart.selectivity) < 0.05  # and labels by chance as well
    said = probe(words_of(drawn, 600, said=6.0), words_of(drawn, 300, said=6.0), 1e-3, 1)
    assert said.accuracy > 0.99
    assert said.selectivity > 0.15
    assert abs(said.shuffled - 0.5) < 0.15
    assert 0.4 < said.majority < 0.6


def test_labels_by_chance_belong_to_words_and_are_as_frequent():
    train = words_of(np.random.default_rng(0), 500, kinds=400)
    test = words_of(np.random.default_rng(1), 500, kinds=500)
    found = labels_by_chance(train, test, np.random.default_rng(3))
    assert set(found) == {*train.words, *test.words}
    share = np.mean([label == "c0" for label in found.values()])
    assert abs(share - np.mean([label == "c0" for label in train.labels])) < 0.1


def test_a_label_that_was_never_learnt_is_not_right():
    drawn = np.random.default_rng(1)
    train, test = words_of(drawn, 300, said=6.0), words_of(drawn, 100, said=6.0)
    other = Labelled(test.vectors, test.words, ["c9"] * 50 + list(test.labels[50:]))
    assert probe(train, other, 1e-3, 1).accuracy == pytest.approx(probe(train, test, 1e-3, 1).accuracy / 2, abs=0.06)


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_states_are_transformers(early, labelled, layer):
    from transformers import RobertaModel

    from llmctl.text.tokenizer import Tokenizer
    from llmctl.train.reading import open_reader
    from llmctl_embed.word_states import read_sentences, word_states

    sentences = read_sentences(labelled, "train", ["labels"], 3)
    tokenizer = Tokenizer.load(early.path)
    found = word_states(open_reader(early.path, "cpu", states=True), tokenizer, sentences, layer)
    model = RobertaModel.from_pretrained(str(early.path), add_pooling_layer=False).eval()
    expected = []
    for one in sentences:
        ids = torch.tensor([tokenizer.frame(" ".join(one.words)).ids])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        assert ids.shape[1] == len(one.words) + 2  # a token for each word, between two special ones
        expected.append(states[2 if layer is None else layer][0, 1:-1].numpy())
    assert found.places == [(row, word) for row in range(3) for word in range(len(sentences[row].words))]
    assert np.abs(found.vectors - np.concatenate(expected)).max() < 1e-5


def test_a_word_of_several_tokens_has_the_mean_of_their_states(tmp_path, write_tokenizer):
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer
    from llmctl.text.tokenizer import Tokenizer
    from llmctl.train.reading import open_reader
    from llmctl_embed.word_states import Sentence, word_states

    config = ModelConfig(arch="llama", vocab_size=262, dim=16, layers=1, heads=2, kv_heads=2, ff_dim=32, context=24)
    save_model(Transformer(config), tmp_path / "model", write_tokenizer(tmp_path / "tokenizer"))
    reader, tokenizer = open_reader(tmp_path / "model", "cpu", states=True), Tokenizer.load(tmp_path / "model")
    long = Sentence(["far"] * 9, {})
    found = word_states(reader, tokenizer, [Sentence(["ab", "cde"], {}), long], None)
    states = reader.run([tokenizer.frame("ab cde").ids])["last_hidden_state"][0]
    assert found.places == [(0, 0), (0, 1)]
    assert found.too_long == 1
    # BOS, two bytes, then the space and three: a space belongs to what follows it, where the tokenizer has it so.
    assert np.abs(found.vectors[0] - states[1:3].mean(axis=0)).max() < 1e-6


def test_what_is_written(tmp_path, early, labelled):
    params = {"labels": ["labels", "topic"], "steps": [2], "limit": 40}
    result = run_stage(PROBE, tmp_path / "o", params, models=[early], data=labelled)
    m = result.metrics
    assert m["models"] == 2
    rows = json.loads((result.outputs["report"] / "probe.json").read_text())
    assert [(row["step"], row["column"]) for row in rows] == [
        (0, "labels"), (0, "topic"), (2, "labels"), (2, "topic")
    ]  # fmt: skip
    last = rows[2]
    for name in ("accuracy", "control", "selectivity", "shuffled", "majority"):
        assert m[f"labels.{name}"] == last[name]
    assert m["labels.gain"] == pytest.approx(last["accuracy"] - rows[0]["accuracy"])
    assert last["selectivity"] == pytest.approx(last["accuracy"] - last["control"])
    curves = [json.loads(line) for line in (result.outputs["metrics"] / "curves.jsonl").read_text().splitlines()]
    assert [(point["step"], point["labels.accuracy"]) for point in curves] == [
        (0, rows[0]["accuracy"]), (2, last["accuracy"])
    ]  # fmt: skip
    assert result.curve("topic.accuracy") == [(0, rows[1]["accuracy"]), (2, rows[3]["accuracy"])]
    page = (result.outputs["report"] / "probe.html").read_text()
    assert page.count("<svg") == 2
    assert f"{last['accuracy']:.3f}" in page
    table = [fields["text"] for kind, fields in result.events if kind == "log"]
    assert table[0].split() == ["STEP", "COLUMN", "ACCURACY", "CONTROL", "SELECTIVITY", "SHUFFLED", "MAJORITY"]
    assert len(table) == 5
    again = run_stage(PROBE, tmp_path / "again", params, models=[early], data=labelled)
    for name in ("probe.json", "probe.html"):
        assert (result.outputs["report"] / name).read_bytes() == (again.outputs["report"] / name).read_bytes()


@pytest.mark.parametrize(
    "changed",
    [{"layer": 0}, {"l2": 3.0}, {"seed": 2}, {"limit": 10}, {"untrained": False}, {"labels": ["topic"]},
     {"split": "validation", "test_split": "train"}, {"steps": [7]}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_every_parameter_changes_the_rows(tmp_path, early, labelled, changed):
    base = {"limit": 30, "untrained": True}
    one, other = (
        run_stage(PROBE, tmp_path / name, params, models=[early], data=labelled).outputs["report"] / "probe.json"
        for name, params in (("base", base), ("other", {**base, **changed}))
    )
    assert one.read_text() != other.read_text()


def test_mistakes_are_explained(tmp_path, early, labelled):
    def said(error, problem, data=labelled, **params):
        with pytest.raises(error, match=problem):
            run_stage(PROBE, tmp_path / "o", {"limit": 5, **params}, models=[early], data=data)

    said(UsageError, "2 steps are named for 1 models", steps=[1, 2])
    said(InputError, "column `pos` holds no label, and no list of them", labels=["pos"])
    said(InputError, "the model has no layer 2", layer=2)
    said(InputError, "no split `test`", test_split="test")
    for row, problem in (
        ({"tokens": ["a", "b"], "labels": ["x", "x"]}, "has one label only, 'x'"),
        ({"tokens": ["a", "b"], "labels": ["x", "y"], "topic": ["z"]}, "`topic` has 1 labels for 2 words"),
        ({"tokens": ["deta"] * 40, "labels": ["x", "y"] * 20}, "no word has a state"),
    ):
        folder = tmp_path / problem[:8]
        with DatasetWriter(folder, "dataset.labelled") as writer:
            for split in ("train", "validation"):
                writer.add(split, row)
        columns = ["labels", "topic"] if "topic" in row else ["labels"]
        said(InputError, problem, Artifact(folder, "dataset.labelled"), labels=columns)
    for params, problem in (
        ({"steps": [0, 5]}, "step 0 is the untrained model"),
        ({"steps": [5, 5]}, "different numbers"),
        ({"labels": ["a", "a"]}, "stands twice"),
        ({"test_split": "train"}, "split and test_split are both `train`"),
    ):
        with pytest.raises(ValueError, match=problem):
            ProbeParams(**params)


def test_stopping(tmp_path, early, labelled):
    with pytest.raises(TempFail):
        run_stage(PROBE, tmp_path / "o", {"limit": 5}, stop_after=1, models=[early], data=labelled)
