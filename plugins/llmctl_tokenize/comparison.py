"""Measure tokenizers on texts: how many tokens they need, how much of them is unknown, what is worst for them."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmctl import InputError, UsageError
from llmctl.text.tokenizer import Tokenizer
from llmctl_tokenize.params import SPECIAL_COUNT, TokenizeParams

TRAINED = ("bpe", "wordpiece", "unigram", "word", "char")
BATCH = 256
LONG = 10_000
"""Characters of a worst case."""


@dataclass(frozen=True)
class Subject:
    """A tokenizer under its name in the table."""

    name: str
    tokenizer: Tokenizer

    @property
    def unknown(self) -> int | None:
        """The id of the unknown token, None if there is none."""
        return self.tokenizer.unk_id


@dataclass(frozen=True)
class Measures:
    """One tokenizer on one text. Words are what white space separates; special tokens around documents are left out."""

    tokenizer: str
    text: str
    vocab_size: int
    documents: int
    words: int
    bytes: int
    tokens: int
    unknown: int
    used: int
    """Different ids that occur."""
    longest: int
    """Tokens of the longest document."""
    embedding_bytes: int

    @property
    def fertility(self) -> float:
        """Tokens per word."""
        return self.tokens / max(1, self.words)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""
        return self.bytes / max(1, self.tokens)

    @property
    def unknown_rate(self) -> float:
        """Share of the tokens that say nothing but "unknown"."""
        return self.unknown / max(1, self.tokens)

    @property
    def vocabulary_use(self) -> float:
        """Share of the vocabulary that occurs."""
        return self.used / self.vocab_size

    @property
    def sequence_length(self) -> float:
        """Tokens per document."""
        return self.tokens / max(1, self.documents)

    def as_json(self) -> dict[str, float | int | str]:
        """All of it, ratios included."""
        ratios = ("fertility", "bytes_per_token", "unknown_rate", "vocabulary_use", "sequence_length")
        return {**self.__dict__, **{name: getattr(self, name) for name in ratios}}


@dataclass(frozen=True)
class WorstCase:
    """A tokenizer on an input made to be bad for it."""

    tokenizer: str
    input: str
    bytes: int
    tokens: int
    milliseconds: float
    returned: bool
    """Whether decoding gives the input back."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""
        return self.bytes / max(1, self.tokens)


def measure(subject: Subject, text: str, documents: Iterable[str], width: int, weight_bytes: int) -> Measures:
    """`subject` on `documents`; its embedding has `width` columns of `weight_bytes` each."""
    used: set[int] = set()
    count = words = size = tokens = unknown = longest = 0
    for batch in _batched(documents):
        for document, ids in zip(batch, subject.tokenizer.encode_batch(batch), strict=True):
            count += 1
            words += len(document.split())
            size += len(document.encode())
            tokens += len(ids)
            longest = max(longest, len(ids))
            unknown += ids.count(subject.unknown) if subject.unknown is not None else 0
            used.update(ids)
    vocab = subject.tokenizer.vocab_size
    return Measures(
        subject.name, text, vocab, count, words, size, tokens, unknown, len(used), longest, vocab * width * weight_bytes
    )


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def pathological(length: int = LONG) -> dict[str, str]:
    """Inputs that cost many tokens or much time, `length` characters each; the same ones every time."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
    return {
        "one letter repeated": "a" * length,
        "spaces": " " * length,
        "line ends": "\n" * length,
        "digits": "".join(generator.choices("0123456789", k=length)),
        "random letters": "".join(generator.choices(letters, k=length)),
        "random bytes": bytes(generator.choices(range(256), k=length)).decode("latin-1"),
        "emoji": "\U0001f642" * length,
        "joined emoji": family * (length // len(family)),
        "combining marks": "e" + "\u0301" * (length - 1),
        "Chinese": "".join(chr(generator.randrange(0x4E00, 0x9FA5)) for _ in range(length)),
        "punctuation": "".join(generator.choices("!?.,;:-(){}[]<>/\\|@#$%^&*", k=length)),
    }


def worst_cases(subject: Subject, length: int = LONG) -> list[WorstCase]:
    """All pathological inputs, the fewest bytes per token first."""
    found = []
    for name, text in pathological(length).items():
        begin = time.perf_counter()
        ids = subject.tokenizer.encode(text)
        spent = 1000 * (time.perf_counter() - begin)
        returned = subject.tokenizer.decode(ids, skip_special=False) == text
        found.append(WorstCase(subject.name, name, len(text.encode()), len(ids), spent, returned))
    return sorted(found, key=lambda case: (case.bytes_per_token, case.input))


def longest_words(subject: Subject, documents: Iterable[str], count: int = 5) -> list[tuple[str, int]]:
    """The words of a text that take the most tokens: (word, tokens)."""
    words = sorted({word for document in documents for word in document.split() if len(word) <= 200})
    sizes = [len(ids) for batch in _batched(words) for ids in subject.tokenizer.encode_batch(batch)]
    return sorted(zip(words, sizes, strict=True), key=lambda item: (-item[1], item[0]))[:count]


def open_subjects(names: Sequence[str], training: Sequence[str], directory: Path) -> list[Subject]:
    """Directories, names in the store, and `KIND:SIZE` trained here on `training`; kept in `directory`."""
    return [_open(name, training, directory / str(number)) for number, name in enumerate(names)]


def _open(name: str, training: Sequence[str], directory: Path) -> Subject:
    kind, _, size = name.partition(":")
    if kind in TRAINED and (size.isdigit() or not size):
        return Subject(name, _train(kind, int(size or 0), training, directory))
    return Subject(Path(name).name or name, open_tokenizer(name))


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer (or that of the model) that a path, an id, a name in the store or a hub address means."""
    if (Path(name) / "tokenizer.json").is_file():
        return Tokenizer.load(name)
    from llmctl.store import Store

    return Tokenizer.load(Store.open().resolve(name, ("tokenizer", "model.hf", "model.onnx")).path)


def _train(kind: str, size: int, training: Sequence[str], directory: Path) -> Tokenizer:
    """As `tokenize` does with its defaults; of a size that the text does not give, the largest there is."""
    from pydantic import ValidationError

    from llmctl_tokenize import files
    from llmctl_tokenize import training as trainers
    from llmctl_tokenize.special import SPECIAL

    if not any(training):
        raise InputError("there is no text to train on")
    largest = 1 << 20 if kind in ("word", "char") else 8192
    settings = {"min_frequency": 1} if kind in ("word", "char") else {}
    try:
        params = TokenizeParams.model_validate({"kind": kind, "vocab_size": size or largest, **settings})
    except ValidationError as error:
        raise UsageError(f"{kind}:{size} cannot be trained: {error.errors()[0]['msg']}") from error
    unknown = params.fixed > SPECIAL_COUNT[params.special]
    special = SPECIAL[params.special].extended((), unknown)
    tokenizer = trainers.train(lambda: iter(training), params, special)
    files.save(tokenizer, directory, special.names, special.further, special.template)
    return Tokenizer.load(directory)


def compare(
    names: Sequence[str], texts: Mapping[str, Sequence[str]], training: Sequence[str], width: int, weight_bytes: int
) -> tuple[list[Measures], list[WorstCase], dict[str, list[tuple[str, int]]]]:
    """Every tokenizer on every text, on the pathological inputs, and the words that each cuts the most."""
    with tempfile.TemporaryDirectory(prefix="llmctl-tokenizers-") as directory:
        subjects = open_subjects(names, training, Path(directory))
        measures = [
            measure(subject, text, documents, width, weight_bytes)
            for text, documents in texts.items()
            for subject in subjects
        ]
        worst = [case for subject in subjects for case in worst_cases(subject)]
        everything = [document for documents in texts.values() for document in documents]
        words = {subject.name: longest_words(subject, everything) for subject in subjects}
    return measures, worst, words
