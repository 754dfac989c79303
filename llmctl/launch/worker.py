"""One rank of a stage that several processes run together: `python -m llmctl.launch.worker`, started by torchrun.

Every rank runs the whole stage. Rank 0 commits and publishes, and writes events as a stage alone would; the others are
mute. A rank that fails leaves its failure in `--reports` and ends with 1, so that the agent ends the others; one that
was asked to stop ends with 0, since torchrun would start all of them again for any other code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from llmctl.errors import StageError, TempFail
from llmctl.launch.child import Channel, Execution, Launch, write_log
from llmctl.launch.failures import Failure, explain
from llmctl.launch.guard import die_with
from llmctl.launch.request import Request
from llmctl.stage import Helped
from llmctl.store import Store

EVENTS = "events.jsonl"
AGENT = "LLMCTL_AGENT"
"""Variable with the process id of the agent. A rank that asks who its parent is may find that the agent has died while
the rank was being loaded, and outlive everything."""
LOST = ("connection closed by peer", "connection reset by peer", "socket closed", "broken pipe", "connection refused")
"""What gloo and NCCL say on a rank whose neighbour is gone."""


def main() -> None:
    """Run a rank, then leave at once: what torch would still tear down can wait for processes that are gone."""
    given = arguments()
    if AGENT in os.environ:
        die_with(int(os.environ[AGENT]))
    import faulthandler

    faulthandler.enable()
    code = run(given, int(os.environ["RANK"]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def arguments() -> argparse.Namespace:
    """The command line; the same for every rank."""
    parser = argparse.ArgumentParser(prog="python -m llmctl.launch.worker", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--key", required=True, help="action key of the request")
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--reports", required=True, type=Path, help="directory for events and failures")
    parser.add_argument("--run", default="")
    parser.add_argument("--work", type=int, default=1)
    parser.add_argument("--publish", choices=("first", "replace", "no"), default="first")
    parser.add_argument("--attempt", type=int, default=1)
    parser.add_argument("--stop-at", type=int, default=0)
    return parser.parse_args()


def run(given: argparse.Namespace, rank: int) -> int:
    """The exit code of this rank."""
    given.reports.mkdir(parents=True, exist_ok=True)
    path = given.reports / EVENTS if rank == 0 else os.devnull
    channel = Channel(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restarts and any(not json.loads(path.read_text())["lost"] for path in given.reports.glob("failure-*.json")):
        return 1  # what a rank raises itself it would raise again; the agent only does not know that
    if restarts:
        channel.forward(b"")  # ends what a rank that was killed may have begun to write
        most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "")
        text = f"a rank was lost: all were started again, {restarts} of at most {most} times"
        channel.send("warning", {"text": text})
    store, owner = Store.open(given.store), "llmctl"
    try:
        request = Request.read(store, given.key)
        owner = str(request.plugin["dist"])
        names = ("run", "work", "publish", "attempt", "stop_at")
        launch = Launch(**{name: getattr(given, name) for name in names})
        Execution(store, request, channel, launch, rank)()
    except Helped:
        return 0
    except BaseException as error:  # the edge of the process: plugin code raises anything
        failure, lost = explain(error, owner, store.root), is_loss(error)
        if lost:
            failure = Failure(code=StageError.exit_code, message=f"another rank was lost: {failure.message}")
        with contextlib.suppress(OSError):
            write_log(error, failure, f"rank {rank}: ")
        if isinstance(error, TempFail):
            channel.send("failure", asdict(failure))
            return 0
        report(given.reports, rank, restarts, failure, lost)
        return 1
    return 0


def report(directory: Path, rank: int, restarts: int, failure: Failure, lost: bool) -> None:
    """Leave the failure of a rank for whoever started it; `lost`: it only says that another rank is gone."""
    values = {**asdict(failure), "rank": rank, "time": time.time(), "lost": lost}
    temporary = directory / f".failure-{restarts}-{rank}"
    temporary.write_text(json.dumps(values), encoding="utf-8")
    temporary.rename(directory / f"failure-{restarts}-{rank}.json")


def is_loss(error: BaseException) -> bool:
    """Whether an error is the loss of another rank, as torch's collectives tell it."""
    kind = type(error)
    if kind.__module__.startswith("torch") and kind.__name__.startswith("Dist"):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in LOST)


if __name__ == "__main__":
    main()
