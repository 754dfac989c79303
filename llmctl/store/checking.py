"""`llmctl verify` and `llmctl sign`: is it what it says it is, and who vouches for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from llmctl.errors import InputError, UsageError
from llmctl.spec.files import home_path, is_there
from llmctl.store import names
from llmctl.store.commands import SHORT, format_option, print_as, store_option
from llmctl.store.manifest import NAME, BadManifest, Manifest
from llmctl.store.progress import Meter
from llmctl.store.signing import allowed_signers, check_signed, fingerprint, signature_folders
from llmctl.store.signing import sign as sign_id
from llmctl.store.store import ID, Store
from llmctl.store.verification import inspect

signers_option = click.option(
    "--allowed-signers",
    "allowed",
    type=click.Path(path_type=Path),
    help="Whose key is whose; default $LLMCTL_ALLOWED_SIGNERS, else allowed_signers beside config.yaml.",
)


@dataclass(kw_only=True)
class Checked:
    """One artifact that was looked at."""

    text: str
    directory: Path | None
    id: str = ""
    type: str = ""
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    unsigned: list[str] = field(default_factory=list)
    """The problem that no good signature was found, if that is one."""
    signers: tuple[str, ...] = ()


@click.command()
@click.argument("artifacts", nargs=-1, metavar="ARTIFACT...")
@click.option("--all", "everything", is_flag=True, help="Everything in the store.")
@click.option("--deep", is_flag=True, help="Hash every file again; without it sizes are compared.")
@click.option("--signed-by", metavar="IDENTITY", help="Also demand a good signature of this signer; hashes every file.")
@signers_option
@store_option
@format_option
def verify(
    artifacts: tuple[str, ...],
    everything: bool,
    deep: bool,
    signed_by: str | None,
    allowed: Path | None,
    store_path: Path | None,
    format_: str,
) -> None:
    """Check that every ARTIFACT is what its manifest says: ids, names, paths in the store or of copies elsewhere.

    All that is wrong is listed. The exit code is 5 if anything is.
    """
    if bool(artifacts) == everything:
        raise UsageError("name artifacts, or give --all", hint="`llmctl ls` lists the artifacts")
    if signed_by is not None and not signed_by.strip():
        raise UsageError("--signed-by names nobody", hint="--signed-by IDENTITY, as in the list of allowed signers")
    if allowed is not None and signed_by is None:
        raise UsageError("--allowed-signers is of no use without --signed-by", hint="--signed-by IDENTITY")
    listed = None if signed_by is None else allowed_signers(allowed)
    store = Store.open(store_path)
    found = _all(store) if everything else [locate(store, text) for text in artifacts]
    deep = deep or listed is not None
    with Meter("hashing", sum(one.bytes for one in found) if deep else 0) as meter:
        for one in found:
            if one.directory is not None:
                one.problems += inspect(
                    one.directory, one.id if _inside(store, one.directory) else "", deep=deep, hashed=meter
                )
            if signed_by is not None and listed is not None and one.directory is not None:
                verdict = check_signed(one.id, signature_folders(one.directory, one.id, store), signed_by, listed)
                one.signers = verdict.signers
                one.unsigned = [f"{one.directory}: {verdict.reason}"] if verdict.reason else []
                one.problems += one.unsigned
    print_as(format_, [_record(one) for one in found], lambda: _text(found, deep))
    bad = [one for one in found if one.problems]
    if bad:
        unsigned = signed_by is not None and all(one.unsigned == one.problems for one in bad)
        hint = "`llmctl sign` signs them" if unsigned else "run their stages again, or pull them"
        raise InputError(f"{len(bad)} of {len(found)} artifacts failed", hint=hint)


def locate(store: Store, text: str) -> Checked:
    """What `text` names, be it damaged or not there; that is then its first problem."""
    path = home_path(text)
    try:
        if is_there(path):
            directory = path.absolute()
        elif ID.match(text):
            directory = store.artifact(store.find(text))
        elif names.NAME.match(text):
            directory = store.artifact(names.read(store, text))
        else:
            raise InputError(f"no such file, directory or artifact: {text}")
    except InputError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return Checked(text=text, directory=None, problems=[f"{error.message}{hint}"])
    return _read(store, text, directory)


def _read(store: Store, text: str, directory: Path) -> Checked:
    inside = _inside(store, directory)
    id = f"sha256:{directory.name}" if inside else ""
    try:
        manifest = Manifest.read(directory)
    except FileNotFoundError:
        what = f"there is no artifact {id[:SHORT]} in {store.root}" if inside else f"{directory} was not made by llmctl"
        if inside and directory.is_dir():
            what = f"{directory / NAME} is missing"
        return Checked(
            text=text, directory=None, id=id, problems=[f"{what}" if inside else f"{what}: it has no {NAME}"]
        )
    except (OSError, BadManifest):
        return Checked(text=text, directory=directory, id=id)  # `inspect` says what is wrong with it
    return Checked(text=text, directory=directory, id=id or manifest.id, type=manifest.type, bytes=manifest.bytes)


def _inside(store: Store, directory: Path) -> bool:
    return directory.is_relative_to(store.root / "artifacts")


def _all(store: Store) -> list[Checked]:
    """Every directory of the store, and every name that leads nowhere."""
    found = [_read(store, f"sha256:{path.name}"[:SHORT], path) for path in store.directories()]
    for name, ref in names.every(store).items():
        if not store.artifact(str(ref.get("id"))).is_dir():
            problem = f"{name} is the name of {str(ref.get('id'))[:SHORT]}, which is gone"
            found.append(Checked(text=name, directory=None, id=str(ref.get("id")), problems=[problem]))
    return found


def _record(one: Checked) -> dict[str, Any]:
    path = None if one.directory is None else str(one.directory)
    return {
        "artifact": one.text, "id": one.id, "type": one.type, "path": path, "bytes": one.bytes,
        "problems": one.problems, "signers": list(one.signers),
    }  # fmt: skip


def _text(found: Sequence[Checked], deep: bool) -> str:
    from llmctl.console import human_bytes, table

    good = "every file hashed" if deep else "sizes fit"
    cells = []
    for one in found:
        state = f"{len(one.problems)} problem{'s' if len(one.problems) > 1 else ''}" if one.problems else good
        by = f", signed by {', '.join(one.signers)}" if one.signers else ""
        cells.append((one.text, one.id[:SHORT] or "-", one.type or "-", human_bytes(one.bytes), state + by))
    lines = [f"  {problem}" for one in found for problem in one.problems]
    return "\n".join(
        [table(("ARTIFACT", "ID", "TYPE", "SIZE", "STATE"), cells) if cells else "nothing to check", *lines]
    )


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...")
@click.option("--key", type=click.Path(path_type=Path), help="Private SSH key; default that in ~/.ssh.")
@store_option
def sign(artifacts: tuple[str, ...], key: Path | None, store_path: Path | None) -> None:
    """Sign every ARTIFACT, after all its files were hashed; uses `ssh-keygen`.

    The signature lies beside the artifact: in the store, or in DIRECTORY.signatures/ for a copy elsewhere.
    """
    store = Store.open(store_path)
    for text in artifacts:
        found = locate(store, text)
        problems = found.problems
        if not problems and found.directory is not None:
            with Meter("hashing", found.bytes) as meter:
                problems = inspect(found.directory, found.id, deep=True, hashed=meter)
        if problems or found.directory is None:
            raise InputError(
                f"{text} is not signed: {problems[0]}", hint="`llmctl verify --deep` lists all that is wrong"
            )
        folder = signature_folders(found.directory, found.id)[0]
        path = sign_id(found.id, folder, home_path(str(key)) if key else None)
        click.echo(f"{found.id[:SHORT]}  signed with {fingerprint(path)}  {path}")
