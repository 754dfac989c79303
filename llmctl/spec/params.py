"""The base of every stage's parameters: strict, frozen, every field with a help text and its part in the cache key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic import Field as _field
from pydantic_core import PydanticUndefined

Affects = Literal["output", "extent", "nothing"]


class Params(BaseModel):
    """Parameters of one stage. `"8"` is no int, unknown keys are errors, NaN and infinity are refused."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, defer_build=True
    )

    def outputs(self) -> set[str] | None:
        """The output ports this configuration produces; None (the default) means all of them."""
        return None

    def required_inputs(self) -> Mapping[str, str]:
        """Optional input ports that this configuration needs, each with the setting that says so: `answers: model`."""
        return {}

    def unused_inputs(self) -> Mapping[str, str]:
        """Optional input ports that would have no effect, each with the setting that says so."""
        return {}

    def processes(self) -> int:
        """How many processes run the stage together, each all of it (SPMD); rank 0 leaves the outputs."""
        return 1

    def secrets(self) -> set[str]:
        """Variables of the runner's environment that these parameters name: the stage is given them, as secrets."""
        return set()

    def restarts(self) -> int:
        """How often all of them are started anew after one of several was lost."""
        return 0


def Field(  # noqa: N802  # reads as pydantic's own
    default: Any = PydanticUndefined, *, description: str, affects: Affects = "output", **constraints: Any
) -> Any:
    """A parameter: pydantic's `Field` with a help text and `affects`.

    `output` (default) is part of the action key; `extent` ("how far", e.g. `max_steps`) too, but not of the resume
    key; `nothing` (speed, logging) is in neither.
    """
    return _field(default, description=description, json_schema_extra={"affects": affects}, **constraints)
