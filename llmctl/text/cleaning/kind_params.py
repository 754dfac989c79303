"""The kinds of documents, and what the parameters of every step that goes by them share."""

from __future__ import annotations

from typing import Literal

from llmctl.spec.params import Field, Params

Kind = Literal["prose", "code", "table", "conversation"]
KINDS = "kinds of documents that the step touches; others pass as they are"


class StepParams(Params):
    """Parameters of a step that touches some kinds of documents only; each step narrows the default."""

    kinds: list[Kind] = Field(["prose", "conversation"], min_length=1, description=KINDS)
