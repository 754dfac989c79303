"""The process of one stage: read the request, run the stage, check its outputs, commit them, publish the key."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmctl.errors import LlmctlError, MachineError, StageError, TempFail
from llmctl.launch.failures import Failure, explain
from llmctl.launch.hooks import MetricSinks, call_stage
from llmctl.launch.masking import Masker
from llmctl.launch.request import Request
from llmctl.launch.stopping import SaveFlag, StopFlag, signal_saves
from llmctl.registry import Registry, get_registry
from llmctl.spec.extent import has_extent
from llmctl.stage import STOP_FILE, Artifact, Context, Stage, muted
from llmctl.store import Store, types
from llmctl.store.hashing import NotPlain, plain_files
from llmctl.store.names import timestamp
from llmctl.store.store import Pointer

PROGRESS_PAUSE = 0.1
"""Seconds between two progress events; a loop may report every step, nobody can see more."""
LIBRARIES = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "tokenizers", "pyarrow")

Publish = Literal["first", "replace", "no"]


@dataclass
class Channel:
    """Events to the runner: one JSON object per line on a descriptor of their own, so that prints cannot mix in."""

    descriptor: int
    _last: float = field(default=-math.inf, init=False)

    def send(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Write one event; a runner that is gone is the guard's business."""
        if kind == "progress" and not self._due(fields):
            return
        with contextlib.suppress(BrokenPipeError):
            self._write(encode({"type": kind, **fields}))

    def forward(self, line: bytes) -> None:
        """Write an event that another process has encoded."""
        with contextlib.suppress(BrokenPipeError):
            self._write(line + b"\n")

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.descriptor, data) :]

    def _due(self, fields: Mapping[str, Any]) -> bool:
        now = time.monotonic()
        if now - self._last < PROGRESS_PAUSE and fields.get("step") != fields.get("total"):
            return False
        self._last = now
        return True


def encode(event: Mapping[str, Any]) -> bytes:
    """One line of JSON; numpy scalars become numbers, numbers that JSON lacks become null."""
    try:
        text = json.dumps(event, default=_plain, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(json.loads(json.dumps(event, default=_plain))))
    return text.encode() + b"\n"


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a request is to be carried out. `run` and `attempt` are for the manifest, `work` numbers the directory."""

    run: str = ""
    work: int = 1
    publish: Publish = "first"
    attempt: int = 1
    stop_at: int = 0
    """The step of progress after which to ask it to stop, 0 for none: a rehearsal stops where it wants to."""


@dataclass
class Execution:
    """One run of one request in this process, or a rank's part in it: rank 0 is heard and commits, the others help."""

    store: Store
    request: Request
    channel: Channel
    launch: Launch
    rank: int | None = None

    def __post_init__(self) -> None:
        self.registry: Registry = get_registry()
        self.resume = self.store.work(self.request.resume, self.launch.work)
        self.stop = StopFlag(self.resume, signals=self.rank is None)
        self.save = SaveFlag(self.resume)
        if self.rank is None:
            signal_saves(self.resume)
        self.masker = Masker({name: os.environ.get(name, "") for name in self.request.secrets})
        self.begun = time.monotonic()
        self.started = timestamp()
        self.sinks = MetricSinks(self.registry, self.request.instance, self._warn)

    def __call__(self) -> None:
        """Run and commit; raises whatever the stage raises."""
        stage = checked_stage(self.registry, self.request)
        if self.request.memory is not None:
            import resource

            share = self.request.memory // (1 if self.rank is None else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            resource.setrlimit(resource.RLIMIT_DATA, (share, share))
        if self.rank:
            context = Context(
                self.request.instance, dict.fromkeys(self.request.outputs, self.resume), self.resume, self.emit
            )
            self._run(stage, muted(context))
            return
        staging = self.store.staging()
        self.resume.parent.mkdir(parents=True, exist_ok=True)
        try:
            folders = {port: staging / port for port in self.request.outputs}
            context = Context(self.request.instance, folders, self.resume, self.emit, self.stop, save=self.save)
            self._run(stage, context)
            outputs = self._commit(context, folders)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self._publish(outputs, context.reported)
        if self.rank is None:
            tidy(stage, self.resume)

    def emit(self, kind: str, fields: Mapping[str, Any]) -> None:
        """What the stage's Context calls: pass the event on, copy lines to the log, feed the metric sinks."""
        if kind in ("log", "warning"):
            sys.stderr.write(f"{kind}: {fields.get('text', '')}\n")
        self.channel.send(kind, fields)
        if kind == "progress" and 0 < self.launch.stop_at <= fields.get("step", 0):
            self.stop.set()
        if kind == "metric":
            self.sinks(fields)
        # A rank does not leave alone: the others would wait for it. All ask together in the loop.
        if self.rank is None and self.stop.ends_silent_stage:
            raise TempFail(f"`{self.request.instance}` stopped before it was done", hint="run the same command again")

    def _warn(self, text: str) -> None:
        self.channel.send("warning", {"text": text})

    def _run(self, stage: Stage, context: Context) -> None:
        """Load parameters and inputs and call the stage through the hook `run_stage`."""
        params = stage.load_params().model_validate_json(self.request.params)
        inputs: dict[str, Any] = {}
        for port, declared in stage.inputs.items():
            bound = self.request.inputs.get(port)
            inputs[port] = bound if declared.many or not bound else bound[0]
        run = stage.load_run()
        call_stage(self.registry, stage, context, lambda: run(context, params, **inputs))

    def _commit(self, context: Context, folders: Mapping[str, Path]) -> dict[str, Artifact]:
        """Check every output, then commit every output: a stage with one bad output commits none."""
        checked = {port: self._check(context, port) for port in sorted(folders)}
        ended, outputs = timestamp(), {}
        for port, (names, metadata) in checked.items():
            type = self.request.outputs[port]
            artifact = self.store.commit(
                folders[port], type, names, metadata=metadata, provenance=self._provenance(ended)
            )
            outputs[port] = artifact
            self.channel.send("artifact", {"port": port, "artifact_type": type, "id": artifact.id})
        return outputs

    def _check(self, context: Context, port: str) -> tuple[list[str], dict[str, Any]]:
        directory, type = context.output(port), self.request.outputs[port]
        try:
            names = plain_files(directory)
            derived = types.check_commit(type, directory, names)
        except (NotPlain, types.Unfit) as error:
            raise StageError(f"output `{port}` is no valid {type}: {error}", hint="nothing was committed") from error
        for name in names:
            if secret := self.masker.found(os.fsencode(name)) or self.masker.found_in(directory / name):
                hint = f"nothing was committed; keep the value of {secret} out of what the stage writes"
                raise StageError(f"output `{port}` holds the secret in {secret}: {self.masker.text(name)}", hint=hint)
        described = json.loads(encode(context.metadata[port]))
        return names, self.masker.plain({**derived, **described})

    def _provenance(self, ended: str) -> dict[str, Any]:
        request = self.request
        return {
            "key": request.key,
            "stage": request.stage,
            "instance": request.instance,
            "plugin": dict(request.plugin),
            "with": dict(request.preimage["with"]),
            "inputs": dict(request.preimage["inputs"]),
            "key_deps": dict(request.preimage["key_deps"]),
            "env": dict(request.preimage["env"]),
            "observed": {**observed(), **request.observed},
            "run": self.launch.run,
            "attempts": self.launch.attempt,
            "started": self.started,
            "ended": ended,
        }

    def _publish(self, outputs: Mapping[str, Artifact], reported: Mapping[str, Any]) -> None:
        """Publish the key unless an external input changed meanwhile; the first published result is everyone's."""
        pointer = Pointer(
            key=self.request.key,
            preimage=self.request.preimage,
            outputs={port: artifact.id for port, artifact in outputs.items()},
            metrics=self.masker.plain(json.loads(encode(reported))),
            run=self.launch.run,
            ended=timestamp(),
            seconds=round(time.monotonic() - self.begun, 3),
        )
        changed = next((text for snapshot in self.request.snapshots if (text := snapshot.changed())), "")
        if changed:
            self._warn(f"{changed} changed while the stage ran: the result is kept, but will not be reused")
        elif self.launch.publish != "no":
            pointer = self.store.publish(pointer, replace=self.launch.publish == "replace")
        self.channel.send("result", {"outputs": dict(pointer.outputs), "metrics": dict(pointer.metrics)})


def tidy(stage: Stage, work: Path) -> None:
    """Remove unfinished state, but for that of a stage that can be asked to go further: it continues there."""
    if has_extent(stage.load_params()):
        (work / STOP_FILE).unlink(missing_ok=True)
    else:
        shutil.rmtree(work, ignore_errors=True)


def checked_stage(registry: Registry, request: Request) -> Stage:
    """The stage that the request names; MachineError if another plugin or revision of it is installed here."""
    stage = registry.stage(request.stage)
    origin = registry.origin(request.stage)
    here, there = (origin.dist, stage.rev), (request.plugin["dist"], request.plugin["rev"])
    if here != there:
        raise MachineError(
            f"stage `{stage.name}` is {there[0]} rev {there[1]} in the request, {here[0]} rev {here[1]} here",
            hint=f"install {there[0]} {request.plugin.get('version', '')} on this machine",
        )
    return stage


def observed() -> dict[str, Any]:
    """Interpreter, platform and the versions of the libraries that this process has loaded."""
    import platform

    versions = {name: getattr(sys.modules[name], "__version__", "") for name in LIBRARIES if name in sys.modules}
    system = f"{platform.system().lower()}-{platform.machine()}"
    return {"python": platform.python_version(), "platform": system, **{n: str(v) for n, v in versions.items()}}


def execute(store: Store, key: str, launch: Launch, channel: Channel) -> int:
    """Do what the request of `key` says and return the exit code; every failure is told on the channel.

    The traceback of whatever was raised goes to stderr, which is the stage's log.
    """
    owner = "llmctl"
    try:
        request = Request.read(store, key)
        owner = str(request.plugin["dist"])
        stage = checked_stage(get_registry(), request)
        params = stage.load_params().model_validate_json(request.params)
        if params.processes() > 1:
            from llmctl.launch.ranks import Gang

            return Gang(store, request, channel, launch, stage, params)()
        Execution(store, request, channel, launch)()
    except BaseException as error:  # the edge of the process: plugin code raises anything
        failure = explain(error, owner, store.root)
        with contextlib.suppress(OSError):
            write_log(error, failure)
        fields = {"code": failure.code, "message": failure.message, "hint": failure.hint, "bug": failure.bug}
        channel.send("failure", fields)
        return failure.code
    return 0


def write_log(error: BaseException, failure: Failure, who: str = "") -> None:
    """What a person needs who reads the log: the traceback of what nobody expected, and the failure."""
    if not isinstance(error, LlmctlError) or error.__cause__ is not None:
        traceback.print_exception(error)
    sys.stderr.write(f"{who}error: {failure.message}\n" + (f"  hint: {failure.hint}\n" if failure.hint else ""))
    sys.stderr.flush()
