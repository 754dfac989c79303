"""`llmctl keys`: make, list and revoke the API keys of a server."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from llmctl import UsageError
from llmctl_serve.keys import SCOPES, Key, changing, make_key, read_keys
from llmctl_serve.rate_limits import Limits

DEFAULT = Path("llmctl-keys.jsonl")

file_option = click.option(
    "--file", "path", type=click.Path(dir_okay=False, path_type=Path), default=DEFAULT, show_default=True,
    help="The file of keys, which `llmctl serve --keys` reads.",
)  # fmt: skip


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys of `llmctl serve --keys FILE`. A running server sees changes at once."""


@keys.command()
@click.argument("id", required=False, default="")
@file_option
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), default=("inference",), show_default=True)
@click.option("--expires-days", type=click.FloatRange(min=0, min_open=True), help="It stops working after that.")
@click.option("--requests-per-minute", type=click.IntRange(1))
@click.option("--tokens-per-minute", type=click.IntRange(1))
@click.option("--concurrent", type=click.IntRange(1), help="Requests at a time.")
@click.option("--requests-per-day", type=click.IntRange(1))
@click.option("--tokens-per-day", type=click.IntRange(1))
@click.option("--note", default="", help="Whose key it is.")
def create(
    id: str, path: Path, scopes: tuple[str, ...], expires_days: float | None, note: str, **limits: int | None
) -> None:
    """Make a key and print it: this once, as the file holds only its digest.

    Without any limit of its own it has those of the server.
    """
    expires = None
    if expires_days is not None:
        expires = (datetime.now(UTC) + timedelta(days=expires_days)).isoformat(timespec="seconds")
    own = Limits(**limits) if any(value is not None for value in limits.values()) else None
    key, text = make_key(id, scopes, own, expires, note)
    with changing(path) as file:
        if key.id in file.keys:
            raise UsageError(f"{path}: there is a key `{key.id}` already", hint="choose another id")
        file.keys[key.id] = key
        file.save()
    click.echo(text)
    click.echo(f"{key.id} is in {path}; the key is not shown again", err=True)


@keys.command("list")
@file_option
@click.option("--json", "as_json", is_flag=True, help="As JSON lines, without digests.")
def list_keys(path: Path, as_json: bool) -> None:
    """Show the keys of a file."""
    for key in read_keys(path).values():
        record = {name: value for name, value in key.record().items() if name not in ("salt", "digest")}
        click.echo(json.dumps(record, sort_keys=True) if as_json else _line(key, record))


def _line(key: Key, record: dict[str, object]) -> str:
    state = "disabled" if key.disabled else "expired" if key.expired(datetime.now(UTC).timestamp()) else "active"
    limits = record.get("limits")
    of_its_own = [f"{name}={value}" for name, value in limits.items()] if isinstance(limits, dict) else []
    rest = [",".join(key.scopes), f"until {key.expires}" if key.expires else "", *of_its_own, key.note]
    return "  ".join([f"{key.id:<16}", f"{state:<8}", *(part for part in rest if part)])


@keys.command()
@click.argument("id")
@file_option
@click.option("--remove", is_flag=True, help="Remove the line too, in place of keeping it as disabled.")
def revoke(id: str, path: Path, remove: bool) -> None:
    """Make a key useless, from the next request on."""
    with changing(path) as file:
        if id not in file.keys:
            raise UsageError(f"{path}: there is no key `{id}`", hint=f"`llmctl keys list --file {path}` shows them")
        if remove:
            del file.keys[id]
        else:
            file.keys[id] = replace(file.keys[id], disabled=True)
        file.save()
    click.echo(f"{id} is revoked", err=True)
