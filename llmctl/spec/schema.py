"""JSON Schema (2020-12) of spec files, built from the models that validate them: for completion in editors."""

from __future__ import annotations

from collections.abc import Mapping
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
INCLUDE: Schema = {
    "type": "array",
    "items": {
        "anyOf": [
            {"type": "string"},
            {
                "type": "object",
                "properties": {"url": {"type": "string"}, "sha256": {"type": "string"}},
                "required": ["url", "sha256"],
                "additionalProperties": False,
            },
        ]
    },
    "description": "files merged below this one",
}


def pipeline_schema(registry: Registry) -> Schema:
    """The schema of a pipeline, with the parameters and ports of every installed stage."""
    definitions: Schema = {}
    schema = _model(PipelineModel, definitions)
    definitions["Stage"] = _stage(registry, definitions)
    schema["properties"]["stages"] |= {"additionalProperties": {"$ref": "#/$defs/Stage"}}
    overlay = _loose(_model(PipelineModel, definitions))
    overlay["properties"]["stages"] = {"type": "object", "additionalProperties": {"$ref": "#/$defs/Overlay"}}
    definitions["Overlay"] = _overlay(definitions)
    schema["properties"]["profiles"] |= {"additionalProperties": _without(overlay, "llmctl", "name", "profiles")}
    return _whole(schema, definitions, "llmctl pipeline")


def stage_schema(stage: Stage) -> Schema:
    """The schema of a single-stage file for `stage`."""
    definitions: Schema = {}
    schema = _model(SingleModel, definitions)
    schema["properties"] |= _of_stage(stage, definitions)
    schema["properties"]["uses"] = {"type": "string", "pattern": _uses(stage.name)}
    required = [name for name, port in stage.inputs.items() if not port.optional]
    if any(field.is_required() for field in _params(stage).model_fields.values()):
        schema["required"] = [*schema.get("required", ()), "with"]
    if required:
        schema["properties"]["inputs"]["required"] = required
        schema["required"] = [*schema.get("required", ()), "inputs"]
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
    return _widened(schema)


def _definition(name: str, schema: Schema) -> Schema:
    """A model inside another: its short form, where it has one, may stand in its place."""
    kind = getattr(skeleton, name, None)
    wide = _widened(schema)
    if isinstance(kind, type) and issubclass(kind, Skeleton) and kind.shorthand:
        return {"anyOf": [wide["properties"][kind.shorthand], wide]}
    return wide


def _widened(schema: Schema) -> Schema:
    """`schema` in which an expression may stand for every value that is no text, and nothing for every map."""
    schema = deepcopy(schema)
    for key in ("properties", "additionalProperties", "items", "prefixItems", "anyOf", "oneOf", "allOf"):
        inner = schema.get(key)
        if key == "properties" and isinstance(inner, dict):
            schema[key] = {name: _value(item) for name, item in inner.items()}
        elif isinstance(inner, dict):
            schema[key] = _value(inner)
        elif isinstance(inner, list):
            schema[key] = [_value(item) for item in inner]
    return schema


def _value(schema: Schema) -> Schema:
    """A value inside: widened, and open to an expression unless it is text or holds other values."""
    wide = _widened(schema)
    kind = wide.get("type")
    if kind in ("integer", "number", "boolean", "array") or "enum" in wide or "const" in wide:
        notes: Schema = {key: wide.pop(key) for key in ("description", "default", "title") if key in wide}
        return {"anyOf": [wide, EXPRESSION], **notes}
    if kind == "object":
        return {**wide, "type": ["object", "null"]}
    if "pattern" in wide and kind == "string":
        pattern = wide.pop("pattern")
        return {**wide, "anyOf": [{"pattern": pattern}, {"pattern": EXPRESSION["pattern"]}]}
    return wide


def _stage(registry: Registry, definitions: Schema) -> Schema:
    """One entry of `stages`: the keys of a stage or of a `select`, and per stage its parameters and ports."""
    stage = _model(StageModel, definitions)
    select = _model(SelectModel, definitions)
    matrix = {"type": "object", "minProperties": 1, "description": "values by key; every combination is an instance"}
    stage["properties"]["matrix"] = matrix
    cases = []
    for name, found in sorted(registry.stages.items()):
        properties = _of_stage(found, definitions)
        uses = {"properties": {"uses": {"type": "string", "pattern": _uses(name)}}, "required": ["uses"]}
        cases.append({"if": uses, "then": {"properties": properties}})
    stage["properties"]["uses"] = {
        "type": "string",
        "description": "an installed stage, perhaps with a version: sft@>=1.2",
        "anyOf": [{"enum": sorted(registry.stages)}, {"pattern": "|".join(map(_uses, sorted(registry.stages)))}],
    }
    stage["allOf"] = cases
    return {"if": {"type": "object", "required": ["select"]}, "then": select, "else": stage}


def _uses(name: str) -> str:
    return f"^{name}(@.+)?$"


def _of_stage(stage: Stage, definitions: Schema) -> Schema:
    """`with` and `inputs` of one stage."""
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
    inputs = {"type": ["object", "null"], "properties": ports, "additionalProperties": False}
    return {"with": {"$ref": f"#/$defs/{stage.name}.with"}, "inputs": inputs}


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
