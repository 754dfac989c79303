"""word2vec and GloVe: their closed optima, their gradients, their counts, and analogies that were planted."""

from __future__ import annotations

import json
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from llmctl import Artifact, InputError, StageError, UsageError
from llmctl.testing import run_stage
from llmctl.text import vectors as stored
from llmctl_embed import EMBED
from llmctl_embed.corpus import Corpus, build
from llmctl_embed.params import EmbedParams

from .conftest import PLANT, accuracy

torch = pytest.importorskip("torch")
from llmctl_embed import glove, losses, word2vec  # noqa: E402  # they need torch

V, D, K = 8, 8, 3


@pytest.fixture
def counts():
    drawn = torch.randint(1, 50, (V, V), generator=torch.Generator().manual_seed(0)).double()
    return drawn + drawn.T


def minimise(loss, *shapes):
    """Parameters at which `loss` of them is least, by L-BFGS in float64."""
    generator = torch.Generator().manual_seed(1)
    found = [
        torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.5).requires_grad_() for shape in shapes
    ]
    optimizer = torch.optim.LBFGS(
        found, max_iter=20_000, max_eval=30_000, tolerance_grad=1e-12, tolerance_change=1e-16,
        history_size=50, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss(*found)
        value.backward()
        return value

    optimizer.step(closure)
    return [tensor.detach() for tensor in found]


def test_negative_samplings_optimum_is_shifted_mutual_information(counts):
    noise = counts.sum(0) / counts.sum()
    words, contexts = minimise(lambda w, c: losses.sgns_loss(w @ c.T, counts, noise, K), (V, D), (V, D))
    mutual = (counts * counts.sum() / (counts.sum(1, keepdim=True) * counts.sum(0))).log()
    assert (words @ contexts.T - (mutual - np.log(K))).abs().max() < 1e-5
    assert (words @ contexts.T - mutual).abs().max() > 1  # without log k it would not hold


def test_gloves_optimum_is_the_logarithm(counts):
    def scores(w, c, b, d):
        return w @ c.T + b[:, None] + d

    found = minimise(lambda *p: losses.glove_loss(scores(*p), counts, 100, 0.75), (V, D), (V, D), (V,), (V,))
    assert (scores(*found) - counts.log()).abs().max() < 1e-5


@pytest.mark.parametrize("cbow", [False, True], ids=["skip-gram", "cbow"])
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
def test_a_step_of_word2vec_goes_along_the_gradient(cbow, mean):
    """Of the loss written out pair by pair; the wrong word that equals the right one is left out."""
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randn(V, 5, generator=generator).requires_grad_() for _ in range(2))
    block = word2vec.lay_out(np.array([1, 2, 3, 2, 7]), np.array([0, 0, 0, 1, 1]), np.array([2, 1, 2, 2, 1]), 2)
    wrong = torch.tensor([[4, 5], [2, 6], [0, 0], [1, 1], [3, 7]])
    contexts = [[2, 3], [1, 3], [1, 2], [7], [2]]
    loss = torch.zeros(())
    for word, others, around in zip([1, 2, 3, 2, 7], wrong.tolist(), contexts, strict=True):
        vectors = first[around]
        if cbow:
            vectors = (vectors.mean(0) if mean else vectors.sum(0)).unsqueeze(0)
        for vector in vectors:
            drawn = second[[other for other in others if other != word]]
            loss = loss + losses.sgns_sample_loss(vector[None], second[word][None], drawn[None])
    loss.backward()
    weights = word2vec.Weights(first.detach().clone(), second.detach().clone())
    taken = word2vec.Examples.of(block, wrong, mean=cbow and mean)
    size = sum(map(len, contexts)) if not cbow else 5
    assert word2vec.loss_of(weights, taken, cbow=cbow) * size == pytest.approx(loss.item(), rel=1e-5)
    word2vec.step(weights, taken, 0.1, cbow=cbow)
    torch.testing.assert_close(weights.inputs, (first - 0.1 * first.grad).detach())
    torch.testing.assert_close(weights.outputs, (second - 0.1 * second.grad).detach())


def test_a_step_of_glove_is_adagrad():
    """Once per pair, torch's own optimizer does the same from squares of 1."""
    weights = glove.Weights.fresh(V, 5, 3)
    before = weights.values.clone().requires_grad_()
    pairs, values = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([3.0, 150.0, 20.0])
    left, right = before[0, pairs[0]], before[1, pairs[1]]
    scores = (left[:, :-1] * right[:, :-1]).sum(1) + left[:, -1] + right[:, -1]
    loss = losses.glove_loss(scores, values, 100, 0.75)
    optimizer = torch.optim.Adagrad([before], lr=0.05, initial_accumulator_value=1.0, eps=0)
    loss.backward()
    said = glove.step(weights, pairs, values.log(), losses.glove_weights(values, 100, 0.75), 0.05)
    assert said == pytest.approx(loss.item(), rel=1e-5)
    state = before.detach() - 0.05 * before.grad  # glove.c divides by the squares before the step, which are 1
    torch.testing.assert_close(weights.values, state)
    optimizer.step()
    squares = optimizer.state[before]["sum"]
    torch.testing.assert_close(weights.squares, squares)


def test_counts_are_those_of_a_double_loop(monkeypatch):
    random = np.random.default_rng(0)
    ids, sentences = random.integers(0, 7, 200), np.sort(random.integers(0, 30, 200))
    expected = defaultdict(float)
    for i in range(200):
        for j in range(max(0, i - 4), min(200, i + 5)):
            if i != j and sentences[i] == sentences[j]:
                expected[int(ids[i]), int(ids[j])] += 1 / abs(i - j)
    for block in (1 << 20, 17):  # pairs across two blocks are counted too
        monkeypatch.setattr(glove, "BLOCK", block)
        found = glove.count(ids, sentences, 7, 4)
        said = {(int(a), int(b)): v for a, b, v in zip(found.words, found.contexts, found.values, strict=True)}
        assert said == pytest.approx(expected)


def test_windows_end_where_sentences_do_and_where_they_are_drawn():
    block = word2vec.lay_out(np.array([1, 2, 3, 4]), np.array([0, 0, 0, 1]), np.array([1, 2, 2, 2]), 2)
    rows = zip(block.words.tolist(), block.contexts, block.real, strict=True)
    assert {word: sorted(row[real].tolist()) for word, row, real in rows} == {1: [2], 2: [1, 3], 3: [1, 2]}


def test_frequent_words_are_thinned_out_and_noise_follows_the_exponent():
    counts = np.array([900, 90, 10])
    keep = word2vec.keep_shares(counts, 0.01)
    assert keep == pytest.approx([np.sqrt(1 / 90) + 1 / 90, np.sqrt(1 / 9) + 1 / 9, 1])
    assert (word2vec.keep_shares(counts, 0) == 1).all()
    assert word2vec.noise(counts, 0.75) == pytest.approx(counts**0.75 / (counts**0.75).sum())
    corpus = Corpus(("a", "b", "c"), counts, np.repeat(np.arange(3, dtype=np.int32), counts), np.zeros(1000, np.int32))
    params = EmbedParams(sample=0.01, window=1, shrink_windows=False)
    drawn = [block for _, block in word2vec.blocks(corpus, params, np.random.default_rng(0))]
    seen = np.bincount(torch.cat([block.words for block in drawn]).numpy(), minlength=3)
    assert seen == pytest.approx(counts * keep, rel=0.35)
    assert seen[0] < 200


def test_long_texts_are_cut_into_blocks_without_losing_a_word(monkeypatch):
    monkeypatch.setattr(word2vec, "BLOCK", 10)
    sentences = np.repeat(np.arange(6, dtype=np.int32), [4, 5, 25, 2, 2, 2])
    corpus = Corpus(("a", "b"), np.array([20, 20]), np.tile(np.array([0, 1], np.int32), 20), sentences)
    params = EmbedParams(sample=0, window=1, shrink_windows=False)
    found = list(word2vec.blocks(corpus, params, np.random.default_rng(0)))
    assert sum(len(block.words) for _, block in found) == 40
    assert [read for read, _ in found][-1] == 40


def test_words_are_counted_cut_and_ordered():
    corpus = build([["b", "a", "b", "c"], ["a", "b", "d", "d"]], 2, None, Path("x"))
    assert (corpus.words, corpus.counts.tolist()) == (("b", "a", "d"), [3, 2, 2])
    assert corpus.ids.tolist() == [0, 1, 0, 1, 0, 2, 2]
    assert corpus.sentences.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert build([["b", "a", "b", "c"]], 1, 2, Path("x")).words == ("b", "a")
    with pytest.raises(InputError, match="x has 0 words that occur 9 times or more"):
        build([["b", "a"]], 9, None, Path("x"))


def trained(planted, folder, **params):
    given = {**PLANT, **params}
    if given.get("method") == "glove":
        del given["sample"]  # of word2vec alone
    return stored.load(run_stage(EMBED, folder, given, text=planted).outputs["vectors"].path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["skip-gram", "cbow"])
def test_planted_analogies_are_found(planted, tmp_path, architecture):
    assert accuracy(trained(planted, tmp_path, architecture=architecture)) >= 0.95


@pytest.mark.slow
def test_planted_analogies_are_found_by_glove(planted, tmp_path):
    """By its word vectors. The text's graph has two sides, so half of the directions of both matrices are opposite."""
    assert accuracy(trained(planted, tmp_path, method="glove", epochs=200, matrix="input")) >= 0.95


def test_untrained_vectors_and_shuffled_counts_know_no_analogies(planted, tmp_path):
    assert accuracy(trained(planted, tmp_path / "untrained", epochs=0)) < 0.05
    shuffled = {"method": "glove", "shuffled": True, "epochs": 25, "matrix": "input"}
    assert accuracy(trained(planted, tmp_path / "shuffled", **shuffled)) < 0.05


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [{"text": "the cat sat on the mat\nthe dog sat on the log"}, {"text": "A dog's life, a cat's life"}] * 6
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Artifact(path, "dataset.text")


BASE = {"min_count": 1, "vector_size": 6, "window": 3, "epochs": 2, "sample": 0.0}


def matrix_of(small, tmp_path, name, **params):
    given = {**BASE, **params}
    if given.get("method") == "glove":
        del given["sample"]  # of word2vec alone
    return stored.load(run_stage(EMBED, tmp_path / name, given, text=small).outputs["vectors"].path)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 2}, {"window": 1}, {"epochs": 3}, {"lr": 0.5}, {"min_lr": 0.02}, {"architecture": "cbow"},
        {"negative": 2}, {"ns_exponent": -0.5}, {"sample": 0.05}, {"shrink_windows": False}, {"matrix": "output"},
        {"matrix": "sum"}, {"batch": 1}, {"unit": "line"}, {"normalise": True}, {"limit": 3},
        {"method": "glove"},
    ],
    ids=lambda changed: "-".join(changed),
)  # fmt: skip
def test_every_parameter_changes_the_vectors(small, tmp_path, changed):
    base, other = matrix_of(small, tmp_path, "base"), matrix_of(small, tmp_path, "other", **changed)
    assert base.matrix.shape == other.matrix.shape
    assert not np.array_equal(base.matrix, other.matrix)


@pytest.mark.parametrize(
    "changed", [{"x_max": 3.0}, {"weight_exponent": 0.1}, {"shuffled": True}, {"lr": 0.2}, {"batch": 1}], ids="-".join
)
def test_every_parameter_of_glove_changes_the_vectors(small, tmp_path, changed):
    base = matrix_of(small, tmp_path, "base", method="glove")
    assert not np.array_equal(base.matrix, matrix_of(small, tmp_path, "other", method="glove", **changed).matrix)


OTHER_VALUES = {
    "unit": "line", "split_words": "whitespace", "lowercase": False, "min_count": 2, "max_vocab": 9, "vector_size": 7,
    "window": 2, "epochs": 1, "lr": 0.02, "min_lr": 0.001, "architecture": "cbow", "negative": 2, "ns_exponent": 0.5,
    "sample": 0.0, "shrink_windows": False, "cbow_mean": False, "x_max": 9.0, "weight_exponent": 0.5, "shuffled": True,
    "matrix": "sum", "batch": 8, "seed": 2, "word": "cat", "pooling": "cls", "device": "cuda",
}  # fmt: skip
ANY_METHOD = {"method", "split", "limit", "normalise", "threads"}


def test_a_parameter_of_another_method_is_refused():
    """The method that a parameter is of stands in its description."""
    fields = EmbedParams.model_fields
    assert set(OTHER_VALUES) | ANY_METHOD == set(fields)
    for method in ("word2vec", "glove", "encode"):
        for name, value in OTHER_VALUES.items():
            of = fields[name].description.split(":")[0]
            fits = method in of or (of == "words" and method != "encode")
            given = {"method": method, name: value}
            if "cbow" in of and fits:
                EmbedParams.model_validate({**given, "architecture": "cbow"})
                fits = False  # with skip-gram
            if fits:
                EmbedParams.model_validate(given)
                continue
            with pytest.raises(ValidationError, match=f"{name} has no effect with"):
                EmbedParams.model_validate(given)
            EmbedParams.model_validate({**given, name: fields[name].default})  # a spec may say what is so anyway
    EmbedParams(method="encode", word="cat", lowercase=False)
    EmbedParams(device="cpu")


@pytest.mark.slow
def test_shuffled_counts_take_memory_for_themselves_and_not_for_all_pairs():
    words = 1500
    for share in (1 / 60, 1 / 40, 0.4, 0.9):
        values = np.arange(int(words * words * share), dtype=np.float64)
        counts = glove.Counts(values.astype(np.int64), values.astype(np.int64), values)
        tracemalloc.start()
        found = glove.shuffle(counts, words, 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * values.nbytes
        keys = found.words * words + found.contexts
        assert len(np.unique(keys)) == len(values) and found.values is values
        assert keys.min() >= 0 and keys.max() < words * words
        # Neither the pairs that are drawn nor their order lean to one side: means within five standard errors.
        error = words * words / np.sqrt(12 * len(keys) / 2)
        assert all(abs(half.mean() - words * words / 2) < 5 * error for half in np.array_split(keys, 2))


def test_training_that_diverges_says_so(small, tmp_path):
    with pytest.raises(StageError, match="diverged"):
        matrix_of(small, tmp_path, "o", method="glove", lr=1e30)


def test_the_mean_of_cbow_is_not_its_sum(small, tmp_path):
    both = [matrix_of(small, tmp_path, str(m), architecture="cbow", cbow_mean=m, lr=0.5).matrix for m in (True, False)]
    assert not np.array_equal(*both)


def test_a_seed_gives_the_same_bytes_and_words_are_split_as_said(small, tmp_path):
    first, again = (run_stage(EMBED, tmp_path / n, BASE, text=small).outputs["vectors"].path for n in "ab")
    assert (first / "vectors.safetensors").read_bytes() == (again / "vectors.safetensors").read_bytes()
    assert "dog's" in stored.load(first).names
    raw = matrix_of(small, tmp_path, "raw", split_words="whitespace", lowercase=False)
    assert {"A", "life,"} <= set(raw.names)
    assert len(matrix_of(small, tmp_path, "few", max_vocab=3, vector_size=4).names) == 3


def test_lines_of_files_are_texts(tmp_path):
    (tmp_path / "lines.txt").write_text("one two\n\ntwo one two\n")
    found = run_stage(EMBED, tmp_path / "o", BASE, text=Artifact(tmp_path / "lines.txt", "files"))
    assert stored.load(found.outputs["vectors"].path).info["counts"] == [3, 2]
    with pytest.raises(UsageError, match=r"split: train has no effect on .*lines.txt"):
        run_stage(EMBED, tmp_path / "s", {**BASE, "split": "train"}, text=Artifact(tmp_path / "lines.txt", "files"))


def test_a_method_without_its_input_says_so(small, tmp_path):
    with pytest.raises(UsageError, match="method: encode needs an encoder"):
        run_stage(EMBED, tmp_path / "o", {"method": "encode"}, text=small)
