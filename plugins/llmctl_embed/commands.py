"""`llmctl embeddings`: neighbours, analogies, agreement with people, and a map of vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl.console import table
from llmctl.errors import InputError, UsageError
from llmctl.spec.files import home_path, is_there
from llmctl.store.commands import format_option, print_as, store_option

if TYPE_CHECKING:
    from llmctl.text.vectors import Vectors

PAGE = "embeddings.html"
MOST = 300_000
"""Words that analogies know, as in gensim."""


def open_vectors(text: str, store: Path | None) -> Vectors:
    """What `text` names: a directory, a text file of vectors, or something in the store. InputError if it is none."""
    from llmctl.text.vectors import load

    path = home_path(text)
    if is_there(path):
        return load(path)
    from llmctl.store.store import Store

    return load(Store.open(store).resolve(text, ("embeddings",)).path)


@click.group()
def embeddings() -> None:
    """Look at vectors: neighbours, analogies, similarity, a map.

    VECTORS is what `embed` has made (a directory or a reference), or a file in word2vec's or GloVe's text format.
    """


@embeddings.command()
@click.argument("vectors")
@click.argument("words", nargs=-1, required=True)
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Neighbours of each.")
@store_option
@format_option
def neighbours(vectors: str, words: tuple[str, ...], top: int, store_path: Path | None, format_: str) -> None:
    """The nearest names of each of WORDS by cosine; of texts, WORDS are ids."""
    opened = open_vectors(vectors, store_path)
    rows = [opened.row(word) for word in words]
    found = opened.neighbours(opened.matrix[rows], top, [[row] for row in rows])
    value = [
        {"word": word, "neighbours": [_named(opened, near, cosine) for near, cosine in nearest]}
        for word, nearest in zip(words, found, strict=True)
    ]
    print_as(format_, value, lambda: "\n\n".join(_neighbour_table(one) for one in value))


def _named(vectors: Vectors, row: int, score: float) -> dict[str, Any]:
    text = {"text": vectors.rows[row].get("text", "")} if vectors.rows else {}
    return {"name": vectors.names[row], "score": score, **text}


def _neighbour_table(one: dict[str, Any]) -> str:
    texts = any("text" in row for row in one["neighbours"])
    rows = [
        (row["name"], f"{row['score']:.3f}", *([row["text"].replace("\n", " ")[:60]] if texts else []))
        for row in one["neighbours"]
    ]
    return table((one["word"], "COSINE", *(["TEXT"] if texts else [])), rows)


@embeddings.command()
@click.argument("vectors")
@click.argument("asked", nargs=-1, required=True, metavar="FILE|A B C")
@click.option(
    "--method", type=click.Choice(["3cosadd", "3cosmul"]), default="3cosadd", show_default=True, help="How to answer."
)
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Answers to A B C.")
@click.option(
    "--restrict-vocab",
    type=click.IntRange(1),
    default=MOST,
    show_default=True,
    help="Of a file: only so many words, the first, are known and are answers.",
)
@store_option
@format_option
@click.pass_context
def analogy(
    ctx: click.Context,
    vectors: str,
    asked: tuple[str, ...],
    method: str,
    top: int,
    restrict_vocab: int,
    store_path: Path | None,
    format_: str,
) -> None:
    """What is to C as B is to A; or how often that is right on a FILE of questions in Google's format."""
    from llmctl_embed import analogies

    if len(asked) not in (1, 3):
        raise UsageError(f"{len(asked)} words are no question", hint="give A B C, or a file of questions")
    _only(ctx, "top" if len(asked) == 1 else "restrict_vocab", "a file" if len(asked) == 1 else "A B C")
    opened, multiply = open_vectors(vectors, store_path), method == "3cosmul"
    if len(asked) == 3:
        a, b, c = (opened.row(word) for word in asked)
        (found,) = analogies.answers(opened, [(a, b, c)], top, multiply=multiply)
        said = [_named(opened, row, score) for row, score in found]
        print_as(format_, said, lambda: table(("ANSWER", "SCORE"), [(r["name"], f"{r['score']:.3f}") for r in said]))
        return
    questions = analogies.read_questions(Path(asked[0]))
    sections = analogies.evaluate(opened, questions, multiply=multiply, most=restrict_vocab)
    shown = [*sections, *analogies.totals(sections)]
    value = [{**vars(section), "accuracy": section.accuracy} for section in shown]
    print_as(format_, {"method": method, "sections": value}, lambda: _accuracy_table(shown))


def _only(ctx: click.Context, name: str, mode: str) -> None:
    """UsageError for an option that would be ignored."""
    if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
        raise UsageError(f"--{name.replace('_', '-')} has no effect with {mode}")


def _accuracy_table(sections: list[Any]) -> str:
    rows = [
        (s.name, f"{s.accuracy:.3f}" if s.asked else "-", str(s.right), str(s.asked), str(s.unknown)) for s in sections
    ]
    return table(("SECTION", "ACCURACY", "RIGHT", "ASKED", "UNKNOWN"), rows)


@embeddings.command()
@click.argument("vectors")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--columns",
    nargs=3,
    type=click.IntRange(1),
    default=(1, 2, 3),
    show_default=True,
    help="Columns of both words and the rating (SimLex-999: 1 2 4).",
)
@store_option
@format_option
def similarity(vectors: str, file: Path, columns: tuple[int, int, int], store_path: Path | None, format_: str) -> None:
    """How well cosines order the pairs of FILE (word, word, rating) as people do, by Spearman's correlation."""
    from llmctl_embed.similarity import agreement, read_ratings

    first, second, rating = (column - 1 for column in columns)
    found = agreement(open_vectors(vectors, store_path), read_ratings(file, first, second, rating)).to_dict()
    shown = [(name, "-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)) for name, v in found.items()]
    print_as(format_, found, lambda: table(("MEASURE", "VALUE"), shown))


@embeddings.command()
@click.argument("vectors")
@click.argument("words", nargs=-1)
@click.option("--top", type=click.IntRange(2), default=500, show_default=True, help="Without WORDS: the first so many.")
@click.option(
    "--method", type=click.Choice(["pca", "tsne"]), default="pca", show_default=True, help="tsne needs scikit-learn."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of tsne.")
@click.option("--groups", type=click.Path(path_type=Path), help="Colours: a name, a tab and its group a line.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default=Path(PAGE), show_default=True)
@store_option
@click.pass_context
def project(
    ctx: click.Context,
    vectors: str,
    words: tuple[str, ...],
    top: int,
    method: str,
    seed: int,
    groups: Path | None,
    output: Path,
    store_path: Path | None,
) -> None:
    """Draw VECTORS, or those of WORDS, in two dimensions as a page with names under the pointer."""
    from llmctl_embed import projection

    if words:
        _only(ctx, "top", "WORDS")
    if method == "pca":
        _only(ctx, "seed", "pca")
    opened = open_vectors(vectors, store_path)
    rows = [opened.row(word) for word in words] if words else list(range(min(top, len(opened.names))))
    if len(rows) < 2:
        raise UsageError("one point is no map", hint="give two words or more")
    names = [opened.names[row] for row in rows]
    if method == "pca":
        placed, shares = projection.pca(opened.unit[rows])
        note = f"{len(rows)} vectors of length 1, two axes of PCA: {shares[0]:.1%} and {shares[1]:.1%} of the variance"
    else:
        placed, note = projection.tsne(opened.unit[rows], seed), f"{len(rows)} vectors of length 1, t-SNE, seed {seed}"
    told = _groups(groups) if groups else {}
    html = projection.page(f"Vectors of {vectors}", note, placed, names, [told.get(name, "") for name in names])
    try:
        projection.write_page(output, html)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}", hint="-o says where") from error
    click.echo(f"{note}\n{output}")


def _groups(path: Path) -> dict[str, str]:
    from llmctl.text.datasets import read_lines

    found = {}
    for number, line in read_lines(path):
        cells = line.rstrip("\n").split("\t")
        if len(cells) != 2:
            raise InputError(f"{path}:{number}: no name and group", hint="a name, a tab, a group")
        found[cells[0]] = cells[1]
    return found
