"""Rules of quality for prose: Gopher (2112.11446, appendix A), C4 (1910.10683, section 2.2), FineWeb (2406.17557).

Each judge takes a text with its words and says which rule it breaks, or "". Words are those of `words.words_of`.
"""

from __future__ import annotations

import re
from collections import Counter

from llmctl.text.cleaning.kinds import Routed, with_text
from llmctl.text.cleaning.quality_params import (
    C4Params,
    FineWebParams,
    GopherQualityParams,
    QualityParams,
    Rules,
)
from llmctl.text.cleaning.repetition import repeated_blocks, repeated_ngrams, repeats
from llmctl.text.cleaning.step import Drop, Noted, Outcome
from llmctl.text.cleaning.words import WordHashes, words_of
from llmctl.text.documents import Document

SENTENCE_ENDS = tuple("!.?։؝؞؟۔܀܁܂߹।॥၊။።፧፨᠃᠉᥄᥅។៕‼‽⁇⁈⁉⸮。꓿꘎꘏﹒﹖﹗！．？｡")
"""Unicode's property Sentence_Terminal, of scripts in use."""
SENTENCE = re.compile(r"[.!?…。？！؟।]+[\"'”’)\]]*(?=\s|\Z)")
CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
DOCUMENT_RULES = ("lorem_ipsum", "curly_bracket")
"""Rules of C4 that a line which would stay breaks for the whole document, as its published code has it."""
POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


class Quality(Routed):
    """Judges texts by the sets of rules that are named, in order."""

    name = "quality"

    def __init__(self, params: QualityParams, seed: int) -> None:
        super().__init__(params)
        self._params = params
        self._hashes = WordHashes()

    def clean(self, document: Document) -> Outcome:
        """Drop what breaks a rule; `c4` also takes lines away."""
        broken, text, removed = self.judge(document.text)
        if broken:
            return Drop(broken)
        return Noted(with_text(document, text), {f"lines:{reason}": count for reason, count in removed.items()})

    def judge(self, text: str) -> tuple[str, str, Counter[str]]:
        """(rule that is broken or "", the text with what `c4` leaves of it, lines that `c4` removed by rule)."""
        removed: Counter[str] = Counter()
        words: list[str] | None = None
        for rules in self._params.rules:
            if not text.strip():
                return f"{rules}:empty", text, removed
            if rules == "c4":
                broken, left = c4(text, self._params.c4, removed)
                words = words if left == text else None
                text = left
            else:
                words = words_of(text) if words is None else words
                broken = self._broken(rules, text, words)
            if broken:
                return f"{rules}:{broken}", text, removed
        return "", text, removed

    def _broken(self, rules: Rules, text: str, words: list[str]) -> str:
        if rules == "gopher-quality":
            return gopher_quality(text, words, self._params.gopher_quality)
        if rules == "fineweb":
            return fineweb(text, words, self._params.fineweb)
        bounds = self._params.gopher_repetition
        blocks = repeated_blocks(text, bounds.lines, bounds.paragraphs, bounds.line_chars, bounds.paragraph_chars)
        if blocks or not words:
            return blocks
        top, repeated = _by_length(bounds.top_ngrams), _by_length(bounds.repeated_ngrams)
        return repeated_ngrams(text, words, self._hashes.of(words), top, repeated)


def _by_length(bounds: dict[str, float]) -> list[tuple[int, float]]:
    return sorted((int(n), most) for n, most in bounds.items())


def gopher_quality(text: str, words: list[str], bounds: GopherQualityParams) -> str:
    """The rule of Gopher's quality set that the text breaks."""
    other = [word for word in words if not word.isalpha()]
    signs = [word for word in other if not any(map(str.isalnum, word))]  # they are words, too
    plain = len(words) - len(signs)
    if plain < bounds.min_words:
        return "few_words"
    if plain > bounds.max_words:
        return "many_words"
    mean = (sum(map(len, words)) - sum(map(len, signs))) / plain if plain else 0
    if mean < bounds.min_mean_length:
        return "short_words"
    if mean > bounds.max_mean_length:
        return "long_words"
    if text.count("#") / len(words) > bounds.max_symbols:
        return "hashes"
    if (text.count("...") + text.count("…")) / len(words) > bounds.max_symbols:
        return "ellipses"
    return _lines_of_gopher(text, bounds) or _words_of_gopher(words, other, bounds)


def _lines_of_gopher(text: str, bounds: GopherQualityParams) -> str:
    lines = text.splitlines()
    if sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > bounds.max_bullets:
        return "bullets"
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) > bounds.max_ellipses:
        return "lines_end_in_ellipsis"
    return ""


def _words_of_gopher(words: list[str], other: list[str], bounds: GopherQualityParams) -> str:
    """`other` are those that do not consist of letters alone."""
    alphabetic = len(words) - len(other) + sum(any(map(str.isalpha, word)) for word in other)
    if alphabetic / len(words) < bounds.min_alphabetic:
        return "few_letters"
    if bounds.min_stop_words and len(set(bounds.stop_words).intersection(words)) < bounds.min_stop_words:
        return "few_stop_words"
    return ""


def fineweb(text: str, words: list[str], bounds: FineWebParams) -> str:
    """The rule of FineWeb's own set that the text breaks."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return "empty"
    if sum(line.endswith(SENTENCE_ENDS) for line in lines) / len(lines) < bounds.min_line_ends:
        return "few_sentence_ends"
    if sum(len(line) <= bounds.short_line for line in lines) / len(lines) > bounds.max_short_lines:
        return "short_lines"
    if repeats(lines)[1] / len(text.replace("\n", "")) > bounds.max_repeated_chars:
        return "repeated_lines"
    if text.count("\n") / len(words) > bounds.max_lines_per_word:
        return "list"
    return ""


def c4(text: str, rules: C4Params, removed: Counter[str]) -> tuple[str, str]:
    """(rule broken or "", the lines that stay); counts the lines that go in `removed`."""
    kept = []
    sentences = 0
    lowered = (CITATION.sub("", text) if rules.citations else text).lower()
    marked = any(phrase in lowered for phrase in (*POLICY, "lorem ipsum", "javascript"))
    for raw in text.splitlines():
        line = raw.strip()
        words = line.split()  # citations are words still, as in the published code
        line = CITATION.sub("", line) if rules.citations and "[" in line else line
        if reason := _line_of_c4(line, words, rules, marked):
            if reason in DOCUMENT_RULES:
                return reason, text
            removed[reason] += bool(line)
            continue
        sentences += _sentences(line)
        kept.append(line)
    if sentences < rules.min_sentences:
        return "few_sentences", text
    return "", "\n".join(kept).strip()


def _line_of_c4(line: str, words: list[str], rules: C4Params, marked: bool) -> str:
    """`marked` is whether a line of the text may hold one of the phrases."""
    if words and len(max(words, key=len)) > rules.max_word_chars:
        return "long_word"
    if rules.end_mark and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
        return "no_end_mark"
    if len(words) < rules.min_line_words:
        return "short_line"
    lowered = line.lower() if marked else ""
    if rules.lorem_ipsum and "lorem ipsum" in lowered:
        return "lorem_ipsum"
    if rules.curly_bracket and "{" in line:
        return "curly_bracket"
    if rules.javascript and "javascript" in lowered:
        return "javascript"
    if rules.policies and any(phrase in lowered for phrase in POLICY):
        return "policy"
    return ""


def _sentences(line: str) -> int:
    """Sentences of a line: its end marks, and one more for what follows the last."""
    ends = [match.end() for match in SENTENCE.finditer(line)]
    return len(ends) + (not ends or bool(line[ends[-1] :].strip()))
