"""Where the values of secrets come from: the runner's environment, a file, a command of the user's configuration."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping

from llmctl.errors import MachineError
from llmctl.spec.resolved import Secret, StageSpec

PATIENCE = 30.0
"""Seconds that a command may take."""


def names_of(specs: Iterable[StageSpec]) -> list[str]:
    """The secrets that these stages are given, in the order of the stages."""
    return list(dict.fromkeys(item.secret for spec in specs for item in spec.env.values() if item.secret))


def resolve(secrets: Mapping[str, Secret], names: Iterable[str]) -> dict[str, str]:
    """The values of `names`. MachineError says which one is not there, where it was declared, and the way out."""
    values = {}
    for name in names:
        # One that nobody declared is a variable that a stage's parameters name.
        secret = secrets.get(name) or Secret(name=name, origin="env", variable=name)
        value = {"env": _from_environment, "file": _from_file, "command": _from_command}[secret.origin](secret)
        if not value:
            raise _missing(secret, "it is empty", "give it a value")
        if "\0" in value:
            raise _missing(secret, "it holds a NUL character, which no variable can", "give it another value")
        values[name] = value
    return values


def _from_environment(secret: Secret) -> str:
    variable = secret.variable or secret.name
    if variable not in os.environ:
        raise _missing(secret, f"the variable {variable} is not set", f"export {variable}=…")
    return os.environ[variable]


def _from_file(secret: Secret) -> str:
    try:
        return secret.path.read_text(encoding="utf-8").rstrip("\r\n") if secret.path else ""
    except OSError as error:
        raise _missing(secret, f"cannot read {secret.path}: {error.strerror}", "write its value there") from None
    except UnicodeDecodeError:
        raise _missing(secret, f"{secret.path} is no text", "write its value there, as UTF-8") from None


def _from_command(secret: Secret) -> str:
    """What the command prints; its error output is not repeated, since it may hold anything."""
    try:
        done = subprocess.run(
            secret.command, shell=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise _missing(secret, f"its command took more than {PATIENCE:.0f} s", "run it in a terminal") from None
    if done.returncode:
        raise _missing(secret, f"its command ended with exit {done.returncode}", "run it in a terminal")
    return os.fsdecode(done.stdout).rstrip("\r\n")


def _missing(secret: Secret, why: str, way_out: str) -> MachineError:
    where = f" ({secret.where})" if secret.where else ""
    return MachineError(f"the secret `{secret.name}`{where} is not there: {why}", hint=way_out)
