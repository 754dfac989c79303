"""The checks of the conformance kit: each takes a subject and a directory, and returns a remark or raises Failed."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import TempFail
from llmctl.stage import Artifact, Stage
from llmctl.stage_check import say, stage_faults
from llmctl.store import types
from llmctl.store.hashing import NotPlain, entries, hash_file, plain_files
from llmctl.store.manifest import content_id
from llmctl.testing import baseline, imports
from llmctl.testing.execution import StageResult, execute
from llmctl.testing.processes import Ended, Runner
from llmctl.testing.spy import names, spied
from llmctl.testing.subjects import Example, Subject, listed

NOT_COMPARED = "metrics"
"""Outputs of this type hold measured figures, which may differ from run to run."""


class Failed(Exception):
    """A check found a defect."""


class NotApplicable(Exception):
    """A check has nothing to look at."""


# -- one execution in this process ------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One execution of an example below `directory`, with what it printed and read."""

    subject: Subject
    example: Example
    directory: Path
    read: set[str] = field(default_factory=set)
    all_names: set[str] = field(default_factory=set)
    moved: bool = False
    """Whether it changed the working directory."""
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """What it emitted, also if it was stopped."""

    def __call__(self, stop_after: int | None = None, resume: Path | None = None) -> StageResult:
        """Run the stage. What it prints goes nowhere; Failed if it raises anything but a request to stop."""
        stage = self.subject.stage
        model = _imported(stage, stage.load_params)
        try:
            values = model.model_validate(dict(self.example.params))
        except ValueError as error:  # pydantic's
            raise Failed(f"the parameters of an example are wrong: {say(error)}") from error
        self.all_names = set(names(values))
        inputs: dict[str, Any] = {port: self.example.inputs.get(port) for port in stage.inputs}
        for port, bound in inputs.items():
            if stage.inputs[port].many and isinstance(bound, Artifact):
                inputs[port] = [bound]
        spy = spied(values, self.read)
        here, variables = Path.cwd(), dict(os.environ)
        with _silence():
            try:
                place = resume or self.directory / ".resume"
                return execute(stage, spy, inputs, self.directory, place, stop_after, self.events)
            except TempFail:
                raise
            except (Exception, SystemExit) as error:  # plugin code
                raise Failed(f"run raised {say(error)}") from error
            finally:
                # What a stage does to its own process is its business; this one has other checks to run.
                self.moved = Path.cwd() != here
                os.chdir(here)
                os.environ.clear()
                os.environ.update(variables)

    def ids(self, result: StageResult) -> dict[str, tuple[str, str]]:
        """(content id, type) of every output that is compared."""
        found = {}
        for port, artifact in result.outputs.items():
            files = entries(artifact.path, plain_files(artifact.path)) if artifact.path.is_dir() else []
            found[port] = (content_id(artifact.type, files), artifact.type)
        return compared(found)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Let what a stage prints go nowhere, by whatever way: our stdout is the report."""
    sys.stdout.flush()
    sys.stderr.flush()
    null, kept = os.open(os.devnull, os.O_WRONLY), [os.dup(1), os.dup(2)]
    try:
        for descriptor in (1, 2):
            os.dup2(null, descriptor)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for descriptor, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, descriptor)
        for number in (null, *kept):
            os.close(number)


def compared(ids: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Those outputs whose bytes must be the same every time."""
    return {port: pair for port, pair in ids.items() if pair[1] != NOT_COMPARED}


def _imported(stage: Stage, load: Callable[[], Any]) -> Any:
    """What `load` makes of a stage's parameters; Failed if the plugin cannot import them."""
    try:
        with _silence():
            return load()
    except (Exception, SystemExit) as error:  # plugin code
        raise Failed(f"`{stage.params}` cannot be imported: {say(error)}") from error


def _differs(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first port whose ids differ; empty if none does."""
    return next((port for port in sorted({*one, *other}) if one.get(port) != other.get(port)), "")


# -- the checks -------------------------------------------------------------------------------------------------------


def declaration(subject: Subject, directory: Path) -> str:
    """The declaration is in order: what `llmctl plugins --check` looks at."""
    with _silence():
        faults = [text for text, _ in stage_faults(subject.stage)]
    if faults:
        raise Failed("; ".join(faults))
    return ""


def parameters(subject: Subject, directory: Path) -> str:
    """Every parameter is read by `run` in one of the examples."""
    read: set[str] = set()
    known: set[str] = set()
    for number, example in enumerate(_examples(subject)):
        trial = Trial(subject, example, directory / str(number))
        trial()
        read |= trial.read
        known |= trial.all_names
    if unknown := sorted(set(subject.unread) - known):
        raise Failed(f"`unread` names `{unknown[0]}`, which is no parameter")
    if stale := sorted(set(subject.unread) & read):
        raise Failed(f"`unread` names `{stale[0]}`, which is read")
    if missed := sorted(known - read - set(subject.unread)):
        listed = ", ".join(f"`{name}`" for name in missed)
        raise Failed(f"run does not read {listed} in any example: remove it, or add an example that needs it")
    return "; ".join(f"{name}: {why}" for name, why in sorted(subject.unread.items()))


def revision(subject: Subject, directory: Path) -> str:
    """No default changed and no parameter or output went without a higher `rev`."""
    if subject.record_file is None:
        raise NotApplicable("no record to compare with was given")
    if not subject.record_file:
        raise Failed(f"there is no {baseline.NAME} here to compare with; write it: llmctl plugins test --record")
    promised = _imported(subject.stage, lambda: baseline.describe(subject.stage))
    status, reason = baseline.compare(subject.recorded, promised)
    if status == "failed":
        raise Failed(reason)
    return reason


def commit(subject: Subject, directory: Path) -> str:
    """Every declared output is produced, of plain files, of its type, and nothing else is."""
    produced: set[str] = set()
    for number, example in enumerate(_examples(subject)):
        result = Trial(subject, example, directory / str(number))()
        for port, artifact in result.outputs.items():
            try:
                files = plain_files(artifact.path) if artifact.path.is_dir() else []
                types.check_commit(artifact.type, artifact.path, files)
            except (NotPlain, types.Unfit) as error:
                raise Failed(f"the output `{port}` is no valid {artifact.type}: {error}") from error
        produced |= set(result.outputs)
        extra = {path.name for path in (directory / str(number)).iterdir()} - set(result.outputs) - {".resume"}
        if extra:
            raise Failed(f"it wrote `{min(extra)}` beside its outputs")
    missing = sorted(set(subject.stage.outputs) - produced)
    return f"in no example: the output {', '.join(missing)}" if missing else ""


def determinism(subject: Subject, directory: Path) -> str:
    """Equal inputs and parameters give equal bytes, metrics aside."""
    for number, example in enumerate(_examples(subject)):
        trials = [Trial(subject, example, directory / f"{number}-{run}") for run in ("first", "again")]
        first, again = (trial.ids(trial()) for trial in trials)
        if port := _differs(first, again):
            raise Failed(f"the output `{port}` has other bytes the second time: {_first_difference(trials, port)}")
    return ""


def resume(subject: Subject, directory: Path) -> str:
    """Stopped at the first and at a middle checkpoint and run again, it gives what an uninterrupted run gives, and
    does less for it the second time: that work was kept shows in how often it asks.
    """
    example = _examples(subject)[0]
    whole = Trial(subject, example, directory / "whole")
    result = whole()
    expected = whole.ids(result)
    if not result.asked:
        raise NotApplicable("not resumable: it never asks ctx.should_stop(), so a stop loses its work")
    points = sorted({1, min(result.asked, max(2, (result.asked + 1) // 2))})
    for point in points:
        kept = directory / f"resume-{point}"
        stopped = Trial(subject, example, directory / f"stopped-{point}")
        try:
            stopped(point, kept)
        except TempFail:
            pass
        else:
            raise Failed(f"told to stop at the {_th(point)} ctx.should_stop(), it went on to the end")
        kept_something = kept.is_dir() and any(kept.iterdir())
        again = Trial(subject, example, directory / f"resumed-{point}")
        second = again(resume=kept)
        if port := _differs(expected, again.ids(second)):
            raise Failed(f"stopped at the {_th(point)} checkpoint and run again, the output `{port}` differs")
        if point > 1 and second.asked >= result.asked:
            # Asked at the head of its loop or at the end, it has one step less to do at the least.
            if kept_something or any(kind == "checkpoint" for kind, _ in stopped.events):
                raise Failed(f"stopped at the {_th(point)} checkpoint and run again, it begins anew: its work is lost")
            raise NotApplicable("not resumable: it stops when it is asked to, and keeps nothing in ctx.resume_dir")
    if points == [1]:
        raise NotApplicable("it asks once, which does not show whether work is kept: give a larger example")
    return f"asked {result.asked} times, stopped at {' and '.join(map(str, points))}"


def kill(subject: Subject, directory: Path) -> str:
    """`kill -9` at several instants, then the same command: the same ids, nothing partial, no process left."""
    example = _examples(subject)[0]
    whole, expected = _through_store(subject, example, directory / "whole")
    runner = Runner(subject.stage, example.params, example.inputs, directory / "killed")
    draw = random.Random(len(subject.stage.name))
    # In the middle of the work, which is short, by its own events; at any instant by the clock.
    moments: list[dict[str, Any]] = [{"kill_at": 1}, {"kill_at": max(1, whole.events // 2)}]
    moments += [{"kill_after": draw.uniform(0.8 * whole.began, whole.seconds)} for _ in range(subject.kills)]
    hits = 0
    for moment in moments[: max(1, subject.kills)]:
        ended = runner.run(**moment)
        hits += ended.code == -9
        if left := runner.left_behind():
            raise Failed(f"after kill -9 a process is left: {left[0]}")
        if damage := runner.damage():
            raise Failed(f"after kill -9 an artifact is partial: {damage}")
    final = runner.run()
    if final.code:
        raise Failed(f"after {hits} kills it does not run again: {final.error()}")
    if port := _differs(expected, compared(final.ids())):
        raise Failed(f"after {hits} kills the output `{port}` differs from that of an uninterrupted run")
    if not hits:
        raise NotApplicable("it is done before it can be killed: give a larger example")
    return f"killed {hits} times"


def effects(subject: Subject, directory: Path) -> str:
    """It writes nothing but its outputs, leaves its inputs alone, and stdout has records only."""
    example = _examples(subject)[0]
    before = _digests(example)
    runner_directory = directory / "run"
    ended, _ = _through_store(subject, example, runner_directory)
    if strays := sorted(path.name for path in (runner_directory / "work").iterdir()):
        raise Failed(f"it wrote `{strays[0]}` into the current directory")
    if changed := sorted(name for name, digest in _digests(example).items() if before.get(name) != digest):
        raise Failed(f"it changed its input {changed[0]}")
    if foreign := [line for line in ended.stdout.splitlines() if not line.startswith('{"llmctl":')]:
        raise Failed(f"stdout has a line that is no record: {foreign[0][:60]!r}")
    inside = Trial(subject, example, directory / "inside")
    inside()
    if inside.moved:
        raise Failed("run changes the working directory")
    return ""


def start(subject: Subject, directory: Path) -> str:
    """Importing the plugin's package and its parameters is cheap and changes nothing."""
    package, params = subject.stage.run.partition(".")[0].partition(":")[0], subject.stage.params.partition(":")[0]
    faults = imports.import_faults(package) + imports.import_faults(params, "params")
    if faults:
        raise Failed("; ".join(faults))
    return ""


def _examples(subject: Subject) -> Sequence[Example]:
    if subject.stage.effect:
        raise NotApplicable("it acts on the world, so it is not run")
    if not subject.examples:
        raise Failed(f"there is no example: write one into {baseline.NAME}")
    return subject.examples


def _through_store(subject: Subject, example: Example, directory: Path) -> tuple[Ended, dict[str, tuple[str, str]]]:
    """An uninterrupted run by the command line, and the ids of its outputs."""
    ended = Runner(subject.stage, example.params, example.inputs, directory).run()
    if ended.code:
        raise Failed(f"`llmctl {subject.stage.name}` fails: {ended.error()}")
    return ended, compared(ended.ids())


def _digests(example: Example) -> dict[str, str]:
    """sha256 of every file of every input."""
    bound = [artifact for value in example.inputs.values() for artifact in listed(value)]
    files = [path for a in bound for path in ([a.path] if a.path.is_file() else a.path.rglob("*")) if path.is_file()]
    return {str(path): hash_file(path) for path in files}


def _first_difference(trials: Sequence[Trial], port: str) -> str:
    """The first file of an output that differs between two trials."""
    one, other = (trial.directory / port for trial in trials)
    for name in sorted({*plain_files(one), *plain_files(other)}):
        if not (one / name).is_file() or not (other / name).is_file():
            return f"{name} is there only once"
        if (one / name).read_bytes() != (other / name).read_bytes():
            return name
    return "its type"


def _th(number: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(number, f"{number}th")
