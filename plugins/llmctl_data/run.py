"""Read a corpus, split it, and derive conversations and preferences from it; or read labelled examples."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmctl import Artifact, Context, InputError, UsageError
from llmctl.text.datasets import DatasetWriter
from llmctl.text.documents import Document
from llmctl_data import preferences, questions, report, shards
from llmctl_data.facts import Choice, FactBook, choose, deal_invented
from llmctl_data.params import DataParams
from llmctl_data.parts import DOCUMENTS, DocumentFile
from llmctl_data.readers.streams import is_url
from llmctl_data.sources import Found, find_files, find_spool, find_text
from llmctl_data.tasks import split_by_hash

CANDIDATES_PER_FACT = 4


def run(
    ctx: Context,
    params: DataParams,
    files: list[Artifact] | None,
    text: Artifact | None,
    evaluation: list[Artifact] | None,
    there: Artifact | None,
    back: Artifact | None,
) -> None:
    """Produce the outputs that `params.emit` names."""
    if evaluation and not any(step.name in ("decontaminate", "augment") for step in params.steps):
        raise UsageError("evaluation is bound, and no step uses it", hint="add {name: decontaminate} to steps")
    models = [model for model in (there, back) if model is not None]
    if models and not any(step.name == "augment" and step.method == "back-translation" for step in params.steps):
        raise UsageError(
            "models that translate are bound, and no step uses them",
            hint="add {name: augment, method: back-translation, …} to steps",
        )
    held = shards.OtherInputs([artifact.path for artifact in evaluation or ()], models)
    if params.has_labels:
        result = _label(ctx, params, files or [], text, held)
        book = None
    elif params.reader == "python-stdlib":
        if files or text is not None:
            raise UsageError("reader python-stdlib reads no input", hint="drop `inputs`, or use reader: auto")
        from llmctl_data.library_corpus import read_library

        with Spool(ctx, params, params.reader) as out:
            book = read_library(ctx, params, out)
        result = _write_text(ctx, params, out.found(), held)
    else:
        result = _write_text(ctx, params, _sources(params, files or [], text), held)
        book = _facts(ctx, params, result)
    report.write_reports(ctx, params, result)
    if book is not None:
        _derive(ctx, params, book)


def _sources(params: DataParams, files: list[Artifact], text: Artifact | None) -> Found:
    """What is to be read. UsageError for nothing, and for both files and text."""
    if text is not None:
        if files or params.sources:
            raise UsageError("both files and text are bound", hint="bind one of them")
        return find_text(text, params)
    if not files and not any(is_url(entry.path) for entry in params.sources):
        raise UsageError(
            "nothing to read", hint="bind files or text, name a URL in sources, or set reader: python-stdlib"
        )
    return find_files(files, params)


def _label(
    ctx: Context, params: DataParams, files: list[Artifact], text: Artifact | None, others: shards.OtherInputs
) -> shards.Result:
    """Read or make up labelled examples."""
    from llmctl_data.labelled import write_labelled

    if text is not None or (files and params.reader != "auto"):
        raise UsageError(
            "labelled examples are read from files" if params.reader == "auto" else f"{params.reader} reads no input",
            hint="drop the input, or bind `files`",
        )
    if not files and params.reader == "auto":
        raise UsageError("nothing to read", hint="bind files with labelled rows")
    with Spool(ctx, params, "labelled" if params.reader == "auto" else params.reader) as out:
        steps = write_labelled(ctx, params, files, out, others)
    result = _write_text(ctx, params.model_copy(update={"steps": []}), out.found())
    result.steps[:0] = steps
    return result


def _write_text(
    ctx: Context, params: DataParams, found: Found, others: shards.OtherInputs | None = None
) -> shards.Result:
    """Read, clean and split what was found, and write the output `text`."""
    result = shards.run_shards(ctx, params, found, others)
    shards.check_result(result, params.validation_share)
    kept = result.kept
    if ctx.wants("text"):
        shards.write_dataset(result, ctx.output("text"), params.validation_share)
        ctx.describe("text", documents=kept.documents, bytes=kept.bytes)
    counts = {f"text.{split}": result.splits.get(split, 0) for split in ("train", "validation", *sorted(result.splits))}
    rejects = sum(result.read.rejected.values())
    ctx.report({"text.documents": kept.documents, "text.bytes": kept.bytes, **counts, "rejects": rejects})
    return result


class Spool:
    """Documents that the stage itself makes, on their way through the steps; each has its split. A context manager."""

    def __init__(self, ctx: Context, params: DataParams, name: str) -> None:
        self._params, self._name = params, name
        self._folder = ctx.resume_dir / "spool"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = DocumentFile(self._folder)

    def split_of(self, document: Document) -> str:
        """The split of a document: its own, or by hash of its unit."""
        return document.split or split_by_hash(self._params.seed, self._params.validation_share, document)

    def add(self, document: Document, split: str) -> None:
        """Write one document."""
        self._file.add(replace(document, split=split), {})

    def found(self) -> Found:
        """What is to be read."""
        return find_spool(self._folder / DOCUMENTS, self._name, self._params)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _facts(ctx: Context, params: DataParams, result: shards.Result) -> FactBook | None:
    """Pass the documents through the collector of facts, if questions are wanted."""
    if not (ctx.wants("chat") or ctx.wants("preference")):
        return None
    from llmctl_data.passages import PassageFacts

    facts = PassageFacts(params.seed, keep=CANDIDATES_PER_FACT * params.questions.facts)
    for document, split in result.rows():
        facts.add(document, train=split == "train")
    return facts.book()


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
