"""Parameters of `rag`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params


class RagParams(Params):
    """Index documents, find passages, answer with citations or refuse."""

    split: str = Field(
        default="", description="split of the text that is indexed; empty for all of them, as the index is no training"
    )
    chunk_tokens: int = Field(
        default=96, ge=8, description="longest chunk, in tokens of the model, or in words without one"
    )
    chunk_overlap: int = Field(default=0, ge=0, description="tokens that a chunk repeats from the one before")
    k1: float = Field(default=0.9, ge=0, description="BM25: how fast repetitions of a word stop counting")
    b: float = Field(default=0.4, ge=0, le=1, description="BM25: how much long chunks are discounted")
    top_k: int = Field(default=5, ge=1, description="passages found per question; recall@k is measured at this k")
    per_document: int = Field(default=2, ge=1, description="passages that one document may contribute to top_k")
    refuse_below: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="refuse if no passage found supports this share of the question, by rarity of its words",
    )
    answers: Literal["extractive", "model", "closed-book"] = Field(
        default="extractive",
        description="the best sentence found, quoted; or the model writes from the passages; or it answers without "
        "seeing them, so that they only decide on refusal and are cited",
    )
    questions_split: str = Field(default="validation", description="questions whose document must be found")
    unanswerable_split: str = Field(
        default="unanswerable", description="questions that must be refused; not measured if the dataset lacks it"
    )
    limit: int | None = Field(default=None, ge=1, description="measure on the first questions only")
    max_new_tokens: int = Field(default=64, ge=1, description="longest answer of the model")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", affects="nothing", description="where the model runs"
    )
    threads: int = Field(
        default=0, ge=0, affects="nothing", description="threads of the model; 0 takes one per physical core"
    )

    @model_validator(mode="after")
    def _overlap_fits(self) -> RagParams:
        if self.chunk_overlap >= self.chunk_tokens:
            raise ValueError(f"chunk_overlap {self.chunk_overlap} must be below chunk_tokens {self.chunk_tokens}")
        return self
