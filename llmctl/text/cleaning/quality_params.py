"""The bounds of the rules of quality, with the defaults of the papers they come from."""

from __future__ import annotations

from typing import Annotated, Literal

from llmctl.spec.params import Field, Params
from llmctl.text.cleaning.kind_params import KINDS, Kind, StepParams

Rules = Literal["gopher-repetition", "gopher-quality", "c4", "fineweb"]
Share = Annotated[float, Field(ge=0, le=1, description="a share from 0 to 1")]
Length = Annotated[str, Field(pattern="^([2-9]|[1-9][0-9])$", description="words of an n-gram")]
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
TOP = {"2": 0.20, "3": 0.18, "4": 0.16}
"""n, and the largest share of the characters that the most frequent n-gram may have (Gopher, table A1)."""
REPEATED = {"5": 0.15, "6": 0.14, "7": 0.13, "8": 0.12, "9": 0.11, "10": 0.10}
"""n, and the largest share of the characters that may lie in n-grams seen before (Gopher, table A1)."""


class GopherRepetitionParams(Params):
    """Largest shares that repeated parts may have (Gopher, table A1)."""

    lines: Share = Field(0.30, description="repeated lines among the lines")
    paragraphs: Share = Field(0.30, description="repeated paragraphs among the paragraphs")
    line_chars: Share = Field(0.20, description="characters in repeated lines")
    paragraph_chars: Share = Field(0.20, description="characters in repeated paragraphs")
    top_ngrams: dict[Length, Share] = Field(TOP, description="n: characters in the most frequent n-gram")
    repeated_ngrams: dict[Length, Share] = Field(REPEATED, description="n: characters in n-grams seen before")


class GopherQualityParams(Params):
    """Bounds of what a document of prose looks like (Gopher, appendix A.1.1)."""

    min_words: int = Field(50, ge=0, description="fewest words")
    max_words: int = Field(100_000, ge=1, description="most words")
    min_mean_length: float = Field(3, ge=0, description="shortest mean length of words, in characters")
    max_mean_length: float = Field(10, gt=0, description="longest mean length of words, in characters")
    max_symbols: float = Field(0.1, ge=0, description="most `#` or ellipses per word")
    max_bullets: Share = Field(0.9, description="largest share of lines that begin with a bullet")
    max_ellipses: Share = Field(0.3, description="largest share of lines that end in an ellipsis")
    min_alphabetic: Share = Field(0.8, description="smallest share of words with a letter")
    min_stop_words: int = Field(2, ge=0, description="fewest different stop words")
    stop_words: list[str] = Field(list(STOP_WORDS), description="the stop words; set them, or 0, for other languages")


class C4Params(Params):
    """Which lines go, and which documents with them (C4)."""

    end_mark: bool = Field(True, description="lines must end in . ? ! or a quotation mark, and in no ellipsis")
    min_line_words: int = Field(3, ge=0, description="fewest words in a line; shorter ones go")
    max_word_chars: int = Field(1000, ge=1, description="lines with a longer word go")
    min_sentences: int = Field(5, ge=0, description="fewest sentences in what is left")
    citations: bool = Field(True, description="remove [1], [edit], [citation needed]")
    javascript: bool = Field(True, description="lines that speak of JavaScript go")
    policies: bool = Field(True, description="lines about cookies, privacy policies, terms of use go")
    lorem_ipsum: bool = Field(True, description="documents with `lorem ipsum` go")
    curly_bracket: bool = Field(True, description="documents with `{` go")


class FineWebParams(Params):
    """Rules found for FineWeb on top of the others."""

    min_line_ends: Share = Field(0.12, description="smallest share of lines that end a sentence")
    short_line: int = Field(30, ge=0, description="lines of at most so many characters are short")
    max_short_lines: Share = Field(0.67, description="largest share of short lines")
    max_repeated_chars: Share = Field(0.01, description="largest share of characters in repeated lines")
    max_lines_per_word: float = Field(0.3, gt=0, description="most newlines per word: lists have many")


class QualityParams(StepParams):
    """Which rules of quality hold."""

    name: Literal["quality"] = Field(description="the step")
    kinds: list[Kind] = Field(["prose"], min_length=1, description=KINDS)
    rules: list[Rules] = Field(
        ["gopher-repetition", "gopher-quality", "fineweb"],
        min_length=1,
        description="sets of rules, in order; `c4` also removes single lines",
    )
    gopher_repetition: GopherRepetitionParams = Field(GopherRepetitionParams(), description="bounds of that set")
    gopher_quality: GopherQualityParams = Field(GopherQualityParams(), description="bounds of that set")
    c4: C4Params = Field(C4Params(), description="what that set does")
    fineweb: FineWebParams = Field(FineWebParams(), description="bounds of that set")
