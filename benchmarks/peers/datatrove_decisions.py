"""What datatrove's rules of quality decide about documents: the fixture of tests/text/cleaning/test_quality.py.

    python -m venv peers && peers/bin/pip install 'datatrove[processing]==0.9.0'
    peers/bin/python benchmarks/peers/datatrove_decisions.py tests/text/cleaning/decisions.jsonl.gz

The documents are pieces of Python's own language reference (`pydoc_data.topics`), some with planted repetition, short
lines, symbols or missing sentence ends. datatrove gets llmctl's definition of words and
sentences, so that rules are compared and not tokenizers; what it decides with its own (spaCy's) is noted beside.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
SENTENCE = re.compile(r"(?<=[.!?…。？！؟।])[\"'”’)\]]*\s+")


def tokenizer() -> Any:
    """datatrove's interface around those two."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return WORD.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [part for part in SENTENCE.split(text) if part.strip()]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            # datatrove asks for the spans of sentences, and takes them to reach from end to end.
            ends = [match.end() for match in SENTENCE.finditer(text) if text[match.end() :].strip()]
            return list(zip([0, *ends], [*ends, len(text)], strict=True)) if text.strip() else []

    return Words()


def documents(seed: int = 0) -> list[str]:
    """Pieces of the reference, and of each one damaged twin."""
    rng = random.Random(seed)
    found = []
    for name in sorted(topics):
        paragraphs = topics[name].split("\n\n")
        for start in range(0, min(len(paragraphs), 24), 8):
            piece = paragraphs[start : start + 8]
            found.append("\n\n".join(piece))
            found.append(damaged("\n\n".join(" ".join(part.split()) for part in piece), rng))
    return found


def damaged(text: str, rng: random.Random) -> str:
    """The text, its lines joined, with one of ten kinds of damage or none."""
    words, lines = text.split(), text.split("\n")
    kinds = [
        lambda: text,
        lambda: "\n".join(lines + [rng.choice(lines) for _ in range(len(lines))]),
        lambda: text + "\n\n" + "\n\n".join(rng.choice(text.split("\n\n")) for _ in range(4)),
        lambda: " ".join(words + words[: len(words) // rng.randint(2, 5)]),
        lambda: " ".join(words[: len(words) // 2] + words[:2] * (len(words) // 8)),
        lambda: "\n".join(" ".join(words[i : i + 3]) for i in range(0, len(words), 3)),
        lambda: " ".join(word + rng.choice(["", "", " #", " ..."]) for word in words),
        lambda: "\n".join("- " + " ".join(words[i : i + 8]) + rng.choice(["", "..."]) for i in range(0, len(words), 8)),
        lambda: text.replace(".", ""),
        lambda: " ".join("".join(sorted(word)) for word in words),
        lambda: " ".join(word if rng.random() < 0.75 else str(rng.randint(0, 10**6)) for word in words),
    ]
    return rng.choice(kinds)()


def main(target: Path) -> None:
    """Write {text, decisions: {rules: "" or the reason}}, and what C4 leaves of the text."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    words: Any = tokenizer()
    filters = {
        "gopher-repetition": GopherRepetitionFilter(language=words),
        "gopher-quality": GopherQualityFilter(language=words),
        "fineweb": FineWebQualityFilter(language=words),
        "c4": C4QualityFilter(language=words),
        "gopher-quality, spaCy": GopherQualityFilter(),
        "gopher-repetition, spaCy": GopherRepetitionFilter(),
        "fineweb, spaCy": FineWebQualityFilter(),
    }
    rows = []
    for number, text in enumerate(documents()):
        row: dict[str, Any] = {"text": text, "decisions": {}}
        for name, rules in filters.items():
            document = Document(text=text, id=str(number))
            verdict = rules.filter(document)
            row["decisions"][name] = "" if verdict is True else verdict[1]
            if name == "c4" and verdict is True:
                row["c4"] = document.text
        rows.append(row)
    with gzip.GzipFile(target, "wb", mtime=0) as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
