"""A stage that several processes run together: start torchrun's agent, pass rank 0's events on, explain the end.

The ranks are told to stop by the file STOP alone, and tell what they have to say in files, so that it is the same on
one machine and on many: torchrun passes no signal on that a rank could answer with a checkpoint, and makes every exit
code 1.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import MachineError, UsageError
from llmctl.launch.child import Channel, Launch, tidy
from llmctl.launch.failures import Failure, killed
from llmctl.launch.request import Request
from llmctl.launch.stopping import StopFlag, signal_saves
from llmctl.launch.worker import EVENTS
from llmctl.spec.params import Params
from llmctl.stage import STOP_FILE, Stage
from llmctl.store import Store

AGENT = "llmctl.train.agent"
PAUSE = 0.05
PATIENCE = 2.0
"""Seconds for the other ranks to say why they fail, once one has: they often have the same reason."""
REPORTS = "ranks"
"""In the work directory, which all machines see."""
PLAN = "plan.json"
RDZV = "LLMCTL_RDZV"
"""Variable with the `host:port` where the agents of several machines meet."""


@dataclass
class Gang:
    """All ranks of one request, as the process sees them that `stage exec` has become."""

    store: Store
    request: Request
    channel: Channel
    launch: Launch
    stage: Stage
    params: Params
    _final: dict[str, Any] = field(default_factory=dict, init=False)
    _read: int = field(default=0, init=False)
    _rest: bytes = field(default=b"", init=False)

    def __call__(self) -> int:
        """Run them to their end; returns the exit code of the stage."""
        resume = self.store.work(self.request.resume, self.launch.work)
        reports = resume / REPORTS
        shutil.rmtree(reports, ignore_errors=True)
        reports.mkdir(parents=True)
        write_plan(reports, self.plan(reports))
        agent = subprocess.Popen(self.command(reports), stdin=subprocess.DEVNULL, env=self.environment())
        try:
            self.watch(agent, resume)
        finally:
            agent.kill()  # a rank dies with its agent
            agent.wait()
            self.pass_on(reports)
            code = self.end(reports, agent.returncode)
            shutil.rmtree(reports, ignore_errors=True)
        if code == 0:
            tidy(self.stage, resume)
        return code

    def watch(self, agent: subprocess.Popen[bytes], resume: Path) -> None:
        """Until the agent has ended, or a rank has failed in a way that another start would not mend."""
        stop, stop_file, reports = StopFlag(resume), resume / STOP_FILE, resume / REPORTS
        failed_at, asked = 0.0, False
        signal_saves(resume)
        try:
            while agent.poll() is None:
                self.pass_on(reports)
                if stop() and not asked and not stop_file.exists():
                    asked = True
                    stop_file.touch()
                if not failed_at and any(not row["lost"] for row in failures(reports)):
                    failed_at = time.monotonic()
                if failed_at and time.monotonic() > failed_at + PATIENCE:
                    return
                time.sleep(PAUSE)
        finally:
            if asked:  # by a signal, which is meant for this run alone
                stop_file.unlink(missing_ok=True)

    def plan(self, reports: Path) -> dict[str, Any]:
        """What the agent of every machine is told: `llmctl.train.agent.Plan`."""
        launch, nodes = self.launch, self.request.nodes
        words = ["-P", "-m", "llmctl.launch.worker", "--key", self.request.key, "--store", str(self.store.root)]
        words += ["--reports", str(reports), "--run", launch.run, "--work", str(launch.work)]
        words += ["--publish", launch.publish, "--attempt", str(launch.attempt)]
        words += ["--stop-at", str(launch.stop_at)]
        return {
            "words": words,
            "nodes": nodes,
            "processes": per_node(self.params.processes(), nodes),
            "restarts": self.params.restarts(),
            "reports": str(reports),
            "meet": meeting_point(nodes),
            "id": self.request.key.rpartition(":")[2][:16],
        }

    def command(self, reports: Path) -> list[str]:
        """The agent's command line; under Slurm that of one agent on each machine of the job."""
        agent, nodes = agent_command(reports), self.request.nodes
        if nodes > 1 and "SLURM_JOB_ID" in os.environ and RDZV not in os.environ:
            sizes = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
            # One agent that ends must not end the others: it is they who start their ranks again.
            return ["srun", *sizes, "--kill-on-bad-exit=0", *agent]
        return agent

    def environment(self) -> dict[str, str]:
        """That of this process, with its share of the cores for each rank."""
        whole = int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))
        share = str(max(1, whole // per_node(self.params.processes(), self.request.nodes)))
        return {**os.environ, "OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share}

    def pass_on(self, reports: Path) -> None:
        """Hand rank 0's new events to the runner, but for those that end the stage."""
        path = reports / EVENTS
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                event = json.loads(line or b"null")
            except ValueError:
                event = None
                self.channel.send("warning", {"text": "what a rank said when it was killed is cut off"})
            if event is None:
                continue
            if event["type"] in ("result", "failure"):
                self._final = event
            self.channel.forward(line)

    def end(self, reports: Path, agent: int) -> int:
        """The exit code of the stage; a failure that rank 0 has not told itself is told here, with its rank."""
        if self._final.get("type") == "result":
            return 0
        if self._final.get("type") == "failure":
            return int(self._final["code"])
        failure = self.explained(reports, agent)
        self.channel.send("failure", asdict(failure))
        return failure.code

    def explained(self, reports: Path, agent: int) -> Failure:
        """The first failure that is no consequence of another: one that a rank has told, or its sudden death."""
        owner = str(self.request.plugin["dist"])
        rows = sorted(failures(reports), key=lambda row: float(row["time"]))
        first = next((row for row in rows if not row["lost"]), None)
        death = reports / "death.json"
        if first is None and death.exists():
            values = json.loads(death.read_text(encoding="utf-8"))
            if values["code"] < 0 and values["code"] != -signal.SIGTERM or not rows:
                found = killed(values["code"], owner)
                return Failure(**{**asdict(found), "message": f"rank {values['rank']}: {found.message}"})
        first = first or next(iter(rows), None)
        if first is None:
            return Failure(
                code=MachineError.exit_code,
                message=f"its ranks could not be started (exit {agent})",
                hint="the log says why",
            )
        values = {name: first[name] for name in ("code", "message", "hint", "bug")}
        return Failure(**{**values, "message": f"rank {first['rank']}: {first['message']}"})


def write_plan(reports: Path, plan: dict[str, Any]) -> None:
    """Put it where the agents of all machines find it, whole or not at all."""
    temporary = reports / f".{PLAN}"
    temporary.write_text(json.dumps(plan), encoding="utf-8")
    temporary.rename(reports / PLAN)


def agent_command(reports: Path) -> list[str]:
    """The command line of the agent of one machine."""
    return [sys.executable, "-P", "-m", AGENT, str(reports / PLAN)]


def join(store: Store, key: str, patience: float) -> int:
    """Run this machine's share of the ranks of a request that `llmctl run` works on elsewhere; the agent's exit code.

    MachineError if nobody has begun with it after `patience` seconds.
    """
    reports = store.work(Request.read(store, key).resume) / REPORTS
    ends = time.monotonic() + patience
    while not (reports / PLAN).exists():
        if time.monotonic() > ends:
            raise MachineError(
                f"nobody works on {key}: there is no {reports / PLAN}",
                hint="start `llmctl run` on the first machine; the store must be the same on all",
            )
        time.sleep(PAUSE)
    return subprocess.run(agent_command(reports), stdin=subprocess.DEVNULL, check=False).returncode


def failures(reports: Path) -> Iterator[dict[str, Any]]:
    """What the ranks have left."""
    for path in reports.glob("failure-*.json"):
        yield json.loads(path.read_text(encoding="utf-8"))


def per_node(processes: int, nodes: int) -> int:
    """Processes on each machine; UsageError if they cannot be equally many."""
    if processes % nodes:
        raise UsageError(
            f"{processes} processes cannot be shared out evenly to {nodes} nodes",
            hint="the product of the sizes in parallel must be a multiple of resources.nodes",
        )
    return processes // nodes


def meeting_point(nodes: int) -> str:
    """`host:port` where the agents of several machines meet: LLMCTL_RDZV, or the first host of the Slurm job."""
    if nodes == 1:
        return ""
    if given := os.environ.get(RDZV):
        return given
    if "SLURM_JOB_ID" not in os.environ:
        raise MachineError(
            f"{nodes} nodes: nobody has said where they meet",
            hint=f"run it in a Slurm job of as many nodes, or set {RDZV}=HOST:PORT; see docs/parallel.md",
        )
    listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    try:
        first = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError) as error:
        hint = f"set {RDZV}=HOST:PORT to where they meet"
        raise MachineError(f"scontrol does not tell the hosts of this job: {error}", hint=hint) from error
    return f"{first}:{20000 + int(os.environ['SLURM_JOB_ID']) % 20000}"
