"""Parameters of `compare`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\Z")
RESERVED = ("best", "pareto", "models", "data")
"""What the stage's own metrics begin with."""


class CompareParams(Params):
    """Compare variants of a model: size, speed, memory, quality."""

    names: list[str] = Field(
        default=[], description="name of each bundle, in the order of `model`; none: model-1, model-2, …"
    )
    prompt_tokens: int = Field(default=64, ge=1, description="tokens of the prompt until whose first answer is timed")
    steps: int = Field(default=16, ge=1, description="steps of decoding behind the prompt, timed together")
    batch: int = Field(default=8, ge=1, description="rows that are decoded at once for the throughput")
    rounds: int = Field(
        default=9, ge=6, description="turns of each bundle; from 6 on there is a 95 % interval of a median"
    )
    split: str = Field(default="validation", min_length=1, description="split of `data` that quality is measured on")
    max_tokens: int = Field(
        default=16384, ge=2, description="quality: whole documents or conversations up to this many tokens"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the bundles run")
    threads: int = Field(default=0, ge=0, description="threads of each bundle; 0 takes one per physical core")

    @model_validator(mode="after")
    def _names(self) -> CompareParams:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names has a name twice: {', '.join(self.names)}")
        for name in self.names:
            if not NAME.match(name) or name in RESERVED:
                raise ValueError(
                    f"names: {name!r} is no name of a variant: letters, digits, - and _, and none of "
                    f"{', '.join(RESERVED)}"
                )
        return self
