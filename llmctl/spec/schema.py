"""JSON Schema (2020-12) of spec files, built from the models that validate them: for completion in editors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from llmctl.spec import skeleton
from llmctl.spec.skeleton import PipelineModel, SelectModel, SingleModel, Skeleton, StageModel
from llmctl.stage import Stage

if TYPE_CHECKING:
    from llmctl.spec.pipeline import Registry

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
EXPRESSION: Schema = {"type": "string", "pattern": r"\$\{\{.*\}\}"}
"""What may stand for a value of any other type."""
NULL: Schema = {"type": "null"}
"""What may stand for a value that need not be given: nothing behind its key."""
_UNIONS = ("anyOf", "oneOf", "allOf")
_INCLUDED: Schema = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"url": {"type": "string"}, "sha256": {"type": "string"}},
            "required": ["url", "sha256"],
            "additionalProperties": False,
        },
    ]
}
INCLUDE: Schema = {
    "anyOf": [*_INCLUDED["anyOf"], {"type": "array", "items": _INCLUDED}],
    "description": "a file merged below this one, or several",
}
_CELLS: Schema = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
_RULE: Schema = {"anyOf": [_CELLS, {"type": "array", "items": {"anyOf": [_CELLS, EXPRESSION]}}, EXPRESSION]}
_AXIS: Schema = {"type": "array", "items": _CELLS["additionalProperties"], "minItems": 1}
MATRIX: Schema = {
    "anyOf": [
        {
            "type": "object",
            "minProperties": 1,
            "properties": {"include": _RULE, "exclude": _RULE},
            "additionalProperties": {"anyOf": [_AXIS, EXPRESSION]},
        },
        EXPRESSION,
        NULL,
    ],
    "description": "values by key; every combination is an instance",
}


def pipeline_schema(registry: Registry) -> Schema:
    """The schema of a pipeline, with the parameters and ports of every installed stage."""
    definitions: Schema = {}
    schema = _model(PipelineModel, definitions)
    definitions["Stage"] = _stage(registry, definitions)
    stages = _map({"anyOf": [{"$ref": "#/$defs/Stage"}, EXPRESSION]}) | {"minProperties": 1}
    schema["properties"]["stages"] = {"anyOf": [stages, EXPRESSION]}
    overlay = _loose(_model(PipelineModel, definitions))
    overlay["properties"]["stages"] = _map({"$ref": "#/$defs/Overlay"})
    definitions["Overlay"] = _overlay(definitions)
    _sections(schema, _without(overlay, "llmctl", "name", "profiles"))
    return _whole(schema, definitions, "llmctl pipeline")


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _sections(schema: Schema, overlay: Schema) -> None:
    """Give `vars` and `profiles` their schema: they are read before there are values for expressions."""
    overlay["properties"]["vars"] = schema["properties"]["vars"] = {"type": ["object", "null"]}
    schema["properties"]["profiles"] = _map(overlay) | {"type": ["object", "null"]}


def stage_schema(stage: Stage) -> Schema:
    """The schema of a single-stage file for `stage`."""
    definitions: Schema = {}
    schema = _model(SingleModel, definitions)
    required = [name for name, port in stage.inputs.items() if not port.optional]
    schema["properties"] |= _of_stage(stage, definitions, required)
    schema["properties"]["uses"] = {"type": "string", "pattern": _uses(stage.name)}
    if any(field.is_required() for field in _params(stage).model_fields.values()):
        schema["required"] = [*schema.get("required", ()), "with"]
    if required:
        schema["required"] = [*schema.get("required", ()), "inputs"]
    overlay = _loose(_model(SingleModel, definitions))
    _sections(schema, _without(overlay, "llmctl", "name", "profiles"))
    return _whole(schema, definitions, f"llmctl {stage.name}")


def _whole(schema: Schema, definitions: Schema, title: str) -> Schema:
    schema["properties"]["include"] = INCLUDE
    return {"$schema": DIALECT, "title": title, **schema, "$defs": definitions}


def _model(model: type[BaseModel], definitions: Schema) -> Schema:
    """The schema of one model; those that it holds go to `definitions`."""
    schema = model.model_json_schema(by_alias=True, ref_template="#/$defs/{model}")
    for name, inner in schema.pop("$defs", {}).items():
        definitions.setdefault(name, _definition(name, inner))
    schema.pop("title", None)
    schema.pop("description", None)
    return _widened(schema, nullable=issubclass(model, Skeleton))


def _definition(name: str, schema: Schema) -> Schema:
    """A model inside another: its short form, where it has one, may stand in its place."""
    kind = getattr(skeleton, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Skeleton)):
        return _widened(schema)
    wide = _widened(schema, nullable=True)
    if not kind.shorthand:
        return wide
    short = wide["properties"][kind.shorthand]
    kinds = [other for other in short.get("anyOf", [short]) if other != NULL]  # a key without a value means nothing
    return {"anyOf": [*kinds, wide]}


def _widened(schema: Schema, nullable: bool = False) -> Schema:
    """`schema` in which an expression may stand for every value inside; with `nullable`, nothing behind a key."""
    schema = deepcopy(schema)
    required = schema.get("required", ()) if nullable else schema.get("properties", ())
    for key in ("properties", "patternProperties", "additionalProperties", "items", "prefixItems", *_UNIONS):
        inner = schema.get(key)
        if key in ("properties", "patternProperties") and isinstance(inner, dict):
            schema[key] = {
                name: _value(item, key == "properties" and name not in required) for name, item in inner.items()
            }
        elif isinstance(inner, dict):
            schema[key] = _value(inner)
        elif isinstance(inner, list):
            schema[key] = [_value(item) for item in inner]
    return schema


def _value(schema: Schema, nullable: bool = False) -> Schema:
    """A value inside: widened, and open to an expression unless it is text, which an expression is too."""
    wide = _widened(schema)
    notes: Schema = {key: wide.pop(key) for key in ("description", "default", "title") if key in wide}
    more: list[Schema] = [NULL] if nullable and NULL not in wide.get("anyOf", ()) else []
    if wide.get("type") == "string" and "enum" not in wide and "const" not in wide:
        if "pattern" in wide:
            pattern = wide.pop("pattern")
            wide["anyOf"] = [{"pattern": pattern}, {"pattern": EXPRESSION["pattern"]}]
    elif wide and not any(key in wide for key in _UNIONS):
        more.append(EXPRESSION)
    if not more or not wide:
        return {**wide, **notes}
    return {"anyOf": [wide, *more], **notes}


def _stage(registry: Registry, definitions: Schema) -> Schema:
    """One entry of `stages`: the keys of a stage or of a `select`, and per stage its parameters and ports."""
    stage = _model(StageModel, definitions)
    select = _model(SelectModel, definitions)
    stage["properties"]["matrix"] = MATRIX
    cases = []
    for name, found in sorted(registry.stages.items()):
        properties = _of_stage(found, definitions)
        uses = {"properties": {"uses": {"type": "string", "pattern": _uses(name)}}, "required": ["uses"]}
        cases.append({"if": uses, "then": {"properties": properties}})
    stage["properties"]["uses"] = {
        "description": "an installed stage, perhaps with a version: sft@>=1.2",
        "type": "string",
        "anyOf": [
            {"enum": sorted(registry.stages)},
            {"pattern": "|".join([*map(_uses, sorted(registry.stages)), EXPRESSION["pattern"]])},
        ],
    }
    stage["allOf"] = cases
    return {"if": {"type": "object", "required": ["select"]}, "then": select, "else": stage}


def _uses(name: str) -> str:
    return f"^{name}(@.+)?$"


def _of_stage(stage: Stage, definitions: Schema, required: Sequence[str] = ()) -> Schema:
    """`with` and `inputs` of one stage; `required` are the ports that must be there."""
    own: Schema = {}
    try:
        params = _model(_params(stage), own)
    except Exception as error:  # a plugin's import; `check` reports it where the stage is used
        params = {"description": f"its parameters cannot be imported: {type(error).__name__}: {error}"}
    for name, inner in own.items():
        definitions[f"{stage.name}.{name}"] = _renamed(inner, stage.name)
    definitions[f"{stage.name}.with"] = _renamed({**params, "type": ["object", "null"]}, stage.name)
    ports = {
        name: {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}],
            "description": f"{port.help or ''} ({' or '.join(port.types)})".strip(),
        }
        for name, port in stage.inputs.items()
    }
    kind = "object" if required else ["object", "null"]
    inputs: Schema = {"type": kind, "properties": ports, "additionalProperties": False, "required": list(required)}
    return {
        "with": {"anyOf": [{"$ref": f"#/$defs/{stage.name}.with"}, EXPRESSION]},
        "inputs": {"anyOf": [inputs, EXPRESSION]},
    }


def _params(stage: Stage) -> type[BaseModel]:
    found = stage.load_params()
    assert isinstance(found, type) and issubclass(found, BaseModel)
    return found


def _renamed(schema: Any, prefix: str) -> Any:
    """The references of a stage's schema to its own definitions."""
    if isinstance(schema, Mapping):
        return {
            key: f"#/$defs/{prefix}.{value.removeprefix('#/$defs/')}" if key == "$ref" else _renamed(value, prefix)
            for key, value in schema.items()
        }
    return [_renamed(item, prefix) for item in schema] if isinstance(schema, list) else schema


def _overlay(definitions: Schema) -> Schema:
    """A stage in a profile: any of its keys, none required; what it uses may stand in another layer."""
    both = _loose(_model(StageModel, definitions)), _loose(_model(SelectModel, definitions))
    both[0]["properties"]["matrix"] = MATRIX
    return {
        "type": "object",
        "properties": both[1]["properties"] | both[0]["properties"],
        "additionalProperties": False,
    }


def _loose(schema: Schema) -> Schema:
    schema.pop("required", None)
    return schema


def _without(schema: Schema, *names: str) -> Schema:
    schema["properties"] = {name: item for name, item in schema["properties"].items() if name not in names}
    return schema
