"""Makes answers keep to a form: a schema, an expression, a grammar, or calls of tools."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.engine import Constraint
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve.conversations import ChatRequest
from llmctl_serve.errors import ApiError
from llmctl_serve.guides import Guide


@dataclass(frozen=True)
class Constraints:
    """The forms that one model's answers can be given."""

    tokenizer: Tokenizer
    vocab_size: int
    eos_ids: frozenset[int]

    def guided(self, guide: Guide) -> Constraint:
        """The constraint of a guide. ApiError 400 for one that cannot be followed."""
        raise ApiError(400, "not supported yet", guide.param)

    def calling(self, request: ChatRequest) -> Constraint | None:
        """The constraint under which tools are called."""
        raise ApiError(400, "not supported yet", "tools")

    def reader(self, request: ChatRequest) -> None:
        """What finds calls in an answer."""
