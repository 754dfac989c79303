"""A really installed plugin with three sleepers, T | P | S, that speak the protocol of real stages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

FILES = {
    "fake/__init__.py": """
        import os

        from llmctl import In, Out, Stage, hookimpl

        if wait := os.environ.get("FAKE_READER_WAIT"):
            from llmctl import shell

            shell.READER_WAIT = float(wait)

        def stage(name, inputs, outputs, **more):
            return Stage(name=name, help=f"Sleep as {name}.", inputs=inputs, outputs=outputs,
                         params="fake.params:FakeParams", run="fake.run:run", **more)

        METRICS = {"metrics": Out("metrics")}

        @hookimpl
        def register_stages():
            return [
                stage("fake-tok", {}, {"tokenizer": Out("fake.tokenizer"), "tokens": Out("fake.tokens"), **METRICS}),
                stage("fake-pre", {"tokens": In("fake.tokens"), "tokenizer": In("fake.tokenizer")},
                      {"model": Out("fake.model"), **METRICS}, headline=("answer",)),
                stage("fake-sft", {"model": In("fake.model")}, {"model": Out("fake.model"), **METRICS}),
                stage("fake-eval", {"model": In("fake.model"), "tokenizer": In("fake.tokenizer")}, {**METRICS}),
                stage("fake-pair", {"teacher": In("fake.model"), "student": In("fake.model")}, {**METRICS}),
                stage("fake-serve", {"model": In("fake.model", optional=True)}, {**METRICS}, effect=True),
            ]
    """,
    "fake/params.py": """
        from typing import Literal
        from llmctl import Field, Params

        class FakeParams(Params):
            text: str = Field("x", description="what the outputs hold")
            size: int = Field(1, ge=1, le=1000, description="how often")
            fast: bool = Field(False, description="whether to hurry")
            mode: Literal["plain", "loud"] = Field("plain", description="how it prints")
            names: tuple[str, ...] = Field((), description="a list")
            output: str = Field("", description="shares its name with an option")
            sleep: float = Field(0.0, ge=0, affects="nothing", description="seconds of work")
            fail: Literal["", "input", "stage", "machine", "bug", "full"] = Field("", description="how to fail")
            log: str = Field("", affects="nothing", description="file that notes every start and end")
    """,
    "fake/run.py": """
        import errno, sys, time
        from pathlib import Path
        from llmctl import InputError, MachineError, StageError

        def note(params, ctx, text):
            if params.log:
                with Path(params.log).open("a") as file:
                    file.write(f"{text} {ctx.stage} {time.time()}\\n")

        def run(ctx, params, **inputs):
            note(params, ctx, "start")
            if params.mode == "loud":
                print("a print in a plugin")
                print("a line on stderr", file=sys.stderr)
                ctx.log("a line of the log")
                ctx.warn("a warning")
            begun = time.monotonic()
            while (passed := time.monotonic() - begun) < params.sleep:
                if ctx.should_stop():  # before it reports: one that never asked would be ended there
                    note(params, ctx, "stopped")
                    raise ctx.stopped(int(passed * 10))
                ctx.progress(int(passed * 10), int(params.sleep * 10))
                time.sleep(0.02)
            if params.fail:
                raise {
                    "input": InputError("the input is bad", hint="get a better one"),
                    "stage": StageError("it went wrong", hint="try again"),
                    "machine": MachineError("no such machine", hint="buy one"),
                    "bug": KeyError("a bug"),
                    "full": OSError(errno.ENOSPC, "No space left on device"),
                }[params.fail]
            for port in ctx.metadata:
                if port != "metrics":
                    names = ",".join(name for name, value in inputs.items() if value)
                    text = f"{ctx.stage} {port} {params.text * params.size} {names}\\n"
                    (ctx.output(port) / "content.txt").write_text(text)
            ctx.report({"answer": 42})
            note(params, ctx, "end")
    """,
}


@pytest.fixture
def fake(install) -> Path:
    return install("fake", {"fake": "fake"}, FILES)


@dataclass
class Ended:
    codes: list[int]
    stdout: str
    stderrs: list[str]
    seconds: float

    @property
    def stderr(self) -> str:
        return "".join(self.stderrs)


def ignore() -> None:
    """What `nohup` and `&` do to the processes they start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Pipe:
    """Processes joined as a shell joins them, in a process group of their own."""

    def __init__(self, commands, env, cwd, stdin=subprocess.DEVNULL, ignore_sigint=False):
        self.begun = time.monotonic()
        self.logs = [cwd / f"stderr.{number}" for number in range(len(commands))]
        self.processes: list[subprocess.Popen] = []
        with (cwd / "stdout").open("wb") as final:
            for number, command in enumerate(commands):
                with self.logs[number].open("wb") as log:
                    process = subprocess.Popen(
                        command,
                        env=env,
                        cwd=cwd,
                        stdin=self.processes[-1].stdout if self.processes else stdin,
                        stdout=final if number == len(commands) - 1 else subprocess.PIPE,
                        stderr=log,
                        process_group=self.processes[0].pid if self.processes else 0,
                        preexec_fn=ignore if ignore_sigint else None,
                    )
                if self.processes and self.processes[-1].stdout:
                    self.processes[-1].stdout.close()  # only the reader may hold it, or nobody ever sees it die
                self.processes.append(process)
        self.cwd = cwd

    def interrupt(self) -> None:
        """Ctrl-C at the terminal: SIGINT to the whole foreground group."""
        os.killpg(self.processes[0].pid, signal.SIGINT)

    def wait(self, timeout=60) -> Ended:
        try:
            codes = [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        shell = [code if code >= 0 else 128 - code for code in codes]
        texts = [log.read_text() for log in self.logs]
        return Ended(shell, (self.cwd / "stdout").read_text(), texts, time.monotonic() - self.begun)


@pytest.fixture
def start(fake, llmctl_env, tmp_path) -> Callable[..., Pipe]:
    """Start `llmctl … | llmctl …`: each argument is one command line, a str of words or a list.

    `patient`: a stage gives its reader longer than any machine needs to start it, instead of half a second.
    """
    work = tmp_path / "pipe"
    work.mkdir()

    def begin(*commands, patient=False, **options) -> Pipe:
        argvs = []
        for command in commands:
            words = command.split() if isinstance(command, str) else list(command)
            argvs.append([sys.executable, "-m", *words] if words[0] == "llmctl" else words)
        return Pipe(argvs, {**llmctl_env, "FAKE_READER_WAIT": "15"} if patient else llmctl_env, work, **options)

    return begin


@pytest.fixture
def pipe(start) -> Callable[..., Ended]:
    """Run such a pipe to its end."""
    return lambda *commands, **options: start(*commands, **options).wait()
