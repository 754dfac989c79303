"""What can be set about reading a corpus and deriving questions from it."""

from __future__ import annotations

import codecs
from typing import Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params
from llmctl.store.types import LABELLED
from llmctl.text.cleaning.params import AnyStep
from llmctl.text.labelled import Task

Product = Literal["text", "chat", "preference", "labelled"]
Format = Literal[
    "txt", "markdown", "html", "pdf", "jsonl", "json", "csv", "tsv", "parquet", "xml", "html-tables", "code"
]
Kind = Literal["module", "doc", "signature", "source", "continuation", "section"]
PRODUCTS: tuple[Product, ...] = ("text", "chat", "preference")
"""What a corpus yields. Labelled examples are read, with their texts, and yield nothing else."""
TOYS = ("toy-translation", "toy-summary", "toy-sentiment")


class QuestionParams(Params):
    """How questions are derived from the corpus."""

    facts: int = Field(400, ge=1, description="facts that are asked about in the training split")
    heldout_entities: int = Field(60, ge=0, description="entities that are asked about in the split `test` only")
    unanswerable: int = Field(100, ge=0, description="questions about things that do not exist (python-stdlib only)")
    refusals: int = Field(
        200, ge=0, description="training questions about things that do not exist, refused (python-stdlib only)"
    )
    phrasings: int = Field(8, ge=1, le=8, description="phrasings of each fact in training; others are for validation")
    mix: dict[Kind, float] = Field(
        {"module": 0.7, "doc": 0.15, "signature": 0.15, "source": 0.4, "continuation": 0.4, "section": 0.2},
        description="share of each kind of fact: module, doc and signature for python-stdlib, else source, "
        "continuation and section",
    )
    max_answer_share: float = Field(
        0.015, gt=0, le=1, description="largest share of the facts that one answer may have, so that guessing fails"
    )

    @model_validator(mode="after")
    def _mix_adds_up(self) -> QuestionParams:
        if any(share < 0 for share in self.mix.values()) or not any(self.mix.values()):
            raise ValueError("mix must hold shares of at least 0, one of them above 0")
        return self


class PreferenceParams(Params):
    """How right and wrong answers are paired."""

    phrasings: int = Field(4, ge=1, le=8, description="training phrasings of each fact that are paired")
    heldout: Literal["facts", "phrasings"] = Field(
        "facts",
        description="what the validation split holds out: `facts` (no fact in both splits; entities unknown to "
        "training too, with trained: false) or `phrasings` (the same facts in phrasings seen in no training split)",
    )
    validation_share: float = Field(
        0.4, gt=0, lt=1, description="share of the facts (heldout: facts) and of the refusals kept for validation"
    )
    refusals: int = Field(
        500,
        ge=0,
        description="pairs of a refusal and a made-up answer about a thing that does not exist (python-stdlib only); "
        "half of the wrong answers to taught facts are then refusals",
    )
    wrong: Literal["neighbour", "any"] = Field(
        "neighbour", description="wrong answers from near neighbours (same package, similar name) or from any fact"
    )


class LabelledParams(Params):
    """What labelled examples are read from rows of files."""

    task: Task = Field(
        "classification",
        description="columns of each row: classification (text, label; optionally pair), token-classification (tokens, "
        "labels), question-answering (context, question, answer; start where the answer occurs more than once), "
        "seq2seq (source, target), embedding (text, positive); and optionally split",
    )
    fields: dict[str, str] = Field(
        {}, description="what the file calls a column that is not named so: {text: review, label: stars}"
    )

    @model_validator(mode="after")
    def _known_fields(self) -> LabelledParams:
        known = [*LABELLED[self.task], "pair", "start", "split"]
        if unknown := [name for name in self.fields if name not in known]:
            raise ValueError(f"fields names `{unknown[0]}`, {self.task} has {', '.join(known)}")
        return self


class SourceParams(Params):
    """What is said of some of the sources: bound files whose names fit a pattern, or what lies at a URL."""

    path: str = Field(
        min_length=1,
        description="pattern for names of bound files (`*` crosses directories; the first entry that fits counts), or "
        "a URL: s3://, https://, any of fsspec's, hf://datasets/ORG/NAME[@REVISION]/PATTERN (`?stream`: no cache)",
    )
    name: str | None = Field(
        None,
        min_length=1,
        description="what the audit calls the source, by default `path`; its documents carry it as `meta.corpus`",
    )
    format: Format | None = Field(None, description="format of its files, where their names do not tell")
    fields: dict[str, str] = Field({}, description="as `fields` of the stage, for this source; added to them")
    rows: Literal["text", "record"] = Field(
        "text",
        description="what of a JSONL, JSON, CSV, TSV, Parquet or XML row, or of one of a table in HTML, becomes the "
        "document: its column of text, or the whole record, a line `name: value` for each field. `record` reads .xml "
        "and .html as rows; else `format` says so",
    )
    license: str | None = Field(None, description="license of its documents that name none, an SPDX identifier")
    language: str | None = Field(None, description="language of its documents that name none, as in `de`")
    encoding: str | None = Field(None, description="as `encoding` of the stage, for this source")
    weight: float = Field(
        1.0, gt=0, le=100, description="how often each document is taken: 0.5 takes half of them, by hash, 2 all twice"
    )
    limit: int | None = Field(
        None, ge=1, description="documents that are read at most; such a source is read by one worker, in order"
    )

    @model_validator(mode="after")
    def _known_encoding(self) -> SourceParams:
        check_encoding(self.encoding or "auto")
        return self


def check_encoding(name: str) -> None:
    """ValueError for an encoding that Python does not know."""
    if name != "auto":
        try:
            codecs.lookup(name)
        except LookupError:
            raise ValueError(f"unknown encoding `{name}`: auto, utf-8, utf-16, cp1252, …") from None


class DataParams(Params):
    """Parameters of the stage `data`."""

    reader: Literal["auto", "python-stdlib", "toy-translation", "toy-summary", "toy-sentiment"] = Field(
        "auto",
        description="`auto` reads the bound files or text, `python-stdlib` this Python's own library; "
        "`toy-translation`, `toy-summary` and `toy-sentiment` make up labelled rows by a known rule",
    )
    emit: list[Product] | None = Field(
        None,
        description="outputs to make; by default all, and questions that the corpus does not yield are a warning only",
    )
    seed: int = Field(0, ge=0, description="seed of every choice: splits, facts, wrong answers, order")
    validation_share: float = Field(0.08, ge=0, lt=1, description="share of the documents in the split `validation`")
    column: str = Field("text", min_length=1, description="column of JSONL and Parquet rows that holds the text")
    fields: dict[str, str] = Field(
        {},
        description="columns of JSONL, JSON, CSV, TSV and Parquet rows, nested ones as `a.b.0`, by what they are: "
        "text, id, source, url, license, language, date or any other name that a document's `meta` is to have",
    )
    sources: list[SourceParams] = Field([], description="what is said of some of the files, and URLs to read")
    steps: list[AnyStep] = Field(
        [], description="cleaning steps, in the order in which they are taken; labelled rows take balance and augment"
    )
    encoding: str = Field(
        "auto", description="encoding of text files; auto: a byte order mark decides, else UTF-8, else cp1252, noted"
    )
    html: Literal["trafilatura", "resiliparse"] = Field(
        "trafilatura",
        description="what extracts the main text of HTML: trafilatura is better, resiliparse 10 times faster",
    )
    on_error: Literal["report", "fail"] = Field(
        "report",
        description="a file, line or row that cannot be read is reported and left out, or ends the stage (exit code 5)",
    )
    max_document_bytes: int = Field(
        16 << 20,
        ge=1024,
        description="longest line, and largest HTML, PDF, JSON or source file, that is read, in bytes",
    )
    task_bytes: int = Field(
        64 << 20, ge=1 << 16, description="bytes of input in one task; larger files of lines or row groups are cut"
    )
    workers: int = Field(
        0,
        ge=0,
        affects="nothing",
        description="processes that read and clean; 0 means one for each core that it may use",
    )
    piece_chars: int = Field(
        6000,
        ge=200,
        description="longer .txt, .md and .pdf files become several documents of about this many characters",
    )
    modules: list[str] = Field(
        [], description="python-stdlib: modules to read, e.g. [json, 'email.*']; by default every public one"
    )
    include: list[Literal["docs", "source"]] = Field(
        ["docs", "source"], min_length=1, description="python-stdlib: pages of documentation, source code, or both"
    )
    labelled: LabelledParams | None = Field(
        None, description="read the files (.jsonl, .parquet, .csv, .tsv) as labelled examples instead of documents"
    )
    rows: int = Field(3000, ge=2, description="toy-translation, toy-summary, toy-sentiment: rows to make up")
    questions: QuestionParams = Field(QuestionParams(), description="how questions are derived")
    preference: PreferenceParams = Field(PreferenceParams(), description="how right and wrong answers are paired")
    negative_twin: Literal["none", "shuffled-answers", "swapped-preferences", "shuffled-labels"] = Field(
        "none",
        description="control experiments that must fail: training answers or labels dealt to the wrong questions or "
        "texts, or right and wrong swapped",
    )

    @model_validator(mode="after")
    def _copies_last(self) -> DataParams:
        """What looks for duplicates would take copies away again, and the shares with them."""
        made = next(
            (f"sources: `{entry.path}` with weight {entry.weight:g}" for entry in self.sources if entry.weight > 1), ""
        )
        for step in self.steps:
            seeks = step.name == "exact-duplicates" or (step.name == "near-duplicates" and step.action == "drop")
            if made and seeks:
                raise ValueError(
                    f"{step.name} would take away the copies that are made before it ({made}): "
                    "use {name: balance} or {name: augment} after it"
                )
            if step.name == "augment" or (step.name == "balance" and step.size != "down"):
                made = f"step {step.name}"
        return self

    @model_validator(mode="after")
    def _sensible(self) -> DataParams:
        if self.emit is not None and (not self.emit or len(set(self.emit)) < len(self.emit)):
            raise ValueError("emit must name at least one of text, chat, preference, labelled, each once")
        check_encoding(self.encoding)
        cleaning = [step.name for step in self.steps if step.name not in ("balance", "augment")]
        if self.has_labels and cleaning:
            raise ValueError(f"{cleaning[0]} cleans documents; of the steps, labelled rows take balance and augment")
        if self.sources and (self.has_labels or self.reader != "auto"):
            raise ValueError("sources belongs to documents that are read: reader: auto, without labelled")
        if self.modules and self.reader != "python-stdlib":
            raise ValueError("modules belongs to reader: python-stdlib")
        if self.labelled is not None and self.reader != "auto":
            raise ValueError("labelled belongs to reader: auto")
        if self.rows != type(self).model_fields["rows"].default and self.reader not in TOYS:
            raise ValueError(f"rows belongs to reader: {', '.join(TOYS)}")
        wanted = set(self.emit or ())
        if self.has_labels and wanted - {"text", "labelled"}:
            raise ValueError("labelled examples yield text and labelled only")
        if not self.has_labels and "labelled" in wanted:
            raise ValueError("emit names labelled; set `labelled`, or a reader that makes labelled rows")
        if self.negative_twin == "shuffled-labels" and not self.has_labels:
            raise ValueError("negative_twin: shuffled-labels needs labelled examples")
        asks = self.labelled is not None and self.labelled.task == "question-answering"
        if self.negative_twin == "shuffled-labels" and asks:
            raise ValueError("negative_twin: shuffled-labels has no meaning for answers that stand in their context")
        return self

    @property
    def has_labels(self) -> bool:
        """Whether labelled examples are read or made up."""
        return self.labelled is not None or self.reader in TOYS

    def outputs(self) -> set[str]:
        """The products asked for, and the metrics."""
        usual = ("text", "labelled") if self.has_labels else PRODUCTS
        return {*(usual if self.emit is None else self.emit), "metrics"}
