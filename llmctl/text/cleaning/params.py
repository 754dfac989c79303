"""What can be set about each cleaning step. `AnyStep` is one entry of the list `steps` of the stage `data`."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import model_validator

from llmctl.spec.params import Field, Params


class LengthParams(Params):
    """Drop documents that are too short or too long."""

    name: Literal["length"] = Field(description="the step")
    min_chars: int = Field(1, ge=0, description="shortest text that stays, in characters without surrounding space")
    max_chars: int | None = Field(None, ge=1, description="longest text that stays, in characters; null for any")

    @model_validator(mode="after")
    def _ordered(self) -> LengthParams:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError("max_chars is below min_chars")
        return self


class ExactDuplicatesParams(Params):
    """Keep the first of every set of documents with equal text."""

    name: Literal["exact-duplicates"] = Field(description="the step")
    normalise: bool = Field(
        False, description="texts that differ in case, space and Unicode form (NFKC) only are equal, too"
    )


AnyStep = Annotated[LengthParams | ExactDuplicatesParams, pydantic.Field(discriminator="name")]
