"""Where every process of a training is: a small file that each rank keeps, and a watch that names the one that hangs.

A rank that waits for another looks as idle as the one it waits for. But all take the same phases in the same order, so
the one that has entered the fewest is the one that holds the others up.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmctl.console import human_seconds

FOLDER = "heartbeats"
"""In the work directory of a stage, which all its machines see."""
LENGTH = 512
"""Bytes of a file: one write of fixed length within a page, which no reader sees half done."""
AFTER = "LLMCTL_HANG_AFTER"
"""Variable: seconds in one phase after which a rank is called hung, instead of `LEAST`."""
LEAST = 120.0
BEGINNING = 900.0
"""Before the first step is done: kernels are compiled, data is laid out."""
TIMES = 20
"""A phase may also take so many times the longest one so far."""
PAUSE = 2.0
"""Seconds between two looks."""


class Heartbeat:
    """The file of one rank. `enter` costs some ten microseconds: call it at every phase of every step."""

    def __init__(self, work: Path, rank: int = 0, clock: Callable[[], float] = time.time, *, stage: str = "") -> None:
        self._clock, self._stage = clock, stage
        self._count = 0
        self._longest = 0.0
        self._since = clock()
        self._host, self._pid, self._rank = socket.gethostname(), os.getpid(), rank
        folder = work / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank-{rank}.json"
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        self.enter("start", 0)

    def enter(self, phase: str, step: int) -> None:
        """This rank begins `phase` of `step`, counted from 1; 0 is before the first."""
        now = self._clock()
        if step > 1:  # the first step compiles: its length says nothing about the others
            self._longest = max(self._longest, now - self._since)
        self._since = now
        self._count += 1
        text = json.dumps(
            {
                "stage": self._stage[:48],
                "rank": self._rank,
                "step": step,
                "phase": phase,
                "count": self._count,
                "time": round(now, 3),
                "longest": round(self._longest, 3),
                "pid": self._pid,
                "host": self._host[:64],
            }
        )
        os.pwrite(self._file, text.ljust(LENGTH - 1).encode() + b"\n", 0)

    def close(self) -> None:
        """The rank is done; may be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a file says."""

    stage: str
    rank: int
    step: int
    phase: str
    count: int
    """Phases that the rank has entered in all."""
    time: float
    longest: float
    pid: int
    host: str

    @property
    def alive(self) -> bool:
        """Whether the process is there, as far as this machine can tell."""
        here = self.host == socket.gethostname()[:64] and Path("/proc").exists()
        return not here or Path(f"/proc/{self.pid}").exists()

    @property
    def stopped(self) -> bool:
        """Whether the process, if it is on this machine, cannot run: stopped, traced, dead, waiting for a disk."""
        if self.host != socket.gethostname()[:64]:
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return False
        return state in "TtZXD"


def beats(work: Path) -> list[Beat]:
    """Of all ranks in a work directory, by number; a file that is being made or is damaged is passed over."""
    return sorted(_read(work), key=lambda beat: beat.rank)


def _read(work: Path) -> Iterator[Beat]:
    for path in (work / FOLDER).glob("rank-*.json"):
        try:
            yield Beat(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue


def running(works: Path) -> list[Beat]:
    """Of all ranks that run now, by stage and number; `works` is the directory of all work directories."""
    found = (beat for folder in works.glob(f"*/{FOLDER}") for beat in _read(folder.parent))
    return sorted((beat for beat in found if beat.alive), key=lambda beat: (beat.stage, beat.rank))


class Watch:
    """Looks at the ranks of one stage from the runner; `look` says once what hangs, and again when it goes on."""

    def __init__(self, work: Path, clock: Callable[[], float] = time.time) -> None:
        self._work, self._clock = work, clock
        self._began = clock()
        self._next = 0.0
        self._told: tuple[int, ...] = ()
        after = os.environ.get(AFTER)
        self._least, self._beginning = (float(after), float(after)) if after else (LEAST, BEGINNING)

    def look(self) -> str:
        """A sentence that names the ranks that hang and their phase; empty if there is no news."""
        now = self._clock()
        if now < self._next:
            return ""
        self._next = now + PAUSE
        # What a killed attempt has left is no rank of this one.
        found = [beat for beat in beats(self._work) if beat.alive and beat.time >= self._began - PAUSE]
        behind = hung(found, now, self._least, self._beginning)
        ranks = tuple(beat.count for beat in behind)
        if ranks == self._told:
            return ""
        before, self._told = self._told, ranks
        if not behind:
            return "all ranks go on" if before else ""
        return describe(behind, found, now)


def hung(found: list[Beat], now: float, least: float = LEAST, beginning: float = BEGINNING) -> list[Beat]:
    """The ranks that hold all up, none while anything moves: those that have entered the fewest phases.

    Of several in the same place, which all-reduce each other's gradients there, those that the system says cannot run.
    """
    if not found or any(now - beat.time <= patience(beat, least, beginning) for beat in found):
        return []
    fewest = min(beat.count for beat in found)
    behind = [beat for beat in found if beat.count == fewest]
    return [beat for beat in behind if beat.stopped] or behind


def patience(beat: Beat, least: float, beginning: float) -> float:
    """Seconds that a rank may be in its phase."""
    return max(beginning if beat.step <= 1 else least, TIMES * beat.longest)


def describe(behind: list[Beat], found: list[Beat], now: float) -> str:
    """Who hangs, where and for how long, and what the others do."""
    names = ", ".join(str(beat.rank) for beat in behind)
    first = behind[0]
    since = human_seconds(now - max(beat.time for beat in behind))
    where = f"on {first.host} (process {', '.join(str(beat.pid) for beat in behind)})"
    text = f"rank{'s' if len(behind) > 1 else ''} {names} {where} "
    text += f"hang{'s' if len(behind) == 1 else ''}: for {since} in `{first.phase}` of step {first.step}"
    if waiting := [beat for beat in found if beat not in behind]:
        text += f"; {len(waiting)} other{'s' if len(waiting) > 1 else ''} wait in `{waiting[0].phase}`"
    return text
