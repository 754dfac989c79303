"""The result of reading a spec: frozen, validated, wired; everything after this page knows no YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from llmctl.spec.params import Params
    from llmctl.stage import Stage

CACHE_MODES = ("auto", "off", "refresh")


@dataclass(frozen=True, kw_only=True)
class StageRef:
    """Output `port` of stage `stage` of the same pipeline."""

    stage: str
    port: str
    type: str = ""
    """The artifact type, empty where only the run can know it (`Out(same_as=…)` of a path)."""

    def __str__(self) -> str:
        return f"{self.stage}.{self.port}"


@dataclass(frozen=True, kw_only=True)
class SourceRef:
    """A declared source."""

    name: str
    type: str = ""

    def __str__(self) -> str:
        return f"sources.{self.name}"


@dataclass(frozen=True, kw_only=True)
class PathRef:
    """A file, a directory or a glob; `Pipeline.resolve(ref.uri)` is its absolute form. Or the address of a model on the
    hub, `hf://…`.

    `type` is the port's type if the port takes exactly one, else empty.
    """

    uri: str
    type: str = ""
    where: str = field(default="", compare=False)
    """`file:line:column` of the text, for messages of the run."""

    def __str__(self) -> str:
        return self.uri


@dataclass(frozen=True, kw_only=True)
class IdRef:
    """An artifact by content id, `sha256:` and at least 8 hexadecimal digits."""

    id: str
    type: str = ""

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True, kw_only=True)
class NameRef:
    """An artifact by the name it was given in the store."""

    name: str
    tag: str
    type: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.tag}"


@dataclass(frozen=True, kw_only=True)
class StdinRef:
    """Whatever fits among the references that arrive on stdin."""

    type: str = ""

    def __str__(self) -> str:
        return "-"


Ref = StageRef | SourceRef | PathRef | IdRef | NameRef | StdinRef


@dataclass(frozen=True, kw_only=True)
class Source:
    """Data made outside llmctl: a file, a directory or a glob, or a model on the hub (`hf://…`).

    `digest` (`sha256:…`, the content id of what is there) is what it must be. With `identity` `pinned` it is taken on
    trust and nothing is hashed.
    """

    name: str
    uri: str
    type: str
    identity: Literal["sha256", "pinned"] = "sha256"
    digest: str = ""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Secret:
    """Where the value of a secret comes from. The value itself is never part of a spec, a key or an artifact."""

    name: str
    origin: Literal["env", "file", "command"]
    variable: str = ""
    """The variable of the runner's environment, for `env`."""
    path: Path | None = None
    """Absolute, for `file`."""
    command: str = ""
    """A shell command of the user's own configuration, never of a spec."""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A condition on one number of the stage's metrics; every limit that is given must hold.

    `max_drop`, `max_rise`, `min_ratio` and `max_ratio` compare with the same metric of `baseline`. A missing metric
    fails the gate.
    """

    metric: str
    min: float | None = None
    max: float | None = None
    baseline: StageRef | None = None
    max_drop: float | None = None
    max_rise: float | None = None
    min_ratio: float | None = None
    max_ratio: float | None = None
    on_fail: Literal["stop", "warn"] = "stop"


@dataclass(frozen=True, kw_only=True)
class EnvValue:
    """A variable of the stage's process; it is part of the action key unless `affects_output` is False.

    With `secret`, the name of one of `Pipeline.secrets`, `value` is empty and `affects_output` False.
    """

    value: str = ""
    affects_output: bool = True
    secret: str = ""


@dataclass(frozen=True, kw_only=True)
class Select:
    """How a `select` stage picks its row: the one whose `metric` is least or largest, the first of equals."""

    metric: str
    mode: Literal["min", "max"]
    port: str
    """The input of type `metrics` that the metric is read from."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a stage asks of a machine. `memory` and `disk` in bytes, `time` in seconds; None means no request."""

    cpus: int | None = None
    memory: int | None = None
    gpus: int | None = None
    nodes: int | None = None
    """Machines, each with what is asked for here, that share the processes of the stage; None is one."""
    gpu_type: str | None = None
    """Part of a model's name as the driver gives it, in any case: `H100`."""
    disk: int | None = None
    """What must be free where the store is when the stage begins."""
    time: int | None = None


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage instance of a pipeline, ready to run."""

    id: str
    """`sft`, or `sft[lr=3e-5,seed=2]` for one row of a matrix."""
    stage: Stage
    params: Params
    inputs: Mapping[str, tuple[Ref, ...]]
    """Bound ports only, in the order of `stage.inputs`; a port that takes one input has a tuple of one."""
    outputs: Mapping[str, str]
    """The ports that this configuration produces, each with its artifact type (empty where unknown)."""
    needs: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    output: Path | None = None
    """Absolute; the result is also copied there."""
    env: Mapping[str, EnvValue] = field(default_factory=dict)
    resources: Resources = Resources()
    cache: Literal["auto", "off", "refresh"] = "auto"
    tag: str = ""
    retries: int = 0
    """How often a failed attempt (exit 1 or 3) is repeated."""
    ephemeral: bool = False
    """Whether its outputs may be collected as soon as nothing in the run needs them any more."""
    base: str = ""
    """The id of the stage in the spec; that of the instance where there is no matrix."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The values of its matrix row, empty without one."""
    select: Select | None = None
    """Set for a node of the engine that picks one row of its inputs; it has no process, and its outputs are the
    winner's own artifacts. Every input port is a fan-in list and has an output of the same name."""

    @property
    def dependencies(self) -> tuple[str, ...]:
        """Ids of the stages that must be done before this one: inputs, `needs` and gate baselines, sorted."""
        refs = [ref for bound in self.inputs.values() for ref in bound] + [gate.baseline for gate in self.gates]
        return tuple(sorted({ref.stage for ref in refs if isinstance(ref, StageRef)} | set(self.needs)))

    def unbound(self) -> tuple[str, ...]:
        """Required input ports without a reference; only a stage command that reads stdin has any."""
        needed = self.params.required_inputs()
        ports = self.stage.inputs.items()
        return tuple(n for n, port in ports if n not in self.inputs and (not port.optional or n in needed))

    def key_params(self, *, extent: bool = True) -> dict[str, Any]:
        """The parameters that decide the result and differ from their defaults, as canonical JSON values.

        This is `with` of the action key; `extent=False` leaves out how far to go and gives that of the resume key.
        """
        from llmctl.spec.key_params import key_params

        return key_params(self.params, extent=extent)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A whole spec. `stages` is in topological order, stable against reordering of unrelated stages."""

    name: str
    file: Path | None
    base: Path
    """Absolute directory that relative paths of the spec start from."""
    stages: Mapping[str, StageSpec]
    sources: Mapping[str, Source] = field(default_factory=dict)
    profiles: tuple[str, ...] = ()
    secrets: Mapping[str, Secret] = field(default_factory=dict)
    store: str = ""
    """The store that the spec asks for: a path, absolute; empty if it does not say."""
    remotes: Mapping[str, str] = field(default_factory=dict)
    """Name → fsspec URI of the remote stores to `push` to and `pull` from."""
    next: tuple[str, ...] = ()
    """Lines shown after a good run; `{llmctl}` stands for the program and `{spec}` for the spec as they were typed."""
    single: bool = False
    """Whether it came from a single-stage file or a stage command."""

    def resolve(self, uri: str) -> Path:
        """The absolute path of a `uri` of this spec; globs stay globs."""
        return (self.base / uri).absolute()
