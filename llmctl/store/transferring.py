"""`llmctl push`, `llmctl pull` and `llmctl store check`: stores elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from llmctl.errors import MachineError, UsageError
from llmctl.store.commands import SHORT, format_option, print_as, store_option
from llmctl.store.remote import Remote, remote_uri
from llmctl.store.store import Store
from llmctl.store.transfer import Report

spec_option = click.option("--spec", metavar="SPEC", help="A spec whose store.remotes names the remote.")
lineage_option = click.option("--with-lineage", "lineage", is_flag=True, help="And all that it was made from.")
alone_option = click.option(
    "--alone", is_flag=True, help="Without the other outputs of its stage; its key goes along only where all are there."
)

FLEETING = ("memory",)
"""Places that end with the process."""


def open_remote(text: str, spec: str | None) -> Remote:
    """The remote that REMOTE names: an address, a path, or a name of the spec or of the user's configuration."""
    from llmctl.spec.user_config import user_config

    named = dict(user_config().remotes)
    if spec is not None:
        from llmctl.registry import get_registry
        from llmctl.spec.pipeline import load_pipeline

        named = dict(load_pipeline(spec, registry=get_registry()).remotes)  # the user's own are among them
    uri = remote_uri(text, named)
    if uri.partition("://")[0].rpartition("::")[2] in FLEETING:
        raise UsageError(f"{uri} is gone when this command ends", hint="s3://BUCKET/PREFIX, file:///PATH or a path")
    return Remote(uri)


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...")
@click.option(
    "--to", "target", required=True, metavar="REMOTE", help="An address (s3://…, file://…), a path, or a name."
)
@lineage_option
@alone_option
@click.option("--force", is_flag=True, help="Send files again that look whole there.")
@spec_option
@store_option
@format_option
def push(
    artifacts: tuple[str, ...],
    target: str,
    lineage: bool,
    alone: bool,
    force: bool,
    spec: str | None,
    store_path: Path | None,
    format_: str,
) -> None:
    """Copy every ARTIFACT to a remote store: an id, a name or tag, or run:RUN for all that a run made.

    All files are hashed first. What is there is not sent again, so a push that was stopped goes on where it was.
    Keys, names and signatures that lead to the artifacts go along.
    """
    from llmctl.store.pushing import push as send

    store = Store.open(store_path)
    remote = open_remote(target, spec)
    report = send(store, remote, artifacts, lineage=lineage, alone=alone, force=force)
    print_as(format_, _record(report, remote), lambda: _text(report, "pushed", f"to {remote.uri}"))


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...")
@click.option(
    "--from", "source", required=True, metavar="REMOTE", help="An address (s3://…, file://…), a path, or a name."
)
@lineage_option
@alone_option
@click.option(
    "--files", "patterns", multiple=True, metavar="GLOB", help="Only these files of one artifact; needs --output."
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Where the files of --files go.")
@spec_option
@store_option
@format_option
def pull(
    artifacts: tuple[str, ...],
    source: str,
    lineage: bool,
    alone: bool,
    patterns: tuple[str, ...],
    output: Path | None,
    spec: str | None,
    store_path: Path | None,
    format_: str,
) -> None:
    """Copy every ARTIFACT from a remote store: an id, a name or tag, or run:RUN for all that a run made.

    Every file is hashed before it counts. Keys come along, so the next run finds the results.
    """
    from llmctl.store.pulling import pull as fetch
    from llmctl.store.pulling import pull_files

    if bool(patterns) != (output is not None) or (patterns and (len(artifacts) > 1 or lineage)):
        raise UsageError("--files and --output go together, with one artifact", hint="`llmctl get` copies a whole one")
    remote = open_remote(source, spec)
    if alone and patterns:
        raise UsageError("--alone is of no use with --files", hint="--files takes files of one artifact only")
    if output is not None:
        files = pull_files(remote, artifacts[0], patterns, output)
        rows = [{"path": str(output / file.path), "size": file.size, "sha256": file.sha256} for file in files]
        print_as(format_, rows, lambda: "\n".join(str(row["path"]) for row in rows))
        return
    store = Store.open(store_path)
    report = fetch(store, remote, artifacts, lineage=lineage, alone=alone)
    print_as(format_, _record(report, remote), lambda: _text(report, "pulled", f"from {remote.uri}"))


def _record(report: Report, remote: Remote) -> dict[str, Any]:
    rows = [
        {"id": manifest.id, "type": manifest.type, "bytes": manifest.bytes, "moved": moved}
        for moved, found in ((True, report.moved), (False, report.skipped))
        for manifest in found
    ]
    return {"remote": remote.uri, "artifacts": rows, "keys": report.keys, "names": report.names, "newer": report.newer}


def _text(report: Report, verb: str, where: str) -> str:
    from llmctl.console import human_bytes, table

    rows = [(m, verb) for m in report.moved] + [(m, "there already") for m in report.skipped]
    cells = [(m.id[:SHORT], m.type, human_bytes(m.bytes), what) for m, what in rows]
    size = human_bytes(sum(manifest.bytes for manifest in report.moved))
    names = f", names: {', '.join(report.names)}" if report.names else ""
    side = "there" if verb == "pushed" else "here"
    names += f"; left as they are, newer {side}: {', '.join(report.newer)}" if report.newer else ""
    total = f"{len(report.moved)} of {len(rows)} {verb} {where} ({size}), {report.keys} new keys{names}"
    return "\n".join([table(("ID", "TYPE", "SIZE", "STATE"), cells), total])


@click.group()
def store() -> None:
    """Look at the place where a store lies."""


@store.command("check")
@click.argument("remote", required=False)
@spec_option
@store_option
@format_option
def check(remote: str | None, spec: str | None, store_path: Path | None, format_: str) -> None:
    """Try what a store needs of its place: of REMOTE, or without it of the local store's file system.

    Writes a few small files and removes them. The exit code is 7 if something is missing that results depend on.
    """
    from llmctl.console import table
    from llmctl.store.probes import probe_local, probe_remote

    if remote is None:
        here = Store.open(store_path)
        here.create()
        probes, where = probe_local(here), str(here.root)
    else:
        there = open_remote(remote, spec)
        probes, where = probe_remote(there), there.uri
    rows = [{"probe": p.name, "ok": p.ok, "needed": p.needed, "note": p.note} for p in probes]
    words = {True: "yes", False: "NO"}
    print_as(format_, rows, lambda: table((where, "", ""), [(p.name, words[p.ok], p.note) for p in probes]))
    if missing := [probe.name for probe in probes if probe.needed and not probe.ok]:
        sys.stdout.flush()
        raise MachineError(f"{where} is no place for a store: {', '.join(missing)}", hint=_way_out(remote))


def _way_out(remote: str | None) -> str:
    return "put the store on a local disk: --store, LLMCTL_STORE" if remote is None else "use another remote"
