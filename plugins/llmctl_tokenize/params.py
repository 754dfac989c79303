"""What can be set about training a tokenizer and writing token shards."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params

SPECIAL_COUNT = {"gpt": 6, "bert": 4, "roberta": 4, "t5": 2}
T5_SENTINELS = 100
INFILL_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
"""As Qwen and OpenAI's cl100k_base write them."""
PATTERN = {"bpe": "gpt2", "wordpiece": "words", "unigram": "spaces", "word": "words", "char": "whole"}
"""How each kind cuts text unless told otherwise."""
COVERAGE = {"bpe": "byte-level", "wordpiece": "unk", "unigram": "byte-fallback", "word": "unk", "char": "unk"}
COVERAGES = {
    "bpe": ("byte-level", "byte-fallback", "unk"),
    "wordpiece": ("unk",),
    "unigram": ("byte-level", "byte-fallback", "unk"),
    "word": ("unk",),
    "char": ("byte-level", "byte-fallback", "unk"),
}


class TokenizeParams(Params):
    """Parameters of the stage `tokenize`."""

    kind: Literal["bpe", "wordpiece", "unigram", "word", "char"] = Field(
        "bpe",
        description="bpe (GPT), wordpiece (BERT), unigram (T5; needs the extra `sentencepiece`), word (whole words) or "
        "char (characters)",
    )
    vocab_size: int = Field(
        8192, ge=1, description="tokens of the trained tokenizer, the 256 bytes and all special ones included"
    )
    min_frequency: int = Field(
        2, ge=1, description="how often a pair (bpe, wordpiece), a word or a character must occur to get a token"
    )
    pattern: Literal["gpt2", "llama3", "qwen2", "words", "spaces", "lines", "whole"] | None = Field(
        None,
        description="how text is cut before pieces are made: gpt2 (numbers whole), llama3 (up to 3 digits), qwen2 "
        "(single digits; onnxruntime-genai reads these), words (BERT: white space dropped, punctuation alone), spaces "
        "(before each space), lines or whole; unset: gpt2 for bpe, spaces for unigram, words for wordpiece and word",
    )
    coverage: Literal["byte-level", "byte-fallback", "unk"] | None = Field(
        None,
        description="what becomes of characters without a token: byte-level (pieces are made of bytes), byte-fallback "
        "(a token per byte) or unk (one unknown token); unset: byte-level for bpe, byte-fallback for unigram, else unk",
    )
    span_words: bool = Field(
        False, description="let pieces of bpe and unigram span several words of a line, as Jurassic-1's do"
    )
    digits: int | None = Field(None, ge=1, le=9, description="most digits in one piece; unset: as the pattern has it")
    normalizer: Literal["none", "nfc", "nfd", "nfkc", "nfkd"] = Field(
        "none", description="Unicode normalisation before anything else; it cannot be undone by decoding"
    )
    lowercase: bool | None = Field(None, description="fold capitals and drop accents; unset: wordpiece only")
    limit_alphabet: int | None = Field(
        None, ge=1, description="keep only so many characters, the most frequent; not for byte-level"
    )
    max_piece_length: int | None = Field(
        None, ge=1, le=512, description="most characters (bytes, if byte-level) of a piece; unset: 16 for unigram"
    )
    special: Literal["gpt", "bert", "roberta", "t5"] = Field(
        "gpt",
        description="special tokens: gpt (decoders; <|bos|>, <|end|>, <|pad|> and a chat template), bert ([CLS], "
        "[SEP], [MASK], [PAD]), roberta (<s>, </s>, <mask>, <pad>) or t5 (</s>, <pad> and sentinels)",
    )
    further_special: list[str] = Field([], description="special tokens of your own, after those of `special`")
    sentinels: int | None = Field(
        None,
        ge=0,
        description="`<extra_id_N>` tokens for span corruption, the last ids of the vocabulary; unset: 100 with "
        "special: t5, else none",
    )
    infill: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the training documents that are cut at two characters and learnt with their middle last "
        "(fill in the middle, 2207.14255); other splits stay as they are",
    )
    infill_spm: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of these with the suffix first (SPM); the others have the prefix first (PSM)",
    )
    infill_tokens: list[str] = Field(
        list(INFILL_TOKENS),
        min_length=3,
        max_length=3,
        description="special tokens before prefix, suffix, middle; training adds them, a bound tokenizer has them",
    )
    infill_seed: int = Field(0, ge=0, description="seed of which documents are cut, how and where")
    emit: Literal["both", "tokenizer", "tokens"] = Field(
        "both", description="what to produce: the tokenizer, the token shards, or both"
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="processes that encode; 0: none but the stage's own; unset: one per core for 32 MB of text or more",
        affects="nothing",
    )

    @model_validator(mode="after")
    def _fit(self) -> TokenizeParams:
        allowed = COVERAGES[self.kind]
        if self.covers not in allowed:
            raise ValueError(f"coverage: {self.covers} is not for kind: {self.kind}, which has {', '.join(allowed)}")
        for name, kinds in (
            ("span_words", ("bpe", "unigram")),
            ("limit_alphabet", ("bpe", "wordpiece", "unigram", "char")),
            ("max_piece_length", ("bpe", "unigram")),
        ):
            if getattr(self, name) and self.kind not in kinds:
                raise ValueError(f"{name} is for kind: {' or '.join(kinds)}, not {self.kind}")
        if self.limit_alphabet and self.covers == "byte-level":
            raise ValueError("limit_alphabet has no meaning with coverage: byte-level, whose alphabet is the 256 bytes")
        if self.span_words and self.pattern not in (None, "lines", "whole"):
            raise ValueError(f"span_words asks for uncut lines, pattern: {self.pattern} cuts them")
        if self.kind == "char" and self.pattern not in (None, "whole"):
            raise ValueError("kind: char cuts after every character; leave pattern unset")
        if self.kind == "unigram" and self.min_frequency != type(self).model_fields["min_frequency"].default:
            raise ValueError("min_frequency is not for kind: unigram, which weighs pieces by likelihood")
        if len({*self.further_special}) < len(self.further_special) or "" in self.further_special:
            raise ValueError("further_special holds a token twice, or an empty one")
        return self._infill_fits()._bytes_fit()

    def _infill_fits(self) -> TokenizeParams:
        """A bound tokenizer is not known here; `Infill.check` tries it."""
        fields = type(self).model_fields
        if not self.infill:
            for name in ("infill_spm", "infill_tokens", "infill_seed"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name} has no meaning without infill")
        elif self.emit == "tokenizer":
            raise ValueError("infill is for token shards; with emit: tokenizer name its tokens in further_special")
        elif not self.lossless:
            raise ValueError("infill is for a tokenizer that gives back any text; see coverage, normalizer, pattern")
        if len({*self.infill_tokens}) < 3 or "" in self.infill_tokens:
            raise ValueError("infill_tokens holds a token twice, or an empty one")
        return self

    def _bytes_fit(self) -> TokenizeParams:
        least = self.fixed + (0 if self.covers == "unk" else 256)
        if self.vocab_size < least + (self.covers == "unk"):
            raise ValueError(
                f"vocab_size must be greater than or equal to {least} with special: {self.special} and "
                f"{self.sentinel_count} sentinels, it is {self.vocab_size}"
            )
        if self.kind == "char" and self.covers == "byte-level" and self.vocab_size != least:
            raise ValueError(f"vocab_size of kind: char with coverage: byte-level is {least}, not {self.vocab_size}")
        return self

    @property
    def fixed(self) -> int:
        """How many tokens are special: those of `special`, the unknown token, one's own and the sentinels."""
        unknown = self.covers != "byte-level" or self.kind == "unigram"
        return SPECIAL_COUNT[self.special] + unknown + len(self.own_special) + self.sentinel_count

    @property
    def own_special(self) -> list[str]:
        """`further_special`, and those of `infill_tokens` that are not among them."""
        infill = self.infill_tokens if self.infill else []
        return [*self.further_special, *(name for name in infill if name not in self.further_special)]

    @property
    def covers(self) -> str:
        """`coverage` with its default filled in."""
        return self.coverage or COVERAGE[self.kind]

    @property
    def cuts(self) -> str:
        """`pattern` with its default filled in."""
        return self.pattern or ("lines" if self.span_words else PATTERN[self.kind])

    @property
    def folds(self) -> bool:
        """`lowercase` with its default filled in."""
        return self.kind == "wordpiece" if self.lowercase is None else self.lowercase

    @property
    def lossless(self) -> bool:
        """Whether decoding must give back any text."""
        keeps = self.normalizer == "none" and not self.folds and self.cuts != "words"
        return keeps and self.covers != "unk"

    @property
    def sentinel_count(self) -> int:
        """`sentinels` with its default filled in."""
        if self.sentinels is not None:
            return self.sentinels
        return T5_SENTINELS if self.special == "t5" else 0

    def outputs(self) -> set[str]:
        """What `emit` names, and the metrics."""
        products = {"tokenizer", "tokens"} if self.emit == "both" else {self.emit}
        return {*products, "metrics"}

    def changed(self) -> list[str]:
        """Parameters of training, beside the size, that differ from their defaults."""
        fields: dict[str, Any] = dict(type(self).model_fields)
        rest = {"vocab_size", "emit", "workers", "infill", "infill_spm", "infill_tokens", "infill_seed"}
        return [name for name in fields if name not in rest and getattr(self, name) != fields[name].default]
