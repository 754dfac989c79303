"""Find passages: a BM25 index over chunks, with vectors of them if wanted, and how far a passage supports a question.

Terms know identifiers: `os.path.basename` is found whole and by each of its parts, `move_to_end` and `OrderedDict`
also by the words they are made of; plain words are stemmed (Snowball, English).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.errors import InputError, MachineError, UsageError
from llmctl.stage import Artifact
from llmctl.text.dense import Dense, Encoder

FORMAT = "index.rag"
CHUNKS, INFO = "chunks.jsonl", "index.json"
NAME = re.compile(r"\w+(?:\.\w+)*")
PIECES = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
CACHED = 1 << 16
ASKING = (
    "a about an and any are as at be by can could did do does for from give had has have how i in into is it its me of "
    "on or please should tell that the their them there these they this those to was were what when where which who "
    "whom whose why will with would you your"
)
QUOTED = re.compile(r"`([^`]+)`")
EMPHASIS = 3
QUESTION_WORDS = frozenset(ASKING.split())
"""English words that ask instead of naming a thing; left out of questions, where a code corpus makes them look rare."""


@dataclass(frozen=True)
class Chunk:
    """A passage: `text` is the document's text from `start` to `end` (characters); `title` says where it stands."""

    id: str
    document: str
    start: int
    end: int
    text: str
    title: str = ""

    @property
    def searched(self) -> str:
        """What is indexed: the text, with the title it stands under."""
        return f"{self.title}\n{self.text}"


@dataclass(frozen=True)
class Passage:
    """A chunk that was found. `score`: BM25, the cosine, or both ranks fused; `support`: see `Index.supports`."""

    chunk: Chunk
    score: float
    support: float


def terms(text: str) -> list[str]:
    """The terms of a text in order, repetitions included."""
    return [term for match in NAME.finditer(text) for term in _terms_of(match.group())]


def asked(question: str) -> dict[str, int]:
    """The names in a question, each with its weight: `EMPHASIS` if marked as a name (backticks, a dot, `_`), else 1.

    Words that only ask are left out, unless there are no others ("What is any?").
    """
    marked = {name for part in QUOTED.findall(question) for name in NAME.findall(part)}
    names = dict.fromkeys(NAME.findall(question))
    weights = {name: EMPHASIS if name in marked or "." in name or "_" in name else 1 for name in names}
    kept = {name: weight for name, weight in weights.items() if weight > 1 or name.lower() not in QUESTION_WORDS}
    return kept or weights


@lru_cache(CACHED)
def _terms_of(name: str) -> tuple[str, ...]:
    parts = name.split(".")
    found = [name.lower()] if len(parts) > 1 else []
    for part in parts:
        found.append(_term(part))
        pieces = _pieces(part)
        if len(pieces) > 1:
            found += [_stem(piece.lower()) for piece in pieces]
    return tuple(found)


def _pieces(part: str) -> list[str]:
    """The words in an identifier: `move_to_end`, `HTTPServer`. Case divides ASCII names only."""
    return PIECES.findall(part) if part.isascii() else [piece for piece in part.split("_") if piece]


def _term(part: str) -> str:
    """One term for one part of a name: identifiers keep their form, plain words are stemmed."""
    return _stem(part.lower()) if part.isalpha() and len(_pieces(part)) <= 1 else part.lower()


@lru_cache(CACHED)
def _stem(word: str) -> str:
    found: str = _stemmer().stemWord(word)
    return found


@cache
def _stemmer() -> Any:
    try:
        import Stemmer
    except ModuleNotFoundError as error:
        raise _missing("PyStemmer") from error
    return Stemmer.Stemmer("english")


def _bm25s() -> Any:
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise _missing("bm25s") from error
    return bm25s


def _missing(name: str) -> MachineError:
    return MachineError(f"searching documents needs the module `{name}`", hint="pip install 'llmctl[rag]'")


class Index:
    """A BM25 index (Lucene's variant, as in bm25s) over chunks; a search finds `per_document` of each document.

    With `dense` it searches by meaning, or by both; BM25's words are there all the same, to tell what is rare.
    """

    def __init__(self, chunks: Sequence[Chunk], ranking: Any, per_document: int, dense: Dense | None = None) -> None:
        self.chunks = list(chunks)
        self.per_document = per_document
        self.dense = dense
        self._ranking = ranking
        self._vocabulary: dict[str, int] = ranking.vocab_dict

    @classmethod
    def build(
        cls,
        chunks: Sequence[Chunk],
        *,
        k1: float = 0.9,
        b: float = 0.4,
        per_document: int = 2,
        dense: Dense | None = None,
    ) -> Index:
        """Index `chunks`; InputError if there is nothing in them to search. `dense`: vectors of their `searched`."""
        corpus = [terms(chunk.searched) for chunk in chunks]
        # bm25s numbers a vocabulary of its own by the order of a set, which changes with the hash seed.
        vocabulary = {term: number for number, term in enumerate(sorted({term for row in corpus for term in row}))}
        if not vocabulary:
            raise InputError("the documents hold no words to index", hint="give a dataset.text with text in it")
        ranking = _bm25s().BM25(k1=k1, b=b, method="lucene")
        ids = [[vocabulary[term] for term in row] for row in corpus]
        ranking.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        return cls(chunks, ranking, per_document, dense)

    def save(self, directory: Path, **facts: Any) -> None:
        """Write `chunks.jsonl`, bm25s' own files, the vectors, and last `index.json` with `facts`."""
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / CHUNKS).open("w", encoding="utf-8", newline="\n") as file:
            for chunk in self.chunks:
                file.write(json.dumps(asdict(chunk), ensure_ascii=False) + "\n")
        self._ranking.save(directory, show_progress=False)
        if self.dense is not None:
            self.dense.save(directory)
            facts = {**facts, "dense": self.dense.facts()}
        described = {"format": FORMAT, "chunks": len(self.chunks), "per_document": self.per_document, **facts}
        text = json.dumps(described, indent=2, sort_keys=True)
        (directory / INFO).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, source: Artifact | Path | str, encoder: Encoder | None = None) -> Index:
        """Open a saved index; InputError if it is missing or its parts do not fit together.

        One with vectors needs the `encoder` that made them: InputError without it or with another, UsageError for one
        that would not be used.
        """
        directory = source.path if isinstance(source, Artifact) else Path(source)
        chunks = list(read_chunks(directory))
        try:
            described = json.loads((directory / INFO).read_text(encoding="utf-8"))
            ranking = _bm25s().BM25.load(directory, mmap=True, show_progress=False)
            per_document = int(described["per_document"])
            counts = {described["chunks"], ranking.scores["num_docs"], len(chunks)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{directory} holds no readable index: {error}", hint="make it with `llmctl rag`"
            ) from error
        if len(counts) > 1:
            raise InputError(f"the index in {directory} is damaged: its files count {sorted(counts)} chunks")
        return cls(chunks, ranking, per_document, _dense(directory, described.get("dense"), chunks, encoder))

    def frequency(self, term: str) -> int:
        """In how many chunks `term` stands."""
        number = self._vocabulary.get(term)
        if number is None:
            return 0
        starts = self._ranking.scores["indptr"]
        return int(starts[number + 1] - starts[number])

    def rarity(self, term: str) -> float:
        """Lucene's inverse document frequency, ln(1 + (N - n + 0.5) / (n + 0.5)).

        A term that no chunk knows is as rare as one that a single chunk knows: the corpus cannot tell more.
        """
        count = max(1, self.frequency(term))
        return math.log1p((len(self.chunks) - count + 0.5) / (count + 0.5))

    def scores(self, question: str) -> np.ndarray:
        """BM25 score of every chunk, float32, shape `(len(chunks),)`; terms of names count by `asked`."""
        weights: dict[str, int] = {}
        for name, weight in asked(question).items():
            for term in _terms_of(name):
                if term in self._vocabulary:
                    weights[term] = max(weight, weights.get(term, 0))
        known = [term for term, weight in weights.items() for _ in range(weight)]
        if not known:
            return np.zeros(len(self.chunks), np.float32)
        scores: np.ndarray = self._ranking.get_scores(known)
        return scores

    def search(self, question: str, k: int = 5) -> list[Passage]:
        """The `k` best chunks, best first; fewer if fewer share a term with it or, by meaning, have a cosine above 0.

        Equal ones are in order of their cosines, then of the corpus.
        """
        scores = self.scores(question)
        cosines = np.zeros_like(scores)
        if self.dense is not None:
            cosines = self.dense.cosines(question)
            scores = self.dense.rank(scores, cosines)
        taken: Counter[str] = Counter()
        found: list[Passage] = []
        for i in map(int, np.lexsort((-cosines, -scores))):
            chunk = self.chunks[i]
            if scores[i] <= 0 or len(found) == k:
                break
            taken[chunk.document] += 1
            if taken[chunk.document] <= self.per_document:
                found.append(Passage(chunk, float(scores[i]), self._supported(question, chunk.searched, cosines[i])))
        return found

    def supports(self, question: str, texts: Sequence[str]) -> list[float]:
        """For each text: 1 if by its meaning it is near enough to the question, else `support`."""
        cosines = np.zeros(len(texts)) if self.dense is None else self.dense.cosines(question, texts)
        return [self._supported(question, text, cosine) for text, cosine in zip(texts, cosines, strict=True)]

    def nearest(self, question: str, texts: Sequence[str]) -> str:
        """The text that has most to do with the question, by its words and its meaning; empty without texts."""
        near = np.array([self.support(question, text) for text in texts])
        if self.dense is not None:
            near = near + self.dense.cosines(question, texts)
        return texts[int(near.argmax())] if texts else ""

    def _supported(self, question: str, text: str, cosine: float) -> float:
        similar = self.dense is not None and cosine >= self.dense.settings.similar_above
        return 1.0 if similar else self.support(question, text)

    def support(self, question: str, text: str) -> float:
        """How much of what a question names stands in `text`, 0 to 1.

        The question is a vector with the rarity of each name as its length along that name; support is the share of the
        squared length that remains when only names found in the text are kept. Rare names decide: one that no
        document knows outweighs all the common words around it. Dotted names count only with all their parts.
        """
        held = set(terms(text))
        kept = total = 0.0
        for name, weight in asked(question).items():
            parts = [_term(part) for part in name.split(".")]
            length = (weight * max(map(self.rarity, parts))) ** 2
            total += length
            kept += length * held.issuperset(parts)
        return kept / total if total else 0.0


def _dense(
    directory: Path, facts: dict[str, Any] | None, chunks: Sequence[Chunk], encoder: Encoder | None
) -> Dense | None:
    if facts is None:
        if encoder is not None:
            raise UsageError(
                f"the index in {directory} finds by words alone, an encoder has no effect",
                hint="make it with retrieval: dense or hybrid",
            )
        return None
    if encoder is None:
        raise InputError(
            f"the index in {directory} finds by meaning and needs the encoder that it was made with",
            hint="give the encoder that `rag` was given (input or option `encoder`)",
        )
    return Dense.load(directory, facts, [chunk.searched for chunk in chunks], encoder)


def read_chunks(directory: Path) -> Iterator[Chunk]:
    """The chunks of a saved index, in order; InputError if they are missing or damaged."""
    path = directory / CHUNKS
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield _chunk(line, path, number)
    except OSError as error:
        raise InputError(f"{directory} holds no index: {error.strerror}", hint="make it with `llmctl rag`") from error


def _chunk(line: str, path: Path, number: int) -> Chunk:
    try:
        return Chunk(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}:{number}: no chunk: {error}", hint="make the index again") from error


def best_support(passages: Iterable[Passage]) -> float:
    """Support of the passage that supports the question most, 0 without passages."""
    return max((passage.support for passage in passages), default=0.0)
