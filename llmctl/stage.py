"""A stage: its declaration (`Stage`), what it receives (`Artifact`) and one execution of it (`Context`)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from llmctl.errors import LlmctlError, MachineError, TempFail

Emit = Callable[[str, Mapping[str, Any]], None]
NAME = re.compile(r"[a-z][a-z0-9-]*\Z")
SECTIONS = (
    "llmctl", "name", "include", "vars", "secrets", "sources", "store", "stages", "defaults", "profiles", "next",
    "launchers",
)  # fmt: skip
"""The sections of a spec; no stage may be called like one, since `--set NAME.KEY=…` could mean either."""
PORT = re.compile(r"[a-z][a-z0-9_]*\Z")
TYPE = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)*\Z")
STOP_FILE = "STOP"
"""In the work directory of a stage, asks it to stop; see `llmctl.launch.stopping`."""
SAVE_FILE = "SAVE"
"""In the same place, asks for a checkpoint now, and to go on."""


@dataclass(frozen=True)
class In:
    """An input port: which artifact types it takes, whether it may stay unbound, whether it takes several."""

    types: tuple[str, ...]
    optional: bool
    many: bool
    help: str

    def __init__(self, *types: str, optional: bool = False, many: bool = False, help: str = "") -> None:
        for name, value in (("types", types), ("optional", optional), ("many", many), ("help", help)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Out:
    """An output port: its artifact type, or `same_as` an input port (`quantize`: a bundle in, a bundle out)."""

    type: str = ""
    same_as: str = ""
    help: str = ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The declaration of a stage. It imports nothing heavy: `params` and `run` are strings, `"module:name"`.

    `rev` is raised when equal inputs would give another result. `extra` is the pip extra that installs what `run`
    imports. `headline` names the metrics shown first in tables, best first. `effect` marks a stage that acts on the
    world: never cached, run only when targeted.
    """

    name: str
    help: str
    params: str
    run: str
    inputs: Mapping[str, In] = field(default_factory=dict)
    outputs: Mapping[str, Out] = field(default_factory=dict)
    extra: str = ""
    rev: int = 1
    key_deps: tuple[str, ...] = ()
    effect: bool = False
    headline: tuple[str, ...] = ()
    forecast: str = ""
    """Of a stage that trains: says what it will take, `(params, inputs: Mapping[str, llmctl.forecast.Given])` →
    `llmctl.forecast.Forecast`, or raises `llmctl.forecast.Unknown`. An import string that imports nothing heavy."""

    def __post_init__(self) -> None:
        if not NAME.match(self.name):
            raise ValueError(f"stage name {self.name!r} must match {NAME.pattern}")
        for kind, ports in ((In, self.inputs), (Out, self.outputs)):
            for port, declared in ports.items():
                _check_port(f"stage `{self.name}`, {kind.__name__} `{port}`", port, kind, declared)

    def load_params(self) -> Any:
        """Import and return the stage's `Params` class."""
        return load_string(self.params)

    def load_run(self) -> Callable[..., None]:
        """Import and return the implementation; a missing third-party module becomes the line that installs it."""
        try:
            return load_string(self.run)  # type: ignore[no-any-return]  # a plugin's callable
        except ModuleNotFoundError as error:
            raise missing_module(error, self, f"stage `{self.name}`") from error


def _check_port(where: str, name: str, kind: type[In] | type[Out], declared: object) -> None:
    """Raise TypeError or ValueError for what would fail only when somebody runs the stage."""
    if not PORT.match(name):
        raise ValueError(f"{where}: a port's name must match {PORT.pattern}")
    if not isinstance(declared, kind):
        raise TypeError(f"{where}: it must be an {kind.__name__}, not {type(declared).__name__}")
    if isinstance(declared, Out) and bool(declared.type) == bool(declared.same_as):
        raise ValueError(f"{where}: give either a type or same_as")
    types = declared.types if isinstance(declared, In) else (declared.type,) if declared.type else ()
    if isinstance(declared, In) and not types:
        raise ValueError(f"{where}: it takes no type")
    wrong = next((type for type in types if not isinstance(type, str) or not TYPE.match(type)), None)
    if wrong is not None:
        raise ValueError(f"{where}: {wrong!r} is no artifact type, which is a text like dataset.text")


def load_string(target: str) -> Any:
    """The object named by `"package.module:attribute"`."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


class Offer(Protocol):
    """What a plugin offers, a stage or a command: its name, and the pip extra that installs what it imports."""

    @property
    def name(self) -> str:
        """The name on the command line."""

    @property
    def extra(self) -> str:
        """An extra of the plugin's distribution, or of llmctl."""


def missing_module(error: ModuleNotFoundError, offer: Offer, who: str) -> LlmctlError | ModuleNotFoundError:
    """Turn a missing third-party module into the install line; a missing module of ours or the plugin's own keeps
    its traceback. The line names the distribution that has the extra: the plugin's, else llmctl.
    """
    name = (error.name or "").partition(".")[0]
    if not offer.extra or name.startswith("llmctl"):
        return error
    from llmctl.registry import get_registry

    plugin = get_registry().owner(offer)
    if plugin is not None and name == plugin.package:
        return error
    owner = plugin.dist_name if plugin is not None and offer.extra in plugin.extras else "llmctl"
    return MachineError(f"{who} needs the module `{name}`", hint=f"pip install '{owner}[{offer.extra}]'")


@dataclass(frozen=True)
class Artifact:
    """A committed, read-only directory of plain files that a stage receives. `metadata` is derived from the files."""

    path: Path
    type: str
    id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __truediv__(self, name: str) -> Path:
        return self.path / name


class Helped(Exception):  # noqa: N818  # no error
    """Raised to leave a stage on a rank above 0 when all that is left is for rank 0 alone: saving, reporting."""


class Context:
    """One execution of a stage: where to write, how to report, when to stop.

    `emit(kind, fields)` sends an event to the runner; the kinds a stage causes are `progress`, `metric`, `log`,
    `warning` and `checkpoint`.
    """

    def __init__(
        self,
        stage: str,
        outputs: Mapping[str, Path],
        resume_dir: Path,
        emit: Emit,
        stop: Callable[[], bool] = lambda: False,
        title: str = "",
        save: Callable[[], bool] = lambda: False,
    ) -> None:
        self.stage = stage
        """Instance id, e.g. `sft` or `sft[lr=3e-5]`."""
        self.title = title or stage
        self.resume_dir = resume_dir
        """Survives crashes; cleared when the stage has committed, unless its parameters have an extent: then the next
        larger one continues here, and a smaller one finds what a larger one has left. Create it when needed."""
        self.metadata: dict[str, dict[str, Any]] = {port: {} for port in outputs}
        self.reported: dict[str, float | int | str | bool] = {}
        self._outputs = dict(outputs)
        self._emit = emit
        self._stop = stop
        self._save = save

    def output(self, port: str) -> Path:
        """The staging directory of an output port; what lies in it when `run` returns is committed."""
        path = self._outputs[port]
        path.mkdir(parents=True, exist_ok=True)
        return path

    def wants(self, port: str) -> bool:
        """Whether this configuration produces the output `port` (see `Params.outputs`)."""
        return port in self._outputs

    def describe(self, port: str, **metadata: Any) -> None:
        """Add facts derivable from the files (parameters, vocabulary, tokenizer id) to the output's manifest."""
        self.metadata[port].update(metadata)

    def progress(self, step: int, total: int | None = None, **fields: float | int | str) -> None:
        """Say how far the work is; `fields` (loss, tokens_per_s, …) are shown beside the bar. Cheap: call it often."""
        self._emit("progress", {"step": step, "total": total, **fields})

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Record one number now: events, the run's `metrics.jsonl` and every `log_metrics` sink."""
        self._emit("metric", {"name": name, "value": value, **({} if step is None else {"step": step})})

    def report(self, values: Mapping[str, float | int | str | bool]) -> None:
        """Final numbers of the stage; gates and tables read them. Repeated calls add up; dotted names are usual.

        numpy and torch scalars are taken as the Python numbers they hold.
        """
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        self.reported.update(plain)
        for name, value in plain.items():
            self._emit("metric", {"name": name, "value": value})
        if "metrics" in self._outputs:
            text = json.dumps(self.reported, indent=2, sort_keys=True)
            (self.output("metrics") / "metrics.json").write_text(text + "\n", encoding="utf-8")

    def log(self, text: str) -> None:
        """One line for a person."""
        self._emit("log", {"text": text})

    def warn(self, text: str) -> None:
        """One line that a person should not miss; it stays visible in the run's summary."""
        self._emit("warning", {"text": text})

    def checkpointed(self, step: int) -> None:
        """Say that a complete checkpoint of `step` lies in `resume_dir`."""
        self._emit("checkpoint", {"step": step})

    def should_stop(self) -> bool:
        """True after a signal or `llmctl stage stop`: write a checkpoint, then call `stopped`. Ask at every step."""
        return self._stop()

    def should_save(self) -> bool:
        """True once after SIGUSR2 or `llmctl stage save`: write a checkpoint and go on. Ask at every step."""
        return self._save()

    def stopped(self, step: int) -> TempFail:
        """The exception to raise because of `should_stop`, after a checkpoint was written where the stage has any."""
        kept = {path.name for path in self.resume_dir.glob("*")} - {STOP_FILE, SAVE_FILE}
        how = "with a checkpoint" if kept else "without a checkpoint, as it keeps none"
        return TempFail(f"`{self.stage}` stopped at step {step} {how}", hint="run the same command again")


def muted(context: Context) -> Context:
    """The same execution for a process beside the first: it writes no output, says nothing and is never stopped."""
    mute = Context(context.stage, {}, context.resume_dir, lambda kind, fields: None, title=context.title)
    mute.metadata = {port: {} for port in context.metadata}
    return mute
