"""The part of a stage's parameters that decides its result: `with` of the action key and of the resume key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llmctl.spec.canonical import canonical, normalised


def key_params(params: BaseModel, *, extent: bool = True) -> dict[str, Any]:
    """What a key takes from `params`: output-affecting values that differ from their defaults, normalised.

    A new parameter with a default therefore leaves old keys as they are. `extent=False` leaves out how far to go.
    Nested models follow the same rules.
    """
    left_out = {"nothing"} if extent else {"nothing", "extent"}
    return _changed(params, left_out)


def _changed(model: BaseModel, left_out: set[str]) -> dict[str, Any]:
    found = {}
    for name, info, value in _fields(model, left_out, model.model_fields_set):  # what was not set is the default
        default = info.get_default(call_default_factory=True, validated_data={})
        # Compared without what is left out: a default that differs only there is still the default.
        if default is PydanticUndefined or canonical(_whole(value, left_out)) != canonical(_whole(default, left_out)):
            # Of several possible models the defaults do not say which one it is.
            found[name] = _whole(value, left_out) if _models(info.annotation) > 1 else _brief(value, left_out)
    return found


def _brief(value: Any, left_out: set[str]) -> Any:
    """`value` with every nested model reduced to what differs from that model's own defaults."""
    if isinstance(value, BaseModel):
        return _changed(value, left_out)
    if isinstance(value, Mapping):
        return {str(normalised(key)): _brief(item, left_out) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_brief(item, left_out) for item in value]
    return normalised(value)


def _whole(value: Any, left_out: set[str]) -> Any:
    """`value` with every nested model spelled out, its class included."""
    if isinstance(value, BaseModel):
        fields = {name: _whole(item, left_out) for name, _, item in _fields(value, left_out)}
        return {"$class": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(normalised(key)): _whole(item, left_out) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(item, left_out) for item in value]
    return normalised(value)


def _fields(
    model: BaseModel, left_out: set[str], among: Collection[str] | None = None
) -> Iterator[tuple[str, FieldInfo, Any]]:
    for name, info in type(model).model_fields.items():
        if among is not None and name not in among:
            continue
        extra = info.json_schema_extra
        affects = extra.get("affects", "output") if isinstance(extra, dict) else "output"
        if affects not in left_out:
            yield name, info, getattr(model, name)


def _models(annotation: Any) -> int:
    """How many model classes stand in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return 1
    return sum(_models(argument) for argument in get_args(annotation))
