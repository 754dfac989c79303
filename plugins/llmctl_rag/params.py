"""Parameters of `rag`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params


class RagParams(Params):
    """Index documents, find passages, answer with citations or refuse."""

    split: str = Field(
        default="", description="split of the text that is indexed; empty for all of them, as the index is no training"
    )
    chunk_tokens: int = Field(
        default=96, ge=8, description="longest chunk, in tokens of the model, else of the encoder, else in words"
    )
    chunk_overlap: int = Field(default=0, ge=0, description="tokens that a chunk repeats from the one before")
    k1: float = Field(default=0.9, ge=0, description="BM25: how fast repetitions of a word stop counting")
    b: float = Field(default=0.4, ge=0, le=1, description="BM25: how much long chunks are discounted")
    retrieval: Literal["lexical", "dense", "hybrid"] = Field(
        default="lexical",
        description="how passages are found: by their words (BM25), by meaning (vectors of the input `encoder`), or by "
        "both, the ranks fused",
    )
    rrf_k: float = Field(
        default=60.0, ge=0, description="hybrid: a passage has 1/(rrf_k + rank) from each ranking; larger is flatter"
    )
    similar_above: float = Field(
        default=0.5,
        ge=-1,
        le=1,
        description="dense, hybrid: a passage with this cosine supports a question, whatever its words are",
    )
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

    def required_inputs(self) -> Mapping[str, str]:
        """A model that answers, an encoder that finds."""
        needed = {} if self.answers == "extractive" else {"model": f"answers: {self.answers}"}
        return needed if self.retrieval == "lexical" else {**needed, "encoder": f"retrieval: {self.retrieval}"}

    def unused_inputs(self) -> Mapping[str, str]:
        """No encoder where words alone decide."""
        return {"encoder": "retrieval: lexical"} if self.retrieval == "lexical" else {}

    @model_validator(mode="after")
    def _overlap_fits(self) -> RagParams:
        if self.chunk_overlap >= self.chunk_tokens:
            raise ValueError(f"chunk_overlap {self.chunk_overlap} must be below chunk_tokens {self.chunk_tokens}")
        return self

    @model_validator(mode="after")
    def _retrieval_uses_them(self) -> RagParams:
        read = {
            "lexical": {"k1", "b"},
            "dense": {"similar_above"},
            "hybrid": {"k1", "b", "similar_above", "rrf_k"},
        }[self.retrieval]
        fields = type(self).model_fields
        # By value: a process is handed all parameters, those at their defaults too.
        for name in sorted({"k1", "b", "similar_above", "rrf_k"} - read):
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} has no effect with retrieval: {self.retrieval}")
        return self
