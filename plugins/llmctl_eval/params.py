"""Parameters of `eval`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params

LabelledTask = Literal["classification", "token-classification", "question-answering", "seq2seq", "embedding"]
Task = Literal[
    "perplexity",
    "exact-match",
    "accuracy",
    "ranking",
    "decoding",
    "lengths",
    "classification",
    "token-classification",
    "question-answering",
    "seq2seq",
    "embedding",
]
Strategy = Literal["greedy", "beam", "top-k", "nucleus", "plain", "focused", "creative"]


class EvalParams(Params):
    """Measure a model: perplexity, exact match, accuracy, ranking, labelled tasks, with intervals."""

    tasks: list[Task] = Field(
        default=[],
        description="perplexity (token shards or text), decoding and lengths (token shards), exact-match and accuracy "
        "(chat), ranking (preference), and for labelled rows the task that they are of; default: one for each kind of "
        "data given",
    )
    split: str = Field(default="validation", min_length=1, description="split of the data that is measured on")
    splits: dict[Task, str] = Field(default={}, description="another split for single tasks: {exact-match: test}")
    limit: int | None = Field(default=None, ge=1, description="measure on the first rows only")
    max_tokens: int | None = Field(
        default=None, ge=2, description="perplexity: whole documents from the start up to this many tokens"
    )
    by: str = Field(
        default="",
        description="perplexity of text: measure groups of documents apart: source, language, class, or any other key "
        "of `meta` or column",
    )
    baselines: list[Literal["kneser-ney-bigram", "xz", "lead-sentence"]] = Field(
        default=[],
        description="perplexity: what the same tokens cost without the model (kneser-ney-bigram, xz); seq2seq: ROUGE-L "
        "of the first sentence of each source (lead-sentence)",
    )
    max_length: int | None = Field(
        default=None, ge=2, description="lengths: tokens of the sequences; default: twice the model's context"
    )
    scalings: list[Literal["linear", "ntk", "dynamic", "yarn"]] = Field(
        default=[], description="lengths: measure with rotary positions scaled so, too"
    )
    match: Literal["squad", "strict"] = Field(
        default="squad",
        description="exact-match, question-answering, seq2seq: squad ignores case, ASCII punctuation, articles, "
        "spacing; strict only outer spaces",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="exact-match, seq2seq and decoding: longest answer")
    max_answer_tokens: int = Field(default=30, ge=1, description="question-answering: longest answer")
    candidates: int = Field(default=4, ge=2, description="accuracy: answers to choose from, the right one included")
    strategies: list[Strategy] = Field(
        default=["greedy", "beam", "top-k", "nucleus", "plain"],
        min_length=1,
        description="decoding: ways of choosing tokens to compare; focused is T .3 and p .9, creative T 1.2 and p .95",
    )
    prompt_tokens: int = Field(default=16, ge=1, description="decoding: tokens of a document that are given")
    answers: int = Field(default=4, ge=2, description="decoding: answers to each beginning, compared with each other")
    beams: int = Field(default=4, ge=2, description="decoding: width of beam, at least `answers`")
    top_k: int = Field(default=50, ge=1, description="decoding: tokens that top-k draws from")
    top_p: float = Field(default=0.9, gt=0, lt=1, description="decoding: mass that nucleus draws from")
    resamples: int = Field(default=2000, ge=100, description="bootstrap resamples of an interval")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="confidence level of an interval")
    seed: int = Field(default=1, ge=0, description="seed of the bootstrap, the wrong candidates, the draws")
    batch_size: int = Field(
        default=16, ge=1, affects="nothing", description="rows computed together; changes speed, not numbers"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", affects="nothing", description="where the model runs"
    )
    threads: int = Field(
        default=0, ge=0, affects="nothing", description="threads of the model; 0 takes one per physical core"
    )

    @model_validator(mode="after")
    def _nothing_twice(self) -> EvalParams:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks names a task twice: {', '.join(self.tasks)}")
        if len(set(self.scalings)) < len(self.scalings):
            raise ValueError(f"scalings names one twice: {', '.join(self.scalings)}")
        if len(set(self.strategies)) < len(self.strategies):
            raise ValueError(f"strategies names one twice: {', '.join(self.strategies)}")
        return self
