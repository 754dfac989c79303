"""Signatures over content ids, made and checked by `ssh-keygen -Y`; OpenSSH is on nearly every machine.

What is signed is the id and a newline, in the namespace `llmctl.artifact`. Signatures lie beside artifacts, never in
them: in a store at `signatures/<id>/<fingerprint>.sig`, beside an exported directory in `<directory>.signatures/`.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import InputError, MachineError
from llmctl.spec.files import home_path, is_there
from llmctl.store.layout import Layout, is_store, own_name

NAMESPACE = "llmctl.artifact"
ALLOWED = "LLMCTL_ALLOWED_SIGNERS"
KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
"""In `~/.ssh`, in this order, where no key is named."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of looking for a signature of one identity. `reason` is empty if there is a good one."""

    signers: tuple[str, ...] = ()
    """All identities that a good signature of the artifact belongs to."""
    reason: str = ""


def signature_folders(directory: Path, id: str, *stores: Layout) -> list[Path]:
    """Where signatures of the artifact in `directory` may lie: in its store or beside it, and in the `stores`."""
    found = directory.with_name(directory.name + ".signatures")
    if len(directory.parents) > 3:
        home = Layout(directory.parents[3])  # <root>/artifacts/sha256/f6/f6d3…
        if is_store(home.root) and home.artifact(id) == directory:
            found = home.signatures(id)
    return list(dict.fromkeys([found, *(store.signatures(id) for store in stores)]))


def sign(id: str, folder: Path, key: Path | None) -> Path:
    """Sign an id with a private key (or the public half of one that an agent holds); the file of the signature.

    InputError: no such key, not a key, encrypted and in no agent. MachineError: there is no ssh-keygen.
    """
    path = _key(key)
    name = _fingerprint(path).replace("SHA256:", "").replace("/", "_").replace("+", "-")
    done = _ssh("-Y", "sign", "-n", NAMESPACE, "-f", str(path), message=id)
    if done.returncode or not done.stdout.startswith("-----BEGIN SSH SIGNATURE"):
        raise _sign_error(path, done.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{own_name()}"
    temporary.write_text(done.stdout)
    target = folder / f"{name}.sig"
    temporary.replace(target)
    return target


def fingerprint(signature: Path) -> str:
    """`SHA256:…` of the key that made a signature, as OpenSSH prints it, by the name of the signature's file."""
    return "SHA256:" + signature.stem.replace("_", "/").replace("-", "+")


def _key(path: Path | None) -> Path:
    if path is None:
        home = Path.home() / ".ssh"
        path = next((home / name for name in KEYS if (home / name).is_file()), None)
        if path is None:
            raise InputError(
                "there is no key in ~/.ssh to sign with", hint="--key FILE; `ssh-keygen -t ed25519` makes one"
            )
    if not path.is_file():
        raise InputError(f"there is no key {path}", hint="`ssh-keygen -t ed25519 -f FILE` makes one")
    return path


def _fingerprint(path: Path) -> str:
    done = _ssh("-l", "-f", str(path))
    if done.returncode:
        raise InputError(
            f"{path} is no SSH key: {_last(done.stderr)}", hint="give a private key, or a public one in an agent"
        )
    return done.stdout.split()[1]


def _sign_error(path: Path, text: str) -> InputError:
    if "passphrase" in text:
        return InputError(f"the key {path} is encrypted and no agent holds it", hint=f"ssh-add {path}")
    if "agent" in text or "No private key found" in text:
        return InputError(f"{path} is a public key and no agent holds its private half", hint="ssh-add the private key")
    return InputError(f"ssh-keygen cannot sign with {path}: {_last(text)}")


def allowed_signers(path: Path | None) -> Path:
    """The file that says which key belongs to whom: as given, `$LLMCTL_ALLOWED_SIGNERS`, the user's own."""
    if path is None:
        from llmctl.spec.user_config import config_path

        named = os.environ.get(ALLOWED)
        path = Path(named) if named else config_path().with_name("allowed_signers")
    path = home_path(str(path))
    if not is_there(path, Path.is_file):
        raise InputError(
            f"there is no list of allowed signers at {path}",
            hint=f"one line per key, as in ssh-keygen(1): `IDENTITY ssh-ed25519 AAAA…`; or set ${ALLOWED}",
        )
    return path


def check_signed(id: str, folders: Sequence[Path], identity: str, allowed: Path) -> Verdict:
    """Whether one of the signatures in `folders` is a good one of `id` by `identity`. MachineError: no ssh-keygen."""
    files = [path for folder in folders for path in sorted(folder.glob("*.sig"))]
    if not files:
        return Verdict(reason="it is not signed")
    signers: list[str] = []
    reasons = []
    for path in files:
        if _is_good(id, path, identity, allowed):
            signers.append(identity)
            continue
        if _ssh("-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(path), message=id).returncode:
            reasons.append(f"{path} is no signature of this artifact")
            continue
        found = _ssh("-Y", "find-principals", "-s", str(path), "-f", str(allowed))
        names = [name for line in found.stdout.splitlines() for name in line.strip().split(",") if name]
        if found.returncode or not names:
            reasons.append(f"it is signed with the key {fingerprint(path)}, which {allowed} does not list")
        for name in names:
            if _is_good(id, path, name, allowed):
                signers.append(name)
            else:
                reasons.append(f"{allowed} does not let {name} sign this now")
    signers = list(dict.fromkeys(signers))
    if identity in signers:
        return Verdict(signers=tuple(signers))
    by = f"it is signed by {', '.join(signers)}, not by {identity}" if signers else "; ".join(reasons)
    return Verdict(signers=tuple(signers), reason=by)


def _is_good(id: str, signature: Path, identity: str, allowed: Path) -> bool:
    """What ssh-keygen says: it knows the patterns, quotes and time limits of the list."""
    command = ("-Y", "verify", "-f", str(allowed), "-I", identity, "-n", NAMESPACE, "-s", str(signature))
    return bool(identity) and not _ssh(*command, message=id).returncode


def _ssh(*arguments: str, message: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run ssh-keygen with the id as its input; it asks for a passphrase only where there is a terminal."""
    with tempfile.TemporaryFile("w+") as given:
        given.write("" if message is None else f"{message}\n")
        given.seek(0)
        environment = {**os.environ, "LC_ALL": "C"}
        try:
            return subprocess.run(
                ["ssh-keygen", *arguments], stdin=given, capture_output=True, text=True, env=environment, check=False
            )
        except FileNotFoundError:
            raise MachineError(
                "ssh-keygen is not installed",
                hint="it is in the package openssh-client (openssh on Fedora, Arch, macOS)",
            ) from None


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no reason given"


def require_signed(directory: Path, identity: str, allowed: Path | None, *stores: Layout) -> None:
    """Hash every file of an artifact and find a good signature of `identity`; InputError says what is missing."""
    from llmctl.store.manifest import NAME, BadManifest, Manifest
    from llmctl.store.verification import inspect

    listed = allowed_signers(allowed)
    try:
        id = Manifest.read(directory).id
    except (OSError, BadManifest):
        raise InputError(
            f"{directory} has no valid {NAME}, so nothing says what was signed",
            hint="sign what llmctl made: llmctl sign",
        ) from None
    if problems := inspect(directory, deep=True):
        raise InputError(
            f"{problems[0]}: what was signed is something else", hint="get it anew: llmctl get, llmctl pull"
        )
    verdict = check_signed(id, signature_folders(directory, id, *stores), identity, listed)
    if verdict.reason:
        raise InputError(f"{directory} has no good signature of {identity}: {verdict.reason}", hint="llmctl sign")
