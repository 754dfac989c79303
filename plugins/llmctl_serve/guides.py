"""What an answer must look like: `response_format`, and the `guided_…` fields that vLLM's clients send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmctl_serve.bodies import Object, Strict, Text

Kind = Literal["json", "schema", "regex", "choice", "grammar"]


@dataclass(frozen=True)
class Guide:
    """One form that an answer may have. `value`: a schema, an expression, choices, or a grammar."""

    kind: Kind
    value: Any
    param: str
    """The field of the request that asked for it."""


class NamedSchema(Strict):
    """A JSON schema as OpenAI's clients send it."""

    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: Object | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="Answers keep to the schema either way.")


class ResponseFormat(Strict):
    """The form of a chat's answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` and the type json_schema go together")
        return self


class StructuredOutputs(Strict):
    """vLLM's present name for the same; exactly one of them."""

    json_: Object | Text | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class Guided(Strict):
    """Fields that prescribe the form of an answer."""

    guided_json: Object | Text | None = Field(default=None, description="A JSON schema.")
    guided_regex: Text | None = Field(default=None, description="A regular expression of the whole answer.")
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=1000, fail_fast=True)] | None = Field(
        default=None, description="The answer is one of these."
    )
    guided_grammar: Text | None = Field(default=None, description="A context-free grammar in Lark's notation.")
    structured_outputs: StructuredOutputs | None = None


def guide_of(body: Guided, form: ResponseFormat | None = None) -> Guide | None:
    """The form that a request prescribes, if it prescribes one. ValueError for two at once."""
    named: list[tuple[Kind, Any, str]] = [
        ("schema", body.guided_json, "guided_json"),
        ("regex", body.guided_regex, "guided_regex"),
        ("choice", body.guided_choice, "guided_choice"),
        ("grammar", body.guided_grammar, "guided_grammar"),
    ]
    found = [Guide(kind, value, param) for kind, value, param in named if value is not None]
    if (structured := body.structured_outputs) is not None:
        param = "structured_outputs"
        asked: list[tuple[Kind, Any]] = [
            ("schema", structured.json_),
            ("regex", structured.regex),
            ("choice", structured.choice),
            ("grammar", structured.grammar),
            ("json", structured.json_object or None),
        ]
        found += [Guide(kind, value, param) for kind, value in asked if value is not None]
    if form is not None and form.type == "json_object":
        found.append(Guide("json", True, "response_format"))
    if form is not None and form.json_schema is not None:
        found.append(Guide("schema", form.json_schema.schema_ or {}, "response_format"))
    if len(found) > 1:
        raise ValueError(f"`{found[1].param}` and {found[0].param} both prescribe the form of the answer")
    return found[0] if found else None
