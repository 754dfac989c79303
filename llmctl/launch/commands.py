"""`llmctl stage exec`: the command that every launcher starts, here or on another machine."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.group(hidden=True)
def stage() -> None:
    """Run stages of requests (internal)."""


@stage.command("exec")
@click.option("--key", required=True, help="Action key of the request.")
@click.option("--store", "store_path", required=True, type=click.Path(path_type=Path), help="The store.")
@click.option("--run", "run_id", default="", help="Id of the run, for the manifest.")
@click.option("--work", default=1, help="Number of the work directory.")
@click.option("--publish", type=click.Choice(["first", "replace", "no"]), default="first", help="How to publish.")
@click.option("--attempt", default=1, help="How often this work was begun in this run, for the manifest.")
@click.option("--stop-at", default=0, help="Step after which it is asked to stop.")
@click.option("--events", type=int, default=1, help="Descriptor that gets the events.")
@click.option("--parent", type=int, help="Process that this one must not outlive.")
@click.option("--heartbeat", type=int, help="Descriptor that ends when the parent does.")
@click.option("--lock", type=int, help="Descriptor of the lock that this process shares.")
def exec_(
    key: str,
    store_path: Path,
    run_id: str,
    work: int,
    publish: str,
    attempt: int,
    stop_at: int,
    events: int,
    parent: int | None,
    heartbeat: int | None,
    lock: int | None,
) -> int:
    """Do what the request of KEY in the store says, commit, and leave with the exit code of the stage."""
    from llmctl.launch import guard

    for descriptor in (events, heartbeat, lock):
        if descriptor is not None and descriptor > 2:
            # Nothing that the stage starts may keep the pipe open or the lock held.
            os.set_inheritable(descriptor, False)
    watchdog = None
    if parent is not None and heartbeat is not None:
        shared = tuple(descriptor for descriptor in (events, lock) if descriptor is not None and descriptor > 2)
        watchdog = guard.tie_to(parent, heartbeat, shared)
    import faulthandler
    from typing import cast

    faulthandler.enable()
    from llmctl.launch.child import Channel, Launch, Publish, execute
    from llmctl.store import Store

    launch = Launch(run=run_id, work=work, publish=cast(Publish, publish), attempt=attempt, stop_at=stop_at)
    code = execute(Store.open(store_path), key, launch, Channel(events))
    if watchdog is not None:
        guard.release(watchdog)
    return code


@stage.command("save")
@click.option("--key", required=True, help="Action key of the request.")
@click.option("--store", "store_path", required=True, type=click.Path(path_type=Path), help="The store.")
def save(key: str, store_path: Path) -> None:
    """Ask whoever works on KEY to write a checkpoint and go on, by a file in its work directory."""
    from llmctl.launch import stopping
    from llmctl.launch.request import Request
    from llmctl.stage import SAVE_FILE
    from llmctl.store import Store

    store = Store.open(store_path)
    stopping.ask(store, Request.read(store, key).resume, SAVE_FILE)


@stage.command("stop")
@click.option("--key", required=True, help="Action key of the request.")
@click.option("--store", "store_path", required=True, type=click.Path(path_type=Path), help="The store.")
@click.option("--clear", is_flag=True, help="Take the request to stop back.")
def stop(key: str, store_path: Path, clear: bool) -> None:
    """Ask whoever works on KEY to write a checkpoint and leave with exit 75, by a file in its work directory."""
    from llmctl.launch import stopping
    from llmctl.launch.request import Request
    from llmctl.store import Store

    store = Store.open(store_path)
    resume = Request.read(store, key).resume
    if clear:
        stopping.clear(store, resume)
    else:
        stopping.ask(store, resume)


@stage.command("join")
@click.option("--key", required=True, help="Action key of the request, as `llmctl plan --format json` shows it.")
@click.option("--store", "store_path", required=True, type=click.Path(path_type=Path), help="The store.")
@click.option("--wait", default=600.0, show_default=True, help="Seconds to wait until somebody works on it.")
def join(key: str, store_path: Path, wait: float) -> int:
    """Run this machine's share of the processes of KEY, which `llmctl run` on another machine has begun with."""
    from llmctl.launch import ranks
    from llmctl.store import Store

    return ranks.join(Store.open(store_path), key, wait)
