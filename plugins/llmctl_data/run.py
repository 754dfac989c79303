"""Read a corpus, split it, and derive conversations and preferences from it; or read labelled examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.text.datasets import DatasetWriter
from llmctl_data import preferences, questions
from llmctl_data.facts import Choice, FactBook, choose, deal_invented, unit
from llmctl_data.params import DataParams
from llmctl_data.readers import SUPPORTED, Document, read_files, read_text

CANDIDATES_PER_FACT = 4


def run(ctx: Context, params: DataParams, files: list[Artifact] | None, text: Artifact | None) -> None:
    """Produce the outputs that `params.emit` names."""
    bound = bool(files) or text is not None
    if params.has_labels:
        _label(ctx, params, files or [], text)
        return
    if params.reader == "python-stdlib":
        if bound:
            raise UsageError("reader python-stdlib reads no input", hint="drop `inputs`, or use reader: auto")
        from llmctl_data.library_corpus import read_library

        with TextOutput(ctx, params) as out:
            book = read_library(ctx, params, out)
    elif files and text is not None:
        raise UsageError("both files and text are bound", hint="bind one of them")
    elif not bound:
        raise UsageError("nothing to read", hint="bind files or text, or set reader: python-stdlib")
    else:
        documents = read_text(text) if text is not None else read_files(files or [], params.column, params.piece_chars)
        with TextOutput(ctx, params) as out:
            book = _read_documents(ctx, params, documents, out)
    _derive(ctx, params, book)


def _label(ctx: Context, params: DataParams, files: list[Artifact], text: Artifact | None) -> None:
    """Read or make up labelled examples."""
    from llmctl_data.labelled import write_labelled

    if text is not None or (files and params.reader != "auto"):
        raise UsageError(
            "labelled examples are read from files" if params.reader == "auto" else f"{params.reader} reads no input",
            hint="drop the input, or bind `files`",
        )
    if not files and params.reader == "auto":
        raise UsageError("nothing to read", hint="bind files with labelled rows")
    with TextOutput(ctx, params) as out:
        write_labelled(ctx, params, files, out)


class TextOutput:
    """Splits documents and writes them if text is wanted; a context manager that finishes the dataset."""

    def __init__(self, ctx: Context, params: DataParams) -> None:
        self._ctx, self._share, self._seed = ctx, params.validation_share, params.seed
        splits = ("train", "validation") if params.validation_share > 0 else ("train",)
        self._writer = DatasetWriter(ctx.output("text"), "dataset.text", splits) if ctx.wants("text") else None
        self.rows = {"train": 0, "validation": 0}
        self.bytes = 0

    def split_of(self, document: Document) -> str:
        """The split of a document: its own, or by hash of its unit."""
        if document.split:
            return document.split
        return "validation" if unit(self._seed, "split", document.unit or document.source) < self._share else "train"

    def add(self, document: Document, split: str) -> None:
        """Write one document."""
        self.rows[split] = self.rows.get(split, 0) + 1
        self.bytes += len(document.text.encode())
        if self._writer is not None:
            self._writer.add(split, {"id": document.id, "source": document.source, "text": document.text})

    def __enter__(self) -> TextOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Finish the dataset and report its size; InputError if there is no document."""
        try:
            if kind is None:
                self._check_and_report()
        except BaseException as error:
            kind = type(error)
            raise
        finally:
            if self._writer is not None:
                self._writer.__exit__(kind, *rest)

    def _check_and_report(self) -> None:
        documents = sum(self.rows.values())
        if not documents:
            raise InputError("the corpus is empty: no document with text", hint=f"supported: {', '.join(SUPPORTED)}")
        if not self.rows["train"]:
            raise InputError("no document is left for training", hint="lower validation_share or add documents")
        if self._writer is not None:
            self._ctx.describe("text", documents=documents, bytes=self.bytes)
        counts = {f"text.{split}": count for split, count in self.rows.items()}
        self._ctx.report({"text.documents": documents, "text.bytes": self.bytes, **counts})


def _read_documents(ctx: Context, params: DataParams, documents: Iterator[Document], out: TextOutput) -> FactBook:
    """Pass the documents through once, to the text output and to the collector of facts."""
    from llmctl_data.passages import PassageFacts

    facts = PassageFacts(params.seed, keep=CANDIDATES_PER_FACT * params.questions.facts)
    asks = ctx.wants("chat") or ctx.wants("preference")
    for number, (document, split) in enumerate(_with_splits(documents, out, params.validation_share), start=1):
        out.add(document, split)
        if asks:
            facts.add(document, train=split == "train")
        if number % 100 == 0:
            ctx.progress(number, None, documents=number, bytes=out.bytes)
    return facts.book()


def _with_splits(documents: Iterator[Document], out: TextOutput, share: float) -> Iterator[tuple[Document, str]]:
    """Every document with its split; the first one waits, to fill the split that would be empty."""
    first = next(documents, None)
    if first is None:
        return
    used = set()
    for document in documents:
        split = out.split_of(document)
        used.add(split)
        yield document, split
    split = out.split_of(first)
    if not first.split and share > 0 and len(used) == 1:
        split = "train" if used == {"validation"} else "validation"
    yield first, split if used else first.split or "train"


@dataclass(frozen=True)
class _Sizes:
    """Rows per split of a derived dataset."""

    name: str
    rows: dict[str, int]

    def report(self, ctx: Context) -> None:
        ctx.describe(self.name, rows=sum(self.rows.values()))
        ctx.report({f"{self.name}.{split}": count for split, count in self.rows.items()})


def _derive(ctx: Context, params: DataParams, book: FactBook) -> None:
    """Write the wanted ones of chat and preference from the facts of the corpus."""
    if not (ctx.wants("chat") or ctx.wants("preference")):
        return
    choice = choose(book.candidates, params.questions, params.seed)
    _check_size(ctx, params, choice)
    asked = params.questions
    invented = deal_invented(book, choice, asked.unanswerable, asked.refusals, params.preference.refusals)
    ctx.report({"facts": len(choice.trained), "entities.heldout": len({fact.entity for fact in choice.heldout})})
    if ctx.wants("chat"):
        with DatasetWriter(ctx.output("chat"), "dataset.chat", questions.SPLITS) as writer:
            shuffled = params.negative_twin == "shuffled-answers"
            questions.write_chat(writer, book, choice, invented, params.questions, params.seed, shuffled)
        _Sizes("chat", {split: writer.rows(split) for split in questions.SPLITS}).report(ctx)
    if ctx.wants("preference"):
        with DatasetWriter(ctx.output("preference"), "dataset.preference", preferences.SPLITS) as writer:
            swapped = params.negative_twin == "swapped-preferences"
            preferences.write_preferences(writer, book, choice, invented, params.preference, params.seed, swapped)
        _Sizes("preference", {split: writer.rows(split) for split in preferences.SPLITS}).report(ctx)


def _check_size(ctx: Context, params: DataParams, choice: Choice) -> None:
    """Warn where the corpus yields fewer facts than asked for; InputError if none and questions were asked for."""
    found, asked = len(choice.trained), params.questions.facts
    if found == 0 and params.emit is not None:
        raise InputError(
            "no question can be derived from this corpus",
            hint="it needs sentences of at least 7 words or Markdown headings; or set emit: [text]",
        )
    if found < asked:
        ctx.warn(f"the corpus yields {found} facts to ask about, {asked} were asked for")
