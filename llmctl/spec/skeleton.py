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

    shorthand = "uri"

    uri: str = Field(min_length=1)
    type: str = "files"
    identity: Literal["sha256", "pinned"] = "sha256"
    digest: str | None = Field(default=None, pattern=r"^sha256:[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _pinned_to_something(self) -> Self:
        if self.identity == "pinned" and self.digest is None:
            raise ValueError("`identity: pinned` needs the `digest` that it is pinned to")
        return self


class SecretModel(Skeleton):
    """`secrets.<NAME>`. A command can stand in the user's own configuration only: a spec may come from anywhere."""

    shorthand = "from"

    origin: Literal["env", "file"] = Field(alias="from")
    variable: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    path: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _says_where(self) -> Self:
        given = {"env": self.variable, "file": self.path, "command": getattr(self, "command", None)}
        for origin, value in given.items():
            if value is not None and origin != self.origin:
                raise ValueError(f"`{_WHERE[origin]}` belongs to `from: {origin}`")
        if self.origin != "env" and given[self.origin] is None:
            raise ValueError(f"`from: {self.origin}` needs `{_WHERE[self.origin]}`")
        return self


_WHERE = {"env": "variable", "file": "path", "command": "command"}


class UserSecretModel(SecretModel):
    """`secrets.<NAME>` of the user's own configuration."""

    origin: Literal["env", "file", "command"] = Field(alias="from")  # type: ignore[assignment]  # wider, on purpose
    command: str | None = Field(default=None, min_length=1)


class EnvModel(Skeleton):
    """`stages.<id>.env.<NAME>`."""

    shorthand = "value"

    value: str | None = None
    affects_output: bool | None = None
    secret: str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.value is None) == (self.secret is None):
            raise ValueError("a variable needs either `value` or `secret`")
        if self.secret is not None and self.affects_output:
            raise ValueError("a secret is never part of a key, so it cannot have `affects_output: true`")
        return self


class ResourcesModel(Skeleton):
    """`stages.<id>.resources`."""

    later = frozenset({"shards"})

    cpus: int | None = Field(default=None, ge=1)
    memory: Annotated[str, AfterValidator(memory_bytes)] | None = None
    gpus: int | None = Field(default=None, ge=0)
    nodes: int | None = Field(default=None, ge=1)
    gpu_type: str | None = Field(default=None, min_length=1)
    disk: Annotated[str, AfterValidator(memory_bytes)] | None = None
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


Listed = BeforeValidator(_listed, json_schema_input_type=str | list[str])
References = Annotated[list[str], Listed, Field(min_length=1)]
Retries = Annotated[int, Field(ge=0, le=100)]


EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Env = dict[EnvName, EnvModel]


class NodeModel(Skeleton):
    """What every node of the graph has, a stage and a `select` alike."""

    needs: list[str] = []
    gates: list[GateModel] = []
    output: str | None = Field(default=None, min_length=1)
    tag: str = Field(default="", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class BodyModel(NodeModel):
    """What a stage of a pipeline and a single-stage file have in common."""

    later = frozenset({"launcher"})

    uses: str
    inputs: dict[str, References] = {}
    params: dict[str, Any] = Field(default={}, alias="with")
    env: Env = {}
    resources: ResourcesModel = ResourcesModel()
    cache: Literal["auto", "off", "refresh"] = "auto"
    retries: Retries = 0


class StageModel(BodyModel):
    """`stages.<id>` with `uses`."""

    ephemeral: bool = False
    matrix: dict[str, Any] | None = None
    foreach: str | None = None

    @model_validator(mode="after")
    def _one_kind_of_rows(self) -> Self:
        if self.matrix is not None and self.foreach is not None:
            raise ValueError("a stage has `matrix` or `foreach`, not both")
        return self


class ByModel(Skeleton):
    """`by` of a `select`."""

    metric: str = Field(min_length=1)
    mode: Literal["min", "max"]


class SelectModel(NodeModel):
    """`stages.<id>` with `select` in place of `uses`."""

    select: dict[str, References] = Field(min_length=1)
    by: ByModel


class DefaultsModel(Skeleton):
    """`defaults`; only keys that decide how a stage runs."""

    later = frozenset({"launcher"})

    env: Env = {}
    resources: ResourcesModel = ResourcesModel()
    retries: Retries = 0


class StoreModel(Skeleton):
    """`store`."""

    shorthand = "uri"

    uri: str | None = Field(default=None, min_length=1)
    remotes: dict[Annotated[str, Field(pattern=NAME)], str] = {}


class FileModel(Skeleton):
    """What pipelines and single-stage files have in common."""

    later = frozenset({"launchers"})

    llmctl: Literal[1]
    name: str = Field(pattern=NAME)
    vars: dict[str, Any] = {}
    secrets: dict[EnvName, SecretModel] = {}
    sources: dict[Annotated[str, Field(pattern=NAME)], SourceModel] = {}
    store: StoreModel = StoreModel()
    profiles: dict[str, dict[str, Any]] = {}


class PipelineModel(FileModel):
    """A file with `stages`; each stage is validated on its own, so that a mistake in one hides none of another."""

    stages: dict[str, Any] = Field(min_length=1)
    defaults: DefaultsModel = DefaultsModel()
    next: list[str] = []


class SingleModel(FileModel, BodyModel):
    """A file with `uses`."""

    later = FileModel.later | BodyModel.later


class UserModel(Skeleton):
    """The user's own configuration; operational keys only."""

    store: StoreModel = StoreModel()
    secrets: dict[EnvName, UserSecretModel] = {}
    log_format: Literal["", "text", "json"] = ""
