"""`llmctl show`, `ls`, `lineage`, `get`: look into the store and take things out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from llmctl.errors import InputError
from llmctl.stage import Artifact
from llmctl.store import names
from llmctl.store.copying import copy_signatures, materialise
from llmctl.store.external import list_files
from llmctl.store.manifest import BadManifest, Manifest
from llmctl.store.store import Store

SHORT = 15
"""Characters of an id in tables: `sha256:` and eight digits, enough to be typed."""

store_option = click.option(
    "--store", "store_path", type=click.Path(path_type=Path), help="The store; by default that of the nearest .llmctl."
)
format_option = click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", help="How to print it."
)


def print_as(format_: str, value: Any, text: Callable[[], str]) -> None:
    """`value` as JSON, or what `text()` makes of it."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False) if format_ == "json" else text())


@click.command()
@click.option("--type", "type_", help="Only artifacts of this type, e.g. model.onnx.")
@store_option
@format_option
def ls(type_: str | None, store_path: Path | None, format_: str) -> None:
    """List the artifacts in the store, latest last."""
    from llmctl.console import human_bytes, table

    store = Store.open(store_path)
    rows = sorted((row for row in _rows(store) if type_ in (None, row["type"])), key=lambda row: row["ended"])

    def text() -> str:
        if not rows:
            return f"no artifacts{f' of type {type_}' if type_ else ''} in {store.root}"
        cells = [
            (row["id"][:SHORT], row["type"], human_bytes(row["bytes"]), row["ended"], ", ".join(row["names"]) or "-")
            for row in rows
        ]
        return table(("ID", "TYPE", "SIZE", "MADE", "LATEST RESULT OF"), cells)

    print_as(format_, rows, text)


def _rows(store: Store) -> Iterator[dict[str, Any]]:
    named: dict[str, list[str]] = {}
    for name, ref in names.every(store).items():
        named.setdefault(str(ref.get("id")), []).append(name)
    for id in store.ids():
        try:
            manifest = Manifest.read(store.artifact(id))
        except (OSError, BadManifest):
            continue
        yield {
            "id": id,
            "type": manifest.type,
            "bytes": manifest.bytes,
            "stage": manifest.provenance.get("instance", ""),
            "ended": str(manifest.provenance.get("ended", "")),
            "names": named.get(id, []),
            "path": str(store.artifact(id)),
        }


@click.command()
@click.argument("artifact")
@click.option("--verify", is_flag=True, help="Hash every file again and compare.")
@store_option
@format_option
def show(artifact: str, verify: bool, store_path: Path | None, format_: str) -> None:
    """Show ARTIFACT: a path, an id, or PIPELINE/STAGE[.OUTPUT]. What it is, its numbers, its files."""
    store = Store.open(store_path)
    found = store.resolve(artifact)
    if verify:
        # What lies outside the store was hashed when it was resolved.
        _verify(store, found)
    value = _describe(store, found)
    print_as(format_, value, lambda: _show_text(value, verify))


def _verify(store: Store, found: Artifact) -> None:
    if found.path.is_relative_to(store.root):
        store.verify(found.id)


def _describe(store: Store, found: Artifact) -> dict[str, Any]:
    """Everything known about an artifact as plain JSON; `metrics` are those of the stage that made it."""
    files = {name: path.stat().st_size for name, path in list_files(found.path).items()}
    try:
        provenance: dict[str, Any] = dict(Manifest.read(found.path).provenance)
    except (OSError, BadManifest):
        provenance = {}
    key = str(provenance.get("key", ""))
    pointer = store.pointer(key) if key else None
    metrics = names.read_json(found / "metrics.json") or (dict(pointer.metrics) if pointer else {})
    return {
        "id": found.id,
        "type": found.type,
        "path": str(found.path),
        "bytes": sum(files.values()),
        "metadata": dict(found.metadata),
        "metrics": metrics,
        "files": [{"path": name, "size": size} for name, size in files.items()],
        "provenance": provenance,
    }


def _show_text(value: dict[str, Any], verified: bool) -> str:
    from llmctl.console import human_bytes, human_number, table

    origin = value["provenance"]
    head = [("type", value["type"]), ("id", value["id"]), ("path", value["path"])]
    head.append(("size", human_bytes(value["bytes"]) + (", every file verified" if verified else "")))
    if origin:
        head.append(("made by", f"{origin.get('instance')} ({origin.get('stage')}), {origin.get('ended')}"))
        head.append(("run", origin.get("run", "")))
    sections = [table(("", ""), head).strip("\n").strip()]
    params = origin.get("with") or {}
    for title, rows in (
        ("PARAMETER", {name: json.dumps(item) for name, item in params.items()}),
        ("METADATA", value["metadata"]),
        ("METRIC", {name: human_number(item) for name, item in sorted(value["metrics"].items())}),
        ("FILE", {row["path"]: human_bytes(row["size"]) for row in value["files"]}),
    ):
        if rows:
            sections.append(table((title, ""), list(rows.items())))
    return "\n\n".join(sections)


@click.command()
@click.argument("artifact")
@store_option
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json", "dot"]),
    default="text",
    help="How to print it; dot is Graphviz's.",
)
@click.option("--verify", "again", is_flag=True, help="Hash every file on the way again; exit 5 if any has changed.")
def lineage(artifact: str, store_path: Path | None, format_: str, again: bool) -> None:
    """Show what ARTIFACT was made from, back to files from outside."""
    from llmctl.store.lineage import check, dot, tree
    from llmctl.store.lineage import lineage as ancestors

    store = Store.open(store_path)
    found = store.resolve(artifact)
    try:
        manifest = Manifest.read(found.path)
    except (OSError, BadManifest):
        raise InputError(f"{found.path} was not made by llmctl: it has no manifest", hint="`llmctl ls`") from None
    nodes = ancestors(store, manifest)
    if again:
        check(store, nodes, found.path)
    if format_ == "dot":
        click.echo(dot(nodes))
    else:
        print_as(format_, [asdict(node) for node in nodes.values()], lambda: "\n".join(tree(nodes, manifest.id)))
    if changed := [problem for node in nodes.values() for problem in node.problems]:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise InputError(
            f"{changed[0]}{more}", hint="what was made from it cannot be made again from what is there now"
        )


@click.command()
@click.argument("artifact")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace whatever is at DIRECTORY.")
@store_option
def get(artifact: str, directory: Path, force: bool, store_path: Path | None) -> None:
    """Copy ARTIFACT (an id, or PIPELINE/STAGE[.OUTPUT]) to DIRECTORY; its signatures to DIRECTORY.signatures/."""
    store = Store.open(store_path)
    found = store.resolve(artifact)
    _verify(store, found)
    if not found.path.is_dir():
        raise InputError(f"{artifact} is a file outside the store", hint="copy it with cp")
    materialise(found, directory.absolute(), force=force)
    copy_signatures(store.signatures(found.id), directory.absolute())
    click.echo(f"{found.type}  {found.id}  {directory}")
