"""What answers must look like, as the command line says it: a JSON schema, a regular expression, or a grammar."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmctl import InputError, UsageError

if TYPE_CHECKING:
    from llmctl.engine import Constraint
    from llmctl.generator import Generator
    from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Form:
    """One form, whose `value` is a schema, an expression, or a grammar in Lark's notation."""

    kind: Literal["json", "regex", "grammar"]
    value: Any

    def constraint(self, generator: Generator, tokenizer: Tokenizer) -> Constraint:
        """For answers of a model that is opened here. UsageError for a form that cannot be followed."""
        from llmctl.text.constraints import Constraints

        known = Constraints(tokenizer, generator.vocab_size, generator.eos_ids)
        if self.kind == "json":
            return known.json_schema(self.value)
        return known.regex(self.value) if self.kind == "regex" else known.grammar(self.value)

    def fields(self) -> dict[str, Any]:
        """For a request to a server, in vLLM's names, which `llmctl serve` knows too."""
        return {f"guided_{self.kind}": self.value}


def read_form(schema: str | None, regex: str | None, grammar: str | None) -> Form | None:
    """The form that the options name. UsageError for two of them, InputError for a file that cannot be read."""
    given = {"--json-schema": schema, "--regex": regex, "--grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} contradict each other", hint="an answer has one form")
    if regex is not None:
        return Form("regex", regex)
    if grammar is not None:
        return Form("grammar", _read(grammar))
    if schema is None:
        return None
    try:
        return Form("json", json.loads(_read(schema)))
    except ValueError as error:
        raise InputError(f"{schema} is no JSON: {error}", hint="--json-schema names a file") from error


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
