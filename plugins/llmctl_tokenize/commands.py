"""`llmctl tokenizers`: compare, inspect, import and try tokenizers; check and convert token shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmctl import InputError, UsageError

if TYPE_CHECKING:
    from llmctl_tokenize.comparison import Measures, WorstCase

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".c", ".h", ".js", ".html", ".json")


@click.group()
def tokenizers() -> None:
    """Compare, inspect, import and try tokenizers; check and convert token shards.

    A tokenizer is a directory with a tokenizer.json, an artifact of the store, or an hf:// address.
    """


@tokenizers.command()
@click.argument("tokenizers", nargs=-1, required=True)
@click.option(
    "--text", "texts", multiple=True, required=True, metavar="[NAME=]PATH",
    help="A text file, a directory of them, or a dataset.text; once for each language, code, …",
)  # fmt: skip
@click.option("--by", metavar="COLUMN", help="Tell the rows of datasets apart by a column, such as a language.")
@click.option("--train", multiple=True, metavar="PATH", help="What KIND:SIZE is trained on; unset: the texts.")
@click.option("--width", type=click.IntRange(1), default=768, show_default=True, help="Columns of the embedding.")
@click.option("--weight-bytes", type=click.IntRange(1, 8), default=2, show_default=True, help="Bytes of a weight.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with plots.")
@json_option
def compare(
    tokenizers: Sequence[str], texts: Sequence[str], by: str | None, train: Sequence[str], width: int,
    weight_bytes: int, html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure TOKENIZERS on texts: fertility, bytes per token, unknown words, vocabulary use, worst cases.

    `bpe:4096`, `unigram:4096`, `word:4096`, `char` (and `word` for all words) are trained on the spot.
    """
    from llmctl_tokenize import comparison

    named = _named_texts(texts, by)
    everything = [text for found in named.values() for text in found]
    training = [text for path in train for text in _read(path)] if train else everything
    measures, worst, words = comparison.compare(tokenizers, named, training, width, weight_bytes)
    if html:
        from llmctl_tokenize.page import render

        html.write_text(render(measures, worst, words), encoding="utf-8")
    if as_json:
        click.echo(
            json.dumps(
                {
                    "measures": [found.as_json() for found in measures],
                    "worst_cases": [{**case.__dict__, "bytes_per_token": case.bytes_per_token} for case in worst],
                    "longest_words": {name: [[w, n] for w, n in found] for name, found in words.items()},
                },
                indent=2,
            )
        )
        return
    click.echo(_measure_table(measures))
    click.echo()
    click.echo(_worst_table(worst))
    click.echo()
    for name, found in words.items():
        shown = ", ".join(f"{word if len(word) <= 40 else word[:39] + '…'} ({count})" for word, count in found)
        click.echo(f"most tokens for one word, {name}: {shown}")


def _measure_table(measures: Sequence[Measures]) -> str:
    from llmctl.console import human_bytes, table

    headers = (
        "text", "tokenizer", "vocabulary", "tokens", "per word", "bytes/token", "unknown", "used", "per document",
        "longest", "embedding",
    )  # fmt: skip
    rows = [
        (
            m.text, m.tokenizer, m.vocab_size, m.tokens, f"{m.fertility:.3f}", f"{m.bytes_per_token:.3f}",
            f"{m.unknown_rate:.2%}", f"{m.vocabulary_use:.1%}", f"{m.sequence_length:.1f}", m.longest,
            human_bytes(m.embedding_bytes),
        )
        for m in measures
    ]  # fmt: skip
    return table(headers, rows)


def _worst_table(worst: Sequence[WorstCase]) -> str:
    from llmctl.console import table

    headers = ("worst case", "tokenizer", "bytes", "tokens", "bytes/token", "ms", "comes back")
    rows = [
        (
            c.input, c.tokenizer, c.bytes, c.tokens, f"{c.bytes_per_token:.3f}", f"{c.milliseconds:.1f}",
            "yes" if c.returned else "no",
        )
        for c in worst
    ]  # fmt: skip
    return table(headers, rows)


def _named_texts(texts: Sequence[str], by: str | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for given in texts:
        name, _, path = given.rpartition("=")
        for key, text in _read_rows(path, by):
            found.setdefault("/".join(filter(None, (name, key))) or Path(path).stem, []).append(text)
    if not found:
        raise InputError("the texts are empty")
    return found


def _read(path: str) -> list[str]:
    return [text for _, text in _read_rows(path, None)]


def _read_rows(given: str, by: str | None) -> list[tuple[str, str]]:
    """(value of the column `by` or "", text) of each document."""
    path = Path(given)
    if path.is_file() and not path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        files = [path]
    elif path.is_dir() and not (path / "dataset_info.json").is_file():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    else:
        return _read_dataset(given, by)
    if not files:
        return _read_dataset(given, by)
    if by:
        raise UsageError(f"{given} has no columns, --by is for datasets")
    try:
        return [("", file.read_text(encoding="utf-8")) for file in files]
    except UnicodeDecodeError as error:
        raise InputError(f"{given} holds a file that is no UTF-8: {error}", hint="convert it first") from error


def _read_dataset(given: str, by: str | None) -> list[tuple[str, str]]:
    from llmctl.store import Store
    from llmctl.text.datasets import read_rows, splits

    path = Path(given) if Path(given).exists() else Store.open().resolve(given, ("dataset.text",)).path
    rows = [row for split in splits(path) for row in read_rows(path, split)]
    if by and (missing := next((row for row in rows if by not in row), None)) is not None:
        raise UsageError(f"{given} has no column `{by}`", hint=f"its columns are: {', '.join(sorted(missing))}")
    return [(str(row[by]) if by else "", row["text"]) for row in rows if isinstance(row.get("text"), str)]


@tokenizers.command()
@click.argument("tokenizer")
@click.option("--strict", is_flag=True, help="Exit with 3 if there are problems.")
@json_option
def inspect(tokenizer: str, strict: bool, as_json: bool) -> None:
    """What TOKENIZER is made of, and what is wrong with it."""
    from llmctl import StageError
    from llmctl_tokenize.comparison import open_tokenizer
    from llmctl_tokenize.inspection import inspect as look

    found = look(open_tokenizer(tokenizer))
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for name, value in found.items():
            if name == "problems":
                continue
            if isinstance(value, dict):
                value = ", ".join(f"{key} {number}" for key, number in value.items())
            elif isinstance(value, list):
                value = " | ".join(value)
            click.echo(f"{name.replace('_', ' '):16} {'none' if value is None else value}")
        for problem in found["problems"]:
            click.echo(f"problem: {problem}")
    if strict and found["problems"]:
        raise StageError(f"{len(found['problems'])} problems")


@tokenizers.command()
@click.argument("tokenizer")
@click.argument("text", required=False)
@click.option("--special", is_flag=True, help="The text of a special token becomes that token.")
@click.option("--frame", is_flag=True, help="With the special tokens around a text, as a model reads it.")
@click.option("--pieces", is_flag=True, help="Show each token with its id.")
@json_option
def encode(tokenizer: str, text: str | None, special: bool, frame: bool, pieces: bool, as_json: bool) -> None:
    """Ids of TEXT, or of standard input."""
    from llmctl_tokenize.comparison import open_tokenizer

    opened = open_tokenizer(tokenizer)
    given = sys.stdin.read() if text is None else text
    if special and frame:
        raise UsageError("--special and --frame exclude each other")
    ids = opened.frame(given).ids if frame else opened.encode(given, special=special)
    names = {id: token for token, id in opened.vocabulary().items()}
    if as_json:
        click.echo(json.dumps({"ids": ids, "tokens": [names[id] for id in ids]}, ensure_ascii=False))
    elif pieces:
        for id in ids:
            click.echo(f"{id}\t{names[id]}")
    else:
        click.echo(" ".join(map(str, ids)))


@tokenizers.command()
@click.argument("tokenizer")
@click.argument("ids", nargs=-1, type=click.IntRange(0))
@click.option("--skip-special", is_flag=True, help="Leave special tokens out.")
def decode(tokenizer: str, ids: Sequence[int], skip_special: bool) -> None:
    """The text of IDS, or of those on standard input."""
    from llmctl_tokenize.comparison import open_tokenizer

    opened = open_tokenizer(tokenizer)
    try:
        numbers = list(ids) or [int(part) for part in sys.stdin.read().replace(",", " ").split()]
    except ValueError as error:
        raise InputError(f"this is no id: {error}") from error
    if wrong := [id for id in numbers if not 0 <= id < opened.vocab_size]:
        raise InputError(f"{wrong[0]} is no id of this tokenizer, which has {opened.vocab_size}")
    click.echo(opened.decode(numbers, skip_special=skip_special), nl=sys.stdout.isatty())


@tokenizers.command("import")
@click.argument("source")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--encoding", default="", help="What a tiktoken file is: r50k_base, p50k_base, cl100k_base or o200k_base."
)
@click.option("--pattern", default="", help="How a tiktoken file of another kind cuts text: a regular expression.")
@click.option("--special", multiple=True, metavar="TOKEN=ID", help="A special token of a tiktoken file.")
def import_(source: str, directory: Path, encoding: str, pattern: str, special: Sequence[str]) -> None:
    """Write the tokenizer SOURCE into DIRECTORY as `tokenize --tokenizer` and transformers read it.

    SOURCE is a Hugging Face directory, an hf:// address, a tiktoken rank file, a SentencePiece model, or a directory
    with vocab.json and merges.txt or vocab.txt.
    """
    from llmctl_tokenize.importing import import_tokenizer
    from llmctl_tokenize.tiktoken_ranks import ENCODINGS

    if encoding and encoding not in ENCODINGS:
        raise UsageError(f"unknown encoding `{encoding}`", hint=f"known: {', '.join(ENCODINGS)}")
    path = Path(source)
    if not path.exists():
        from llmctl.store import Store

        path = Store.open().resolve(source, ("tokenizer", "model.hf")).path
    kind = import_tokenizer(path, directory, encoding=encoding, pattern=pattern, special=_ids(special))
    from llmctl.text.tokenizer import Tokenizer

    click.echo(f"{directory}: {Tokenizer.load(directory).vocab_size} tokens, from {kind}")


def _ids(special: Sequence[str]) -> dict[str, int]:
    pairs = [given.rpartition("=") for given in special]
    if wrong := next(
        (given for given, pair in zip(special, pairs, strict=True) if not (pair[0] and pair[2].isdigit())), None
    ):
        raise UsageError(f"--special {wrong} is not TOKEN=ID")
    return {name: int(id) for name, _, id in pairs}


@tokenizers.command("check-shards")
@click.argument("tokens")
@click.option("--tokenizer", help="Compare with this tokenizer as well.")
@json_option
def check(tokens: str, tokenizer: str | None, as_json: bool) -> None:
    """Check the token shards TOKENS: sizes, offsets, every id; exit code 3 if something is wrong."""
    from llmctl import StageError
    from llmctl_tokenize.comparison import open_tokenizer
    from llmctl_tokenize.shard_formats import check_shards

    shards = _open_shards(tokens)
    faults = check_shards(shards, open_tokenizer(tokenizer) if tokenizer else None)
    if as_json:
        click.echo(json.dumps({"faults": faults, "meta": shards.meta}, indent=2))
    else:
        for name, entry in shards.meta["splits"].items():
            click.echo(
                f"{name}: {entry['documents']} documents, {entry['tokens']} tokens, {entry['bytes']} bytes of text"
            )
            for source, count in entry.get("sources", {}).items():
                click.echo(
                    f"  {source}: {count['documents']} documents, {count['tokens']} tokens, {count['bytes']} bytes"
                )
        for fault in faults:
            click.echo(f"fault: {fault}")
    if faults:
        raise StageError(f"{tokens}: {len(faults)} faults", hint="make the tokens again")


@tokenizers.command("export-shards")
@click.argument("tokens")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--format", type=click.Choice(["nanogpt", "megatron", "litdata"]), required=True)
def export(tokens: str, directory: Path, format: str) -> None:
    """Write the shards TOKENS as nanoGPT (train.bin), Megatron (.bin and .idx) or litdata (folders) reads them."""
    from llmctl_tokenize.shard_formats import export_shards

    for path in export_shards(_open_shards(tokens), directory, format):
        click.echo(path)


@tokenizers.command("import-shards")
@click.argument("sources", nargs=-1, required=True, metavar="SPLIT=PATH…")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--tokenizer", required=True, help="The tokenizer that they were written with.")
@click.option("--format", type=click.Choice(["nanogpt", "megatron", "litdata"]), required=True)
def import_shards(sources: Sequence[str], directory: Path, tokenizer: str, format: str) -> None:
    """Write files of nanoGPT, Megatron or litdata as token shards into DIRECTORY, one SPLIT=PATH for each split."""
    from llmctl_tokenize import shard_formats
    from llmctl_tokenize.comparison import open_tokenizer

    pairs: dict[str, Any] = {}
    for given in sources:
        split, found, path = given.partition("=")
        if not found or not split.replace("-", "_").isidentifier():
            raise UsageError(f"{given} is not SPLIT=PATH", hint="for instance train=data/train.bin")
        if split in pairs:
            raise UsageError(f"{split} is given twice", hint="one file for each split")
        pairs[split] = Path(path)
    shards = shard_formats.import_shards(pairs, directory, open_tokenizer(tokenizer), format)
    for name, entry in shards.meta["splits"].items():
        click.echo(f"{name}: {entry['documents']} documents, {entry['tokens']} tokens")


def _open_shards(given: str) -> Any:
    from llmctl.text.shards import TokenShards

    if Path(given).is_dir():
        return TokenShards.open(Path(given))
    from llmctl.store import Store

    return TokenShards.open(Store.open().resolve(given, ("dataset.tokens",)).path)
