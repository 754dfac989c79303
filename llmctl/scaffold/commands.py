"""`llmctl plugins new`."""

from __future__ import annotations

from pathlib import Path

import click

from llmctl.registry import get_registry


@click.command()
@click.argument("name")
@click.option(
    "--directory", type=click.Path(path_type=Path), metavar="DIR", help="Where to write it.  [default: ./llmctl-NAME]"
)
@click.option("--force", is_flag=True, help="Also into a directory that is not empty; files that exist are kept.")
def new(name: str, directory: Path | None, force: bool) -> None:
    """Write a plugin that offers the stage NAME: a small project that works, with its tests."""
    from llmctl.scaffold.project import project, write

    found = project(name, get_registry())
    target = directory or Path(found.dist)
    written, kept = write(found, target, into_existing=force)
    click.echo(f"{target}: {len(written)} files written" + (f", kept: {', '.join(kept)}" if kept else ""))
    click.echo("next:")
    for line in (f"cd {target}", "pip install -e '.[test]'", "pytest", f"llmctl {found.name} --help"):
        click.echo(f"  {line}")
