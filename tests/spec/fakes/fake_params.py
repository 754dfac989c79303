"""Parameters of the fake stages: every kind of type that a real stage uses."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from llmctl.spec.params import Field, Params


class CleanParams(Params):
    lang: str = Field("", description="language")
    min_chars: int = Field(0, ge=0, description="shortest text")
    threads: int = Field(1, description="speed only", affects="nothing")


class DataParams(Params):
    reader: Literal["python-stdlib", "files"] = Field("python-stdlib", description="reader")
    produce: list[str] = Field(["text", "chat"], description="outputs")
    clean: CleanParams = Field(CleanParams(), description="cleaning")
    seed: int = Field(0, description="seed")

    def outputs(self) -> set[str]:
        return {*self.produce, "metrics"}


class TokenizeParams(Params):
    vocab_size: int = Field(256, ge=16, description="entries")
    extend: bool = Field(False, description="add to what there is")

    def required_inputs(self) -> dict[str, str]:
        return {"tokenizer": "extend: true"} if self.extend else {}


class TrainParams(Params):
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of the moments")
    max_steps: int = Field(100, ge=1, description="how far", affects="extent")
    save_every: int = Field(10, ge=1, description="checkpoints", affects="nothing")
    warmup_steps: int = Field(0, ge=0, description="warm-up")
    optimizer: Literal["muon", "adamw"] = Field("muon", description="optimizer")
    packing: bool = Field(True, description="pack documents")
    run_tag: str = Field("", description="free text")
    note: str | None = Field(None, description="free text or nothing")
    chunks: int | str = Field("auto", description="number or auto")
    weights: dict[str, float] = Field({}, description="mixture")
    init: Path | None = Field(None, description="a file")
    seed: int = Field(0, description="seed")

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is more than max_steps ({self.max_steps})")
        return self


class EvalParams(Params):
    tasks: list[Literal["perplexity", "exact-match"]] = Field(["perplexity"], description="tasks")


class PlainParams(Params):
    bits: int = Field(8, description="bits")


class RequiredParams(Params):
    to: str = Field(description="where to")
