"""Parameters that note which of them are read: a knob that nobody reads is a defect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

WHOLE = frozenset({"model_dump", "model_dump_json", "model_copy", "copy", "dict", "json", "__dict__"})
"""Attributes of a model that read every parameter at once."""


def spied(params: BaseModel, read: set[str], prefix: str = "") -> Any:
    """A copy of `params` that adds the dotted name of every parameter to `read` when it is read.

    It is of a subclass of the same class, so that methods, properties and `isinstance` work. Nested models are spied
    upon too: `questions` is read when the model is taken, `questions.facts` when that is.
    """
    kind = type(params)
    fields = frozenset(kind.model_fields)
    whole = {prefix + name for name in names(params)}

    class Spy(kind):  # type: ignore[valid-type,misc]  # a class made at run time
        def __getattribute__(self, name: str) -> Any:
            if name in fields:
                read.add(prefix + name)
            elif name in WHOLE:
                read.update(whole)
            return super().__getattribute__(name)

        def __iter__(self) -> Any:
            read.update(whole)
            return super().__iter__()

    Spy.__name__, Spy.__qualname__, Spy.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    values = {name: _spied_value(value, read, f"{prefix}{name}.") for name, value in params.__dict__.items()}
    copy = Spy.model_construct(_fields_set=set(params.model_fields_set), **values)
    read.clear() if not prefix else None
    return copy


def _spied_value(value: Any, read: set[str], prefix: str) -> Any:
    if isinstance(value, BaseModel):
        return spied(value, read, prefix)
    if isinstance(value, list | tuple) and any(isinstance(item, BaseModel) for item in value):
        return type(value)(_spied_value(item, read, prefix) for item in value)
    if isinstance(value, Mapping) and any(isinstance(item, BaseModel) for item in value.values()):
        return {key: _spied_value(item, read, prefix) for key, item in value.items()}
    return value


def names(params: BaseModel) -> Iterator[str]:
    """The dotted names of all parameters in `params`, as it is: those of a nested model that is None are not there."""
    for name in type(params).model_fields:
        yield name
        for nested in _models(params.__dict__.get(name)):
            yield from (f"{name}.{inner}" for inner in names(nested))


def _models(value: Any) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _models(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _models(item)
