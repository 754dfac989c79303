"""What type stands at a path of a pydantic model: for `--set`, suggestions and messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


def types_at(annotation: Any, path: Sequence[str | int]) -> list[Any]:
    """The alternatives of the type at `path` below `annotation`, `Annotated` and unions taken apart.

    Empty where the path leads nowhere; `Any` where anything may stand.
    """
    found = list(_alternatives(annotation))
    for step in path:
        found = [inner for outer in found for inner in _inside(outer, step)]
    return found


def field_names(model: type[BaseModel]) -> dict[str, str]:
    """Each key as it is written in a spec, with the name of its field."""
    return {info.alias or name: name for name, info in model.model_fields.items()}


def keys_at(annotation: Any, path: Sequence[str | int]) -> list[str]:
    """The keys that the models at `path` know."""
    return [key for kind in types_at(annotation, path) if is_model(kind) for key in field_names(kind)]


def takes_text(annotation: Any, path: Sequence[str | int]) -> bool:
    """Whether only text may stand at `path`, so that `--set` keeps what was typed."""
    kinds = [kind for kind in types_at(annotation, path) if kind is not NoneType]
    kinds = [inner for kind in kinds for inner in _shorthand(kind)]
    return bool(kinds) and all(kind in (str, Path) or _text_choice(kind) for kind in kinds)


def default_at(annotation: Any, path: Sequence[str | int]) -> Any:
    """The default at `path` below a model, as plain JSON; None where there is none."""
    from pydantic_core import PydanticUndefined, to_jsonable_python

    if not is_model(annotation) or not path:
        return None
    info = annotation.model_fields.get(field_names(annotation).get(str(path[0]), ""))
    value = PydanticUndefined if info is None else info.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return None
    plain = to_jsonable_python(value, by_alias=True)
    for step in path[1:]:
        plain = plain.get(step) if isinstance(plain, dict) else None
    return plain


def is_model(kind: Any) -> bool:
    """Whether `kind` is a pydantic model class."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _alternatives(annotation: Any) -> Iterator[Any]:
    if hasattr(annotation, "__metadata__"):  # Annotated
        yield from _alternatives(annotation.__origin__)
    elif get_origin(annotation) in (UnionType, Union):
        for argument in get_args(annotation):
            yield from _alternatives(argument)
    else:
        yield annotation


def _inside(kind: Any, step: str | int) -> Iterator[Any]:
    if is_model(kind):
        name = field_names(kind).get(str(step))
        if name is not None:
            yield from _alternatives(kind.model_fields[name].annotation)
        return
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        yield Any
    elif origin is dict and len(arguments) == 2:
        yield from _alternatives(arguments[1])
    elif origin in (list, set, frozenset, tuple) and arguments:
        yield from _alternatives(arguments[0])


def _shorthand(kind: Any) -> list[Any]:
    name = getattr(kind, "shorthand", "")
    return [inner for inner in types_at(kind, [name]) if inner is not NoneType] if name else [kind]


def _text_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind))
