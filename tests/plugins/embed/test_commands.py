"""`llmctl embeddings` beside gensim 4.4 on the same vectors (tests/plugins/embed/gensim), and damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from llmctl import InputError, UsageError
from llmctl.store import types
from llmctl.text.vectors import Vectors, largest, load, read_text
from llmctl_embed import analogies, projection, similarity
from llmctl_embed.commands import embeddings

FOLDER = Path(__file__).parent / "gensim"
SAID = json.loads((FOLDER / "said.json").read_text())


@pytest.fixture(scope="module")
def vectors():
    return load(FOLDER / "vectors.txt")


def said(*arguments):
    done = CliRunner().invoke(embeddings, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False)
    return done.output


def test_gensim_reads_the_same_vectors(vectors):
    assert list(vectors.names) == SAID["words"]
    assert vectors.matrix[0].tolist() == SAID["first"]
    assert float(vectors.matrix.astype(np.float64).sum()) == SAID["sum"]


def test_neighbours_are_gensims():
    words = list(SAID["neighbours"])
    found = json.loads(said("neighbours", FOLDER / "vectors.txt", *words, "--top", 5, "--format", "json"))
    for one in found:
        expected = SAID["neighbours"][one["word"]]
        assert [row["name"] for row in one["neighbours"]] == [name for name, _ in expected]
        assert [row["score"] for row in one["neighbours"]] == pytest.approx([s for _, s in expected], abs=1e-5)


@pytest.mark.parametrize("method", ["3cosadd", "3cosmul"])
def test_answers_are_gensims(method):
    words = ("w1x0", "w1x1", "w2x0")
    found = json.loads(
        said("analogy", FOLDER / "vectors.txt", *words, "--method", method, "--top", 5, "--format", "json")
    )
    assert [row["name"] for row in found] == [name for name, _ in SAID[method]]
    assert not {row["name"] for row in found} & set(words)
    if method == "3cosmul":  # gensim divides the sum of 3CosAdd by its length
        assert [row["score"] for row in found] == pytest.approx([score for _, score in SAID[method]], abs=1e-4)


@pytest.mark.parametrize("most", [300_000, 60])
@pytest.mark.parametrize(("method", "theirs"), [("3cosadd", "most_similar"), ("3cosmul", "most_similar_cosmul")])
def test_accuracy_is_gensims(method, theirs, most):
    shown = said(
        "analogy", FOLDER / "vectors.txt", FOLDER / "questions.txt", "--method", method, "--restrict-vocab", most,
        "--format", "json",
    )  # fmt: skip
    found = {row["name"]: row for row in json.loads(shown)["sections"]}
    expected = SAID[f"{theirs} {most}"]
    names = {"kinds": "semantic", "gram1-roles": "syntactic", "Total accuracy": "total"}
    for section, total in names.items():
        assert [found[total]["right"], found[total]["asked"]] == expected[section]
        if section in found:
            assert [found[section]["right"], found[section]["asked"]] == expected[section]
    assert sum(found["total"][name] for name in ("asked", "unknown")) == 123


def test_random_vectors_know_no_analogies(vectors):
    drawn = np.random.default_rng(0).standard_normal(vectors.matrix.shape).astype(np.float32)
    sections = analogies.evaluate(Vectors(vectors.names, drawn), analogies.read_questions(FOLDER / "questions.txt"))
    assert analogies.totals(sections)[-1].accuracy < 0.05


def test_agreement_is_gensims():
    found = json.loads(said("similarity", FOLDER / "vectors.txt", FOLDER / "pairs.tsv", "--format", "json"))
    assert found["spearman"] == pytest.approx(SAID["pairs"]["spearman"], abs=1e-6)
    assert found["pearson"] == pytest.approx(SAID["pairs"]["pearson"], abs=1e-6)
    assert 100 * found["unknown"] / (found["pairs"] + found["unknown"]) == pytest.approx(SAID["pairs"]["unknown"])


def test_ratings_have_a_header_and_columns(tmp_path):
    path = tmp_path / "simlex.txt"
    path.write_text("word1\tword2\tPOS\tSimLex999\nold\tnew\tA\t1.58\n")
    assert similarity.read_ratings(path, 0, 1, 3) == [("old", "new", 1.58)]
    path.write_text("old,new,1.5\nold,new\n")
    with pytest.raises(InputError, match="simlex.txt:2: no two words and a rating"):
        similarity.read_ratings(path)


def test_equal_cosines_are_in_the_order_of_their_rows():
    assert largest(np.array([1.0, 3, 2, 3, 3]), 2).tolist() == [1, 3]
    assert largest(np.array([1.0, 3]), 5).tolist() == [1, 0]


def test_questions_that_are_none(tmp_path):
    path = tmp_path / "q.txt"
    for text, problem in (("a b c\n", "q.txt:1: 3 words"), (": empty\n", "holds no questions")):
        path.write_text(text)
        with pytest.raises(InputError, match=problem):
            analogies.read_questions(path)
    with pytest.raises(UsageError, match="2 words are no question"):
        said("analogy", FOLDER / "vectors.txt", "a", "b")
    with pytest.raises(UsageError, match="--top has no effect with a file"):
        said("analogy", FOLDER / "vectors.txt", FOLDER / "questions.txt", "--top", 3)
    with pytest.raises(InputError, match="'nowhere' has no vector"):
        said("neighbours", FOLDER / "vectors.txt", "nowhere")


def test_the_first_two_axes_are_those_of_scikit_learn(vectors):
    decomposition = pytest.importorskip("sklearn.decomposition")
    placed, shares = projection.pca(vectors.unit)
    other = decomposition.PCA(2, svd_solver="full").fit(vectors.unit.astype(np.float64))
    assert np.abs(np.abs(placed) - np.abs(other.transform(vectors.unit.astype(np.float64)))).max() < 1e-5
    assert shares == pytest.approx(other.explained_variance_ratio_)


def test_a_page_names_each_point_and_escapes_it(tmp_path):
    groups, output = tmp_path / "groups.tsv", tmp_path / "page.html"
    groups.write_text("w1x0\t<first>\n")
    words = ("w1x0", "w2x0", "w3x1")
    shown = said("project", FOLDER / "vectors.txt", *words, "--groups", groups, "-o", output)
    assert shown.splitlines()[-1] == str(output)
    page = output.read_text()
    assert page.count("<circle") == 3
    assert "<title>w1x0 (&lt;first&gt;)</title>" in page
    assert "<title>w2x0</title>" in page
    with pytest.raises(UsageError, match="one point is no map"):
        said("project", FOLDER / "vectors.txt", "w1x0", "-o", output)


def test_vectors_come_back_and_text_is_exact(vectors, tmp_path):
    vectors.save(tmp_path / "v")
    again = load(tmp_path / "v")
    assert list(again.names) == list(vectors.names)
    assert np.array_equal(again.matrix, vectors.matrix)
    assert np.array_equal(read_text(tmp_path / "v" / "vectors.txt").matrix, vectors.matrix)
    lines = (tmp_path / "v" / "vectors.txt").read_text().splitlines()[1:]
    (tmp_path / "glove.txt").write_text("\n".join(lines) + "\n")
    assert np.array_equal(load(tmp_path / "glove.txt").matrix, vectors.matrix)
    assert types.guess(tmp_path / "v") == "embeddings"
    assert types.check("embeddings", tmp_path / "v")["vectors"] == len(vectors.names)
    (tmp_path / "v" / "vocab.txt").write_text("one\n")
    with pytest.raises(types.Unfit, match="vocab.txt has 1 lines"):
        types.check("embeddings", tmp_path / "v")
    with pytest.raises(InputError, match="has 1 names and"):
        load(tmp_path / "v")


@pytest.mark.parametrize("wrong", ["nan", "inf", "1e99"])
def test_vectors_that_are_no_numbers_are_refused(vectors, tmp_path, wrong):
    """Else such a word would be nobody's neighbour, and its own neighbours any words."""
    (tmp_path / "v.txt").write_text(f"a 1 2\nb 1 {wrong}\n")
    with pytest.raises(InputError, match=r"v.txt:2: the vector of 'b' is not finite"):
        said("neighbours", tmp_path / "v.txt", "a")
    matrix = vectors.matrix.copy()
    matrix[3, 1] = np.float64(wrong).astype(np.float32) if wrong != "1e99" else np.inf
    Vectors(vectors.names, matrix).save(tmp_path / "v")
    with pytest.raises(InputError, match=f"the vector of {vectors.names[3]!r} is not finite"):
        load(tmp_path / "v")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("2 2\na 1 2\n", "holds 1 vectors, its first line says 2"), ("a 1 2\nb 1\n", ":2: no name"), ("", "holds 0 vec")],
    ids=["short", "ragged", "empty"],
)
def test_damaged_text_is_refused(tmp_path, text, problem):
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(InputError, match=problem):
        load(tmp_path / "v.txt")
