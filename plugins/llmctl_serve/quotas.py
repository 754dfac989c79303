"""What was used today (UTC), kept in a file over restarts.

The file is written aside and renamed, at most every few seconds and when the server stops. A server that is killed
forgets what was used since the last writing, `EVERY` seconds at most.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmctl import InputError
from llmctl_serve.files import replace_file

EVERY = 5.0
"""Seconds between two writings."""
DAY = 86_400
CLIENTS = 10_000
"""Addresses that are told apart within a day; what further ones use is counted together."""
SHARED = "addr:others"


@dataclass
class Used:
    """Of one client, today."""

    requests: int = 0
    tokens: int = 0


class Quotas:
    """Counts by client for the present day; without a `path` they end with the server."""

    def __init__(
        self,
        path: Path | None,
        clock: Callable[[], float] = time.time,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._path, self._clock, self._warn = path, clock, warn
        self._day, self._used, self._saved = self._today(), dict[str, Used](), -math.inf
        self._changed = False
        self._number = self._written = 0
        self._writing = threading.Lock()
        if path is not None and path.exists():
            self._load(path)

    def _today(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).date().isoformat()

    def _load(self, path: Path) -> None:
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            used = {str(who): Used(int(each["requests"]), int(each["tokens"])) for who, each in found["used"].items()}
            day = str(found["day"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: no counts of quotas: {error}", hint="remove the file, and today's quotas begin anew"
            ) from error
        if day == self._day:
            self._used = used

    def _turn(self) -> None:
        if (today := self._today()) != self._day:
            self._day, self._used, self._changed = today, {}, True

    def _name(self, who: str) -> str:
        known = who in self._used or not who.startswith("addr:") or len(self._used) < CLIENTS
        return who if known else SHARED

    def used(self, who: str) -> Used:
        """What a client has used today."""
        self._turn()
        return self._used.get(self._name(who)) or Used()

    def add(self, who: str, requests: int, tokens: int, day: str = "") -> str:
        """Count, or give back with negative numbers; the day they are counted on. Refunds of a past day are void."""
        self._turn()
        if day in ("", self._day):
            used = self._used.setdefault(self._name(who), Used())
            used.requests += requests
            used.tokens += tokens
            self._changed = True
        return self._day

    def until_reset(self) -> int:
        """Nanoseconds until midnight UTC."""
        return math.ceil((DAY - self._clock() % DAY) * 1e9)

    def due(self) -> bool:
        """Whether it is time to write."""
        return self._path is not None and self._changed and self._clock() - self._saved >= EVERY

    def save(self) -> None:
        """Write the file; a disk that refuses is only warned of, as answers matter more."""
        if (taken := self._taken()) is not None:
            self._write(*taken)

    def save_beside(self) -> None:
        """As `save`, the counts as they are now; the file is written by a thread, so that no answer waits for it."""
        if (taken := self._taken()) is not None:
            threading.Thread(target=self._write, args=taken, name="quotas").start()

    def _taken(self) -> tuple[int, str] | None:
        """The counts and their number, which later ones have a greater one than; None if there is nothing to write."""
        if self._path is None or not self._changed:
            return None
        self._changed, self._saved = False, self._clock()
        self._number += 1
        used = {who: {"requests": each.requests, "tokens": each.tokens} for who, each in self._used.items()}
        return self._number, json.dumps({"day": self._day, "used": used}, sort_keys=True) + "\n"

    def _write(self, number: int, text: str) -> None:
        assert self._path is not None
        with self._writing:
            if number < self._written:
                return  # a later one was quicker
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(self._path, text)
                self._written = number
            except OSError as error:
                self._changed = True
                self._warn(f"{self._path}: quotas cannot be written: {error.strerror}")
