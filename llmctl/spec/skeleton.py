"""Phase A: what keys a spec may have, as pydantic models. The parameters under `with` belong to the stages."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

FORMAT = 1
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b\Z", re.IGNORECASE)
_TIME = re.compile(r"(?=\d)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?\Z")


def memory_bytes(text: str) -> int:
    """`8GiB`, `500MB` → bytes; the `i` makes the unit binary."""
    match = _MEMORY.match(text)
    if match is None:
        raise ValueError("Input should be a size such as `8GiB` or `500MB`")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _UNITS[unit.lower()])


def time_seconds(text: str) -> int:
    """`24h`, `1h30m`, `90s` → seconds."""
    match = _TIME.match(text)
    if match is None:
        raise ValueError("Input should be a time such as `24h`, `1h30m` or `90s`")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class Skeleton(BaseModel):
    """Base of the models of this page."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    later: ClassVar[frozenset[str]] = frozenset()
    """Keys of the documented format that this version does not support."""
    shorthand: ClassVar[str] = ""
    """The field that is meant when a scalar stands in place of the map."""

    @model_validator(mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        if isinstance(value, dict):
            # A key with nothing behind it (`with:` and all parameters commented out) is a key not given.
            return {key: item for key, item in value.items() if item is not None}
        return {cls.shorthand: value} if cls.shorthand and not isinstance(value, list) else value


class SourceModel(Skeleton):
    """`sources.<name>`."""

    later = frozenset({"identity", "digest"})
    shorthand = "uri"

    uri: str = Field(min_length=1)
    type: str = "files"


class EnvModel(Skeleton):
    """`stages.<id>.env.<NAME>`."""

    later = frozenset({"secret"})
    shorthand = "value"

    value: str
    affects_output: bool = True


class ResourcesModel(Skeleton):
    """`stages.<id>.resources`."""

    later = frozenset({"gpu_type", "nodes", "disk", "shards"})

    cpus: int | None = Field(default=None, ge=1)
    memory: Annotated[str, AfterValidator(memory_bytes)] | None = None
    gpus: int | None = Field(default=None, ge=0)
    time: Annotated[str, AfterValidator(time_seconds)] | None = None


RELATIVE_LIMITS = ("max_drop", "max_rise", "min_ratio", "max_ratio")


class GateModel(Skeleton):
    """One of `stages.<id>.gates`."""

    metric: str = Field(min_length=1)
    min: float | None = None
    max: float | None = None
    baseline: str | None = None
    max_drop: float | None = Field(default=None, ge=0)
    max_rise: float | None = Field(default=None, ge=0)
    min_ratio: float | None = Field(default=None, ge=0)
    max_ratio: float | None = Field(default=None, ge=0)
    on_fail: Literal["stop", "warn"] = "stop"

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        relative = any(getattr(self, name) is not None for name in RELATIVE_LIMITS)
        names = ", ".join(f"`{name}`" for name in RELATIVE_LIMITS)
        if relative and self.baseline is None:
            raise ValueError(f"{names} need a `baseline`")
        if self.baseline is not None and not relative:
            raise ValueError(f"`baseline` needs one of {names}")
        if not relative and self.min is None and self.max is None:
            raise ValueError(f"a gate needs `min`, `max`, or `baseline` with one of {names}")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"`min` {self.min:g} is above `max` {self.max:g}, no value can pass")
        return self


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Env = dict[EnvName, EnvModel]


class StageModel(Skeleton):
    """`stages.<id>`, and the body of a single-stage file."""

    later = frozenset({"matrix", "foreach", "select", "by", "retries", "launcher", "ephemeral"})

    uses: str
    inputs: dict[str, Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]] = {}
    params: dict[str, Any] = Field(default={}, alias="with")
    env: Env = {}
    resources: ResourcesModel = ResourcesModel()
    needs: list[str] = []
    gates: list[GateModel] = []
    output: str | None = Field(default=None, min_length=1)
    cache: Literal["auto", "off", "refresh"] = "auto"
    tag: str = Field(default="", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class DefaultsModel(Skeleton):
    """`defaults`; only keys that decide how a stage runs."""

    later = frozenset({"retries", "launcher"})

    env: Env = {}
    resources: ResourcesModel = ResourcesModel()


class FileModel(Skeleton):
    """What pipelines and single-stage files have in common."""

    later = frozenset({"include", "secrets", "store", "launchers"})

    llmctl: Literal[1]
    name: str = Field(pattern=NAME)
    vars: dict[str, Any] = {}
    sources: dict[Annotated[str, Field(pattern=NAME)], SourceModel] = {}
    profiles: dict[str, dict[str, Any]] = {}


class PipelineModel(FileModel):
    """A file with `stages`; each stage is validated on its own, so that a mistake in one hides none of another."""

    stages: dict[str, Any] = Field(min_length=1)
    defaults: DefaultsModel = DefaultsModel()
    next: list[str] = []


class SingleModel(FileModel, StageModel):
    """A file with `uses`."""

    later = FileModel.later | StageModel.later


SECTIONS = ("llmctl", "name", "vars", "sources", "stages", "defaults", "profiles", "next", *sorted(FileModel.later))
