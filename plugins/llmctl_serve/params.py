"""Parameters of `serve`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmctl.spec.params import Field
from llmctl_serve.safety import SafetyParams


class ServeParams(SafetyParams):
    """Serve a model over HTTP with an OpenAI-type API."""

    mode: Literal["foreground", "smoke"] = Field(
        default="foreground",
        description="foreground: serve until stopped; smoke: start, ask smoke_questions over HTTP, stop",
    )
    smoke_questions: list[str] = Field(default=[], description="questions that mode smoke asks; all must be answered")
    model_name: str | None = Field(
        default=None, min_length=1, description="model id that clients see; default: name of the model's directory"
    )
    models: dict[str, str] = Field(
        default={},
        affects="nothing",
        description="further models by the names that clients use: names in the store, ids or directories; "
        "SIGUSR2 swaps in what a name points to by then",
    )
    model_root: str | None = Field(
        default=None,
        min_length=1,
        affects="nothing",
        description="directory below which `POST /admin/models` may load models that are not in the store",
    )
    slots: int = Field(default=16, ge=1, le=1024, description="most answers that advance side by side")
    max_queue: int = Field(default=64, ge=1, description="requests that may wait; a further one is answered with 429")
    context: int = Field(default=0, ge=0, description="most tokens of prompt and answer; 0: the model's context")
    prefill_tokens: int = Field(
        default=256, ge=1, description="most tokens of prompts that are read between two steps of running answers"
    )
    prefix_cache: bool = Field(
        default=True, description="keep keys and values of past sequences, for prompts that begin alike"
    )
    speculation: Literal["none", "prompt-lookup", "draft"] = Field(
        default="none",
        description="propose tokens and let the model confirm several at once: from the text, or by `draft`",
    )
    draft_tokens: int = Field(default=4, ge=1, le=64, description="most tokens that speculation proposes at a time")
    max_new_tokens: int = Field(
        default=256, ge=1, description="tokens of an answer when the request does not limit them"
    )
    drain_seconds: int = Field(
        default=20, ge=0, description="time that running requests get to finish after a stop signal"
    )
    page: bool = Field(default=True, description="offer a page to chat with the model at /")
    require_signed_by: str | None = Field(
        default=None,
        min_length=1,
        affects="nothing",
        description="refuse a model without a good signature of this signer; every file is hashed before it is loaded",
    )
    allowed_signers: str | None = Field(
        default=None,
        min_length=1,
        affects="nothing",
        description="file that says whose key is whose; default $LLMCTL_ALLOWED_SIGNERS, else the user's own",
    )
    answers: Literal["model", "closed-book", "extractive"] = Field(
        default="model",
        description="with an index: the model answers from the passages; or without seeing them, so that they only "
        "decide on refusal and are cited; or the best sentence is quoted",
    )
    top_k_passages: int = Field(default=3, ge=1, le=20, description="with an index: passages that an answer may use")
    refuse_below: float = Field(
        default=0.5, ge=0, le=1, description="with an index: refuse if the best passage supports less of the question"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the model runs")
    threads: int = Field(default=0, ge=0, description="threads of the model; 0 takes one per physical core")

    @model_validator(mode="after")
    def _smoke_needs_questions(self) -> ServeParams:
        if (self.mode == "smoke") != bool(self.smoke_questions):
            raise ValueError("mode smoke and smoke_questions go together: give both or neither")
        if any(not question.strip() for question in self.smoke_questions):
            raise ValueError("smoke_questions must not hold an empty question")
        if self.allowed_signers and not self.require_signed_by:
            raise ValueError("allowed_signers belongs to require_signed_by: give both or neither")
        return self
