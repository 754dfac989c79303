"""Parameters of `embed`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params

WORDS = frozenset({
    "unit", "split_words", "min_count", "max_vocab", "vector_size", "window", "epochs", "lr", "matrix", "batch", "seed",
})  # fmt: skip
ONLY = {
    "word2vec": WORDS | {"min_lr", "architecture", "negative", "ns_exponent", "sample", "shrink_windows", "cbow_mean"},
    "glove": WORDS | {"x_max", "weight_exponent", "shuffled"},
    "encode": frozenset({"word", "pooling"}),
}
"""Parameters that mean something to this method, beside those that all have."""


class EmbedParams(Params):
    """Make vectors of words (word2vec, GloVe) or of texts (an encoder)."""

    method: Literal["word2vec", "glove", "encode"] = Field(
        default="word2vec", description="vectors of words, trained on the text; or of whole texts, by the input `model`"
    )
    split: str = Field(default="", description="split that is read; empty for all")
    limit: int | None = Field(default=None, ge=1, description="read the first texts only")
    unit: Literal["document", "line"] = Field(
        default="document", description="words: a window stays within a text, or within a line of it"
    )
    split_words: Literal["unicode", "whitespace"] = Field(
        default="unicode", description="words: runs of letters and digits, or whatever white space separates"
    )
    lowercase: bool = Field(default=True, description="words: make all letters small first")
    min_count: int = Field(default=5, ge=1, description="words: leave out those that occur less often")
    max_vocab: int | None = Field(default=None, ge=2, description="words: keep only the most frequent ones")
    vector_size: int = Field(default=100, ge=1, description="words: numbers of a vector")
    window: int = Field(default=5, ge=1, description="words: most words to either side that count as context")
    epochs: int | None = Field(
        default=None, ge=0, description="words: passes over the text; unset: 5 for word2vec, 25 for glove; 0: untrained"
    )
    lr: float | None = Field(
        default=None, gt=0, description="words: first learning rate; unset: 0.025 for word2vec, 0.05 for glove"
    )
    min_lr: float = Field(default=1e-4, ge=0, description="word2vec: the rate that falls in a line ends here")
    architecture: Literal["skip-gram", "cbow"] = Field(
        default="skip-gram", description="word2vec: each context word alone guesses the word, or all of them together"
    )
    negative: int = Field(default=5, ge=1, description="word2vec: wrong words drawn for each right one")
    ns_exponent: float = Field(
        default=0.75, description="word2vec: they are drawn by their count to this power; 0 draws evenly"
    )
    sample: float = Field(
        default=1e-3, ge=0, description="word2vec: words with a larger share are thinned out; 0 keeps all"
    )
    shrink_windows: bool = Field(
        default=True, description="word2vec: draw each window's size from 1 to `window`, so that near words count more"
    )
    cbow_mean: bool = Field(default=True, description="word2vec, cbow: the mean of the context's vectors, not the sum")
    x_max: float = Field(default=100.0, gt=0, description="glove: counts from here on weigh the same")
    weight_exponent: float = Field(
        default=0.75, ge=0, description="glove: smaller counts weigh their share of x_max to this power"
    )
    shuffled: bool = Field(
        default=False, description="glove: shuffle the counts among the pairs, a control that must not find anything"
    )
    matrix: Literal["auto", "input", "output", "sum"] = Field(
        default="auto", description="words: which of both vectors of a word is kept; auto: input, for glove their sum"
    )
    batch: int = Field(
        default=0, ge=0, description="words: examples of one step; 0: few enough that no word is in it too often"
    )
    seed: int = Field(default=1, ge=0, description="words: of first weights, windows and draws")
    word: str = Field(
        default="", description="encode: the vector of this word in its text, not of the text; others are left out"
    )
    pooling: Literal["auto", "mean", "cls"] = Field(
        default="auto", description="encode: the mean of the states or the first one; auto: as the model says, or mean"
    )
    normalise: bool | None = Field(
        default=None, description="bring vectors to length 1; unset: texts as the model says, words no"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", affects="nothing", description="encode: where the model runs"
    )
    threads: int = Field(default=1, ge=0, affects="nothing", description="threads that compute; 0 takes all cores")

    def required_inputs(self) -> Mapping[str, str]:
        """The model that encodes."""
        return {"model": "method: encode"} if self.method == "encode" else {}

    def unused_inputs(self) -> Mapping[str, str]:
        """No model where vectors are trained on the text."""
        return {} if self.method == "encode" else {"model": f"method: {self.method}"}

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> EmbedParams:
        others = frozenset[str]().union(*ONLY.values()) - ONLY[self.method]
        idle = {name: f"method: {self.method}" for name in others}
        if self.architecture == "skip-gram":
            idle.setdefault("cbow_mean", "architecture: skip-gram")
        if self.method == "encode" and not self.word:
            idle["lowercase"] = "method: encode without word"
        if self.method != "encode" and self.device == "cuda":  # cpu is where words are trained
            idle["device"] = f"method: {self.method}, which trains on the CPU"
        for name, field in type(self).model_fields.items():
            if name in idle and getattr(self, name) != field.default:
                raise ValueError(f"{name} has no effect with {idle[name]}")
        return self

    @model_validator(mode="after")
    def _rates_fall(self) -> EmbedParams:
        if self.method == "word2vec" and self.min_lr > (self.lr or 0.025):
            raise ValueError(f"min_lr {self.min_lr} must not be above lr {self.lr or 0.025}")
        return self
