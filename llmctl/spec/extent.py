"""Stages that can be asked to go further: what they leave in `work/` is kept for the next, larger extent."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel


@cache
def has_extent(params: type[BaseModel]) -> bool:
    """Whether any parameter, in a nested model too, says how far to go (`affects="extent"`)."""
    return any(
        (isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("affects") == "extent")
        or any(has_extent(model) for model in _models(info.annotation))
        for info in params.model_fields.values()
    )


def _models(annotation: Any) -> list[type[BaseModel]]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]
