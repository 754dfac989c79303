"""API keys: a file that holds their digests only, read again when it changes.

A key is `llmctl-<id>-<secret>` with 256 random bits of secret. Such a secret cannot be guessed, so one keyed hash
(HMAC-SHA-256 under a salt of the key's own) is the right digest: scrypt and its kin exist to slow the guessing of what
people make up, and would cost every request milliseconds for nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmctl import InputError, UsageError
from llmctl_serve.files import replace_file
from llmctl_serve.rate_limits import Limits

PREFIX = "llmctl"
SCOPES = ("inference", "admin")
ID = re.compile(r"[A-Za-z0-9_.]{1,64}\Z")
NOBODY = "0" * 64
"""Compared with where no such id exists, so that the answer takes as long."""


@dataclass(frozen=True)
class Key:
    """One key as it is stored: never the key itself."""

    id: str
    salt: str
    digest: str
    scopes: tuple[str, ...] = ("inference",)
    limits: Limits | None = None
    """Its own limits; None: those of the server."""
    created: str = ""
    expires: str | None = None
    """ISO 8601 with time zone."""
    disabled: bool = False
    note: str = ""

    def expired(self, now: float) -> bool:
        """Whether its time is over at the Unix time `now`."""
        return self.expires is not None and datetime.fromisoformat(self.expires).timestamp() <= now

    def record(self) -> dict[str, Any]:
        """As a line of the file."""
        fields = {name: value for name, value in asdict(self).items() if value not in (None, "", False)}
        if self.limits is not None:
            fields["limits"] = {name: value for name, value in asdict(self.limits).items() if value is not None}
        return {**fields, "scopes": list(self.scopes)}


def digest(salt: str, key: str | bytes) -> str:
    """HMAC-SHA-256 of a key under its salt, in hex."""
    raw = key.encode() if isinstance(key, str) else key
    return hmac.new(bytes.fromhex(salt), raw, hashlib.sha256).hexdigest()


def make_key(
    id: str = "",
    scopes: Sequence[str] = ("inference",),
    limits: Limits | None = None,
    expires: str | None = None,
    note: str = "",
) -> tuple[Key, str]:
    """A new key: what is stored, and the key itself, which is shown once."""
    id = id or secrets.token_hex(4)
    if not ID.match(id):
        raise UsageError(f"`{id}` is no id of a key", hint="letters, digits, `_` and `.`, at most 64")
    text = f"{PREFIX}-{id}-{secrets.token_urlsafe(32)}"
    return _stored(id, text, tuple(scopes), limits, expires, note), text


def fixed_key(text: str) -> Key:
    """A key from the environment: every scope, the server's limits, the id `env`."""
    return _stored("env", text, SCOPES, None, None, "")


def _stored(id: str, text: str, scopes: tuple[str, ...], limits: Limits | None, expires: str | None, note: str) -> Key:
    salt = secrets.token_hex(16)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Key(id, salt, digest(salt, text), scopes, limits, created, expires, note=note)


class Keys:
    """The keys of a server: those of a file, and one from the environment."""

    def __init__(
        self,
        path: Path | None = None,
        fixed: str = "",
        warn: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._warn, self._clock = path, warn, clock
        self._fixed = fixed_key(fixed) if fixed else None
        self._seen: tuple[int, ...] = ()
        self._said = ""
        """What is wrong with the file, as it was said last."""
        self._keys: dict[str, Key] = {}
        if path is not None:
            self._seen, self._keys = _stamp(path), read_keys(path)

    def __len__(self) -> int:
        self._refresh()
        return len(self._keys) + (self._fixed is not None)

    def find(self, given: bytes) -> Key | None:
        """The key that a client has sent, if it is one that may be used now."""
        self._refresh()
        found = None
        if self._fixed is not None and hmac.compare_digest(digest(self._fixed.salt, given), self._fixed.digest):
            found = self._fixed
        key = self._keys.get(_id_in(given))
        salt, expected = (key.salt, key.digest) if key else (NOBODY, NOBODY)
        same = hmac.compare_digest(digest(salt, given), expected)
        if key is not None and same and not key.disabled and not key.expired(self._clock()):
            found = key
        return found

    def _refresh(self) -> None:
        """Read the file again if it has changed. While it is damaged or gone the keys of before stay, said once."""
        if self._path is None:
            return
        said, self._said = self._said, ""
        try:
            seen = _stamp(self._path)
            if seen == self._seen:
                return
            self._seen = seen
            self._keys = read_keys(self._path)
        except InputError as error:
            self._said = error.message
            if error.message != said:
                self._warn(f"{error.message}; the keys read before stay in force")


def _id_in(given: bytes) -> str:
    """The id inside a key; it holds no `-`, a secret may."""
    parts = given.split(b"-", 2)
    return parts[1].decode("ascii", "replace") if len(parts) == 3 and parts[0] == PREFIX.encode() else ""


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(
            f"{path}: the file of API keys cannot be read: {error.strerror}", hint="`llmctl keys create` makes one"
        ) from error
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"{path}: others may write the file of API keys, and so let themselves in", hint=f"chmod 600 {path}"
        )
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_keys(path: Path) -> dict[str, Key]:
    """The keys of a file of JSON lines, by id. InputError names the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the file of API keys cannot be read: {error}") from error
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key = _parse(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}:{number}: no API key: {error}") from error
        if key.id in keys:
            raise InputError(f"{path}:{number}: the key `{key.id}` is there twice")
        keys[key.id] = key
    return keys


def _parse(fields: Any) -> Key:
    if not isinstance(fields, dict):
        raise TypeError("the line is no JSON object")
    limits = fields.pop("limits", None)
    key = Key(**{**fields, "scopes": tuple(fields.get("scopes", ("inference",)))})
    if not isinstance(key.id, str) or not ID.match(key.id):
        raise ValueError(f"`id` is {key.id!r}")
    for name, size in (("salt", 32), ("digest", 64)):
        value = getattr(key, name)
        if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-f]{{{size}}}", value):
            raise ValueError(f"`{name}` must be {size} hexadecimal digits")
    if unknown := set(key.scopes) - set(SCOPES):
        raise ValueError(f"unknown scope `{min(map(str, unknown))}`; there are {', '.join(SCOPES)}")
    if not isinstance(key.disabled, bool):
        raise TypeError("`disabled` must be true or false")
    if key.expires is not None and datetime.fromisoformat(key.expires).tzinfo is None:
        raise ValueError("`expires` needs a time zone, such as 2027-01-31T00:00:00+00:00")
    return replace(key, limits=None if limits is None else Limits(**limits))


@dataclass
class KeyFile:
    """The file, to be changed: under a lock, written aside and renamed, readable for its owner only."""

    path: Path
    keys: dict[str, Key] = field(default_factory=dict)

    def save(self) -> None:
        """Replace the file at one stroke."""
        text = "".join(json.dumps(key.record(), sort_keys=True) + "\n" for key in self.keys.values())
        replace_file(self.path, text)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[KeyFile]:
    """The file of keys, to be changed by nobody else meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield KeyFile(path, read_keys(path) if path.exists() else {})
    finally:
        os.close(lock)
