"""How request bodies are read: strictly, `null` as if it were absent, and what is lacking refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic import ValidationInfo as Info
from pydantic_core import CoreSchema

from llmctl.text.tools import json_problem

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
}
"""Fields of OpenAI's API that this server lacks, with the values that ask for nothing."""


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half of a surrogate pair, which is no character") from error
    return text


def _asks_for_nothing(value: Any, info: Info) -> Any:
    """Refuse a field that is lacking here unless its value makes no difference. `false` is not the penalty 0."""
    name = info.field_name or ""
    if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]):
        raise ValueError(f"`{name}` is not supported by this server")
    return value


def lacking(name: str) -> Any:
    """The type of a field that must ask for nothing."""
    return Annotated[Any, AfterValidator(_asks_for_nothing), Field(json_schema_extra={"enum": list(NEUTRAL[name])})]


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
FIRST: Any = Field(fail_fast=True)
"""Of a list only the first mistake is looked for: a megabyte of wrong values has a million, and one is told."""
Id = Annotated[int, Field(ge=0, lt=2**31)]
MAX_TOKENS = 2**31 - 1
Harmless = Annotated[Any, Field(description="Accepted, and without effect on the answer.")]


def _sound(value: dict[str, Any]) -> dict[str, Any]:
    if problem := json_problem(value):
        raise ValueError(f"the object cannot be used: {problem}")
    return value


Object = Annotated[dict[str, Any], AfterValidator(_sound)]
"""A JSON object of any content, such as a schema."""


class Strict(BaseModel):
    """No conversion of types, no unknown keys, no NaN. `null` leaves a field open, as if it were not there."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        own = cls.model_fields
        return {key: value for key, value in data.items() if value is not None or _needed(own.get(key))}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core))
        needed = schema.get("required", ())
        for name, field in schema.get("properties", {}).items():
            if name not in needed and not _takes_null(field):
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        return schema


def _needed(field: Any) -> bool:
    """Whether its absence would be a mistake: then null is one too. Unknown fields are named as such."""
    return field is None or field.is_required()


def _takes_null(field: Mapping[str, Any]) -> bool:
    return (
        any(one.get("type") == "null" for one in field.get("anyOf", ()))
        or None in field.get("enum", ())
        or not ({"type", "anyOf", "$ref", "enum", "const", "oneOf", "allOf"} & set(field))
    )
