"""`llmctl refs` and `llmctl tag`: what names there are, and names that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmctl.errors import UsageError
from llmctl.stage import Artifact
from llmctl.store import names
from llmctl.store.commands import SHORT, format_option, print_as, store_option
from llmctl.store.manifest import BadManifest, Manifest
from llmctl.store.store import Store


@click.command()
@store_option
@format_option
def refs(store_path: Path | None, format_: str) -> None:
    """List the names of results, and the tags: what they mean, and since when."""
    from llmctl.console import table

    store = Store.open(store_path)
    rows = [_row(store, name, ref) for name, ref in names.every(store).items()]

    def text() -> str:
        if not rows:
            return f"no names in {store.root}"
        cells = [
            (
                row["name"],
                row["kind"],
                row["id"][:SHORT] + ("" if row["present"] else " (gone)"),
                row["type"],
                row["time"],
            )
            for row in rows
        ]
        return table(("NAME", "KIND", "ID", "TYPE", "SINCE"), cells)

    print_as(format_, rows, text)


def _row(store: Store, name: str, ref: dict[str, Any]) -> dict[str, Any]:
    id = str(ref.get("id", ""))
    match = names.NAME.match(name)
    return {
        "name": name,
        "kind": "tag" if match and match["tag"] else "latest",
        "id": id,
        "type": str(ref.get("type", "")),
        "run": str(ref.get("run", "")),
        "time": str(ref.get("time", "")),
        "present": store.artifact(id).is_dir(),
    }


@click.command()
@click.argument("words", nargs=-1, metavar="[ARTIFACT] NAME@TAG")
@click.option("--delete", is_flag=True, help="Remove the tag instead.")
@store_option
def tag(words: tuple[str, ...], delete: bool, store_path: Path | None) -> None:
    """Let NAME@TAG mean ARTIFACT from now on, whatever runs later; garbage collection keeps it.

    NAME is PIPELINE/STAGE, PIPELINE/STAGE.PORT or a free PROJECT/NAME. A spec takes it as an input: `sft@best` of its
    own pipeline, `other/sft@best` of another one.
    """
    if len(words) != (1 if delete else 2):
        form = "llmctl tag --delete NAME@TAG" if delete else "llmctl tag ARTIFACT NAME@TAG"
        raise UsageError(f"{len(words)} names were given", hint=form)
    name = words[-1]
    names.tagged(name)
    store = Store.open(store_path)
    if delete:
        for removed in names.delete_tag(store, name):
            click.echo(f"{removed} is no more")
        return
    artifact = store.resolve(words[0])
    if not artifact.path.is_relative_to(store.root):
        artifact = store.use(artifact.id)  # a copy elsewhere stands for the artifact, which must be in the store
    store.create()
    names.set_tag(store, name, _value(artifact))
    click.echo(f"{name}  {artifact.type}  {artifact.id}")


def _value(artifact: Artifact) -> dict[str, Any]:
    try:
        origin = Manifest.read(artifact.path).provenance
    except (OSError, BadManifest):
        origin = {}
    return {
        "id": artifact.id, "type": artifact.type, "key": str(origin.get("key", "")), "run": str(origin.get("run", "")),
    }  # fmt: skip
