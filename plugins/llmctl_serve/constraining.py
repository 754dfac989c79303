"""Makes answers keep to a form: a schema, an expression, a grammar, or calls of tools; and finds such calls."""

from __future__ import annotations

import json
import threading
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmctl import InputError, UsageError
from llmctl.engine import Constraint
from llmctl.text.tokenizer import Tokenizer
from llmctl.text.tools import ToolCallParser, ToolFormat, check_tools, json_problem, tool_constraint, tool_format
from llmctl_serve.conversations import ChatRequest, ToolChoice
from llmctl_serve.errors import ApiError
from llmctl_serve.guides import Guide

if TYPE_CHECKING:
    from llmctl.text.constraints import Constraints


@dataclass
class Forms:
    """The forms that one model's answers can be given. What they need is loaded when the first one is asked for."""

    tokenizer: Tokenizer
    vocab_size: int
    eos_ids: frozenset[int]
    _constraints: Constraints | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def constraints(self) -> Constraints:
        """The library's side of it. UsageError where the tokenizer or the installation does not allow constraints."""
        with self._lock:
            if self._constraints is None:
                from llmctl.text.constraints import Constraints

                self._constraints = Constraints(self.tokenizer, self.vocab_size, self.eos_ids)
            return self._constraints

    def guided(self, guide: Guide) -> Constraint:
        """The constraint of a guide. ApiError 400 for one that cannot be followed."""
        try:
            if guide.kind == "json":
                return self.constraints.json_object()
            if guide.kind == "schema":
                return self.constraints.json_schema(_schema(guide))
            if guide.kind == "regex":
                return self.constraints.regex(guide.value)
            if guide.kind == "choice":
                return self.constraints.choices(guide.value)
            return self.constraints.grammar(guide.value)
        except UsageError as error:
            raise _refused(error, guide.param) from error

    def calling(self, request: ChatRequest) -> Constraint | None:
        """What forces the calls that a request insists on; None where the model decides. ApiError 400 for bad tools."""
        tools = [tool.model_dump(exclude_none=True) for tool in request.callable_tools]
        try:
            if request.tool_choice in (None, "auto"):
                check_tools(tools)
                return None
            chosen = request.tool_choice
            name = chosen.function.name if isinstance(chosen, ToolChoice) else None
            parallel = request.parallel_tool_calls is not False and name is None
            return tool_constraint(self.constraints, tools, name, self._form(), parallel)
        except UsageError as error:
            raise _refused(error, "tools") from error

    def _form(self) -> ToolFormat:
        try:
            return tool_format(self.tokenizer.chat_template.source)
        except InputError:
            return "hermes"


class CallReader:
    """Separates calls of tools from what is said, while it comes."""

    def __init__(self, request: ChatRequest) -> None:
        self._parser = ToolCallParser([tool.function.name for tool in request.callable_tools])
        self._most = 1 if request.parallel_tool_calls is False else None
        self._given = 0

    def add(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """(what is said, chunks of calls as in `delta.tool_calls`) of further text."""
        return self._parser.feed(text), self._fresh()

    def flush(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back, at the end."""
        return self._parser.finish(), self._fresh()

    def _fresh(self) -> list[dict[str, Any]]:
        """Calls that were completed since. Their arguments come whole: a call is known as one at its end."""
        calls = self._parser.calls[self._given : self._most]
        found = [
            {
                "index": self._given + at,
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for at, call in enumerate(calls)
        ]
        self._given += len(calls)
        return found


def _schema(guide: Guide) -> Any:
    if not isinstance(guide.value, str):
        return guide.value
    try:
        schema = json.loads(guide.value)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the schema is no JSON: {error}") from error
    if problem := json_problem(schema):
        raise UsageError(f"the schema cannot be used: {problem}")
    return schema


def _refused(error: UsageError, param: str) -> ApiError:
    hint = f" ({error.hint})" if error.hint else ""
    return ApiError(400, f"`{param}`: {error.message}{hint}", param=param)
