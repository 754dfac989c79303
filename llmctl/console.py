"""What a person sees while a run goes on, and how tables, sizes and times are written; rich is imported late."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from llmctl.sparkline import Course

HEARTBEAT = 10.0
"""Seconds between two plain progress lines of one stage."""

FEW = 2
"""So many numbers stand in the line of the bar; more get a line of their own."""
SHOWN = ("loss", "bpb", "accuracy", "lr", "grad_norm", "tokens_per_s", "rows_per_s", "utilisation", "memory_bytes")
"""Progress fields in the order they are shown; others follow as they come."""


def human_bytes(count: float) -> str:
    """`512 B`, `1.5 MiB`, `12 GiB`: powers of 1024, two figures or more."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 10 else f"{size:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3:05 min`, `2:01:40 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"


def human_number(value: object) -> str:
    """A metric as a person reads it: four figures, `12.3k` from ten thousand on; texts and truths as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (limit if unit != 'k' else 1e3):.3g}{unit}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns two spaces apart, left-aligned, columns of numbers right-aligned; no trailing newline or blanks."""
    lines = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in lines) for i in range(len(headers))]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in rows)
        for i in range(len(headers))
    ]
    cells = [
        [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)]
        for row in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def wants_colour(stream: TextIO) -> bool:
    """NO_COLOR, then CLICOLOR_FORCE (no-color.org, bixense.com/clicolors), then a capable terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("CLICOLOR_FORCE", "0") not in ("", "0"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def wants_bars(stream: TextIO) -> bool:
    """Whether a live display makes sense: a capable terminal that is not a CI log."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


class Reporter:
    """Shows the events of a run (`pipeline.md` 3.7) as plain lines: start, heartbeat, end, warnings.

    At most one progress line per stage and `HEARTBEAT` seconds. Warnings are repeated by `close`, so that they are not
    lost above a thousand lines. Unknown event types are ignored. It is a context manager.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.clock = clock
        self.total = 0
        self.finished = 0
        self._left: float | None = None
        self._warnings: list[str] = []
        self._started: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._closed = False

    def event(self, event: Mapping[str, Any]) -> None:
        """Show one event: a dict with `type` and the fields of that type."""
        handler = getattr(self, "_on_" + str(event.get("type", "")).replace(".", "_"), None)
        if handler is not None and not self._closed:
            handler(event)

    def close(self) -> None:
        """Take the bars down and repeat the warnings; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._take_down()
        if len(self._warnings) > 1 or (self._warnings and self.total > 1):
            self._print(f"{len(self._warnings)} warning{'s' if len(self._warnings) > 1 else ''}:")
            for text in self._warnings:
                self._print(f"  {text}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- events ---------------------------------------------------------------------------------------------------

    def _on_plan(self, event: Mapping[str, Any]) -> None:
        stages = event.get("stages", ())
        self.total = stages if isinstance(stages, int) else len(stages)

    def _on_run_progress(self, event: Mapping[str, Any]) -> None:
        self.finished, self.total = int(event.get("done", self.finished)), int(event.get("total", self.total))
        self._left = event.get("eta_s")

    def _on_stage_start(self, event: Mapping[str, Any]) -> None:
        stage = str(event["stage"])
        self._started[stage] = self._said[stage] = self.clock()
        left = f", about {human_seconds(self._left)} left in all" if self._left and self.total > 1 else ""
        attempt = f" attempt {event['attempt']}" if int(event.get("attempt") or 1) > 1 else ""
        self._print(f"{self._position()}{stage}: start{attempt}{left}")

    def _on_stage_progress(self, event: Mapping[str, Any]) -> None:
        stage, now = str(event["stage"]), self.clock()
        if now - self._said.setdefault(stage, now) < HEARTBEAT:
            return
        self._said[stage] = now
        self._print(f"{stage}: {self._progress_text(stage, event)}")

    def _on_stage_checkpoint(self, event: Mapping[str, Any]) -> None:
        if event.get("step"):  # step 0 proves that a checkpoint can be written; it is no progress
            self._print(f"{event['stage']}: checkpoint at step {event['step']}")

    def _on_stage_cached(self, event: Mapping[str, Any]) -> None:
        self._print(f"{self._position()}{event['stage']}: cached")
        self.finished += 1

    def _on_stage_skipped(self, event: Mapping[str, Any]) -> None:
        reason = event.get("reason")
        self._print(f"{event['stage']}: skipped" + (f", {reason}" if reason else ""))

    def _on_stage_end(self, event: Mapping[str, Any]) -> None:
        stage = str(event["stage"])
        self.finished += 1
        took = event.get("seconds", self.clock() - self._started.pop(stage, self.clock()))
        code = int(event.get("code") or 0)
        if event.get("stopped"):
            self._print(f"{stage}: stopped after {human_seconds(took)}", style="yellow")
            return
        if code:
            self._print(f"{stage}: failed with exit {code} after {human_seconds(took)}", style="red")
            return
        if choice := event.get("choice"):
            values = "".join(f", {name} {value}" for name, value in choice["values"].items())
            number = f"{choice['metric']} {human_number(choice['value'])}"
            self._print(f"{stage}: chose {choice['stage']} of {choice['rows']}{values}: {number}")
            return
        text = "".join(f"  {name} {human_number(value)}" for name, value in event.get("metrics", {}).items())
        self._print(f"{stage}: done in {human_seconds(took)}{text}")

    def _on_gate(self, event: Mapping[str, Any]) -> None:
        word, style = ("passed", "") if event.get("ok") else ("FAILED", "red")
        value = "missing" if event.get("value") is None else human_number(event["value"])
        limit = f" (limit {human_number(event['limit'])})" if event.get("limit") is not None else ""
        self._print(f"{event['stage']}: gate {event['metric']} {word}: {value}{limit}", style=style)

    def _on_log(self, event: Mapping[str, Any]) -> None:
        self._print(f"{_prefix(event)}{event.get('text', '')}")

    def _on_warning(self, event: Mapping[str, Any]) -> None:
        text = f"{_prefix(event)}{event.get('text', '')}"
        if text not in self._warnings:
            self._warnings.append(text)
            self._print(f"warning: {text}", style="yellow")

    # -- text -----------------------------------------------------------------------------------------------------

    def _position(self) -> str:
        """`[3/7] `: the stages that are done and those that run, this one included."""
        number = self.finished + max(1, len(self._started))
        return f"[{min(number, self.total)}/{self.total}] " if self.total > 1 else ""

    def _progress_text(self, stage: str, event: Mapping[str, Any]) -> str:
        step, total = event.get("step", 0), event.get("total")
        figures = [f"{name} {value}" for name, value in shown_fields(event).items()]
        return "  ".join([self._place(step, total), *figures, *self._left_of(stage, step, total)])

    @staticmethod
    def _place(step: float, total: float | None) -> str:
        return f"step {step}" + (f" of {total}" if total else "")

    def _left_of(self, stage: str, step: float, total: float | None) -> list[str]:
        remaining = self._remaining(stage, step, total)
        return [f"{human_seconds(remaining)} left"] if remaining is not None else []

    def _remaining(self, stage: str, step: float, total: float | None) -> float | None:
        """Seconds left in a stage by the pace so far, once a tenth of a second has passed."""
        passed = self.clock() - self._started.get(stage, self.clock())
        if not total or step <= 0 or passed < 0.1:
            return None
        return max(0.0, passed / step * (total - step))

    # -- output ---------------------------------------------------------------------------------------------------

    def _print(self, text: str, style: str = "") -> None:
        if style and wants_colour(self.stream):
            code = {"red": 31, "yellow": 33}[style]
            text = f"\x1b[{code}m{text}\x1b[0m"
        self.stream.write(text + "\n")
        self.stream.flush()

    def _take_down(self) -> None:
        """Nothing to take down in plain output."""


def _prefix(event: Mapping[str, Any]) -> str:
    return f"{event['stage']}: " if event.get("stage") else ""


def shown_fields(event: Mapping[str, Any]) -> dict[str, str]:
    """The stage's own progress fields (loss, tokens per second, …) in a fixed order, formatted."""
    hidden = {"ts", "seq", "run", "type", "stage", "step", "total", "key", "attempt"}
    names = [name for name in SHOWN if name in event] + [n for n in event if n not in SHOWN and n not in hidden]
    return {_label(name): _figure(name, event[name]) for name in names if event[name] is not None}


def _figure(name: str, value: Any) -> str:
    if name == "utilisation":
        return f"{value:.0%}"
    return human_bytes(value) if name.endswith("_bytes") else human_number(value)


LABELS = {"utilisation": "MFU", "memory_bytes": "memory", "grad_norm": "norm"}


def _label(name: str) -> str:
    if name in LABELS:
        return LABELS[name]
    return name.removesuffix("_per_s") + "/s" if name.endswith("_per_s") else name


class LiveReporter(Reporter):
    """The same events with bars on a terminal: the whole run with the time left, and one bar per running stage."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        colour = wants_colour(self.stream)
        self._console = Console(file=self.stream, no_color=not colour, highlight=False, emoji=False, markup=False)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
            refresh_per_second=5,
        )
        self._tasks: dict[str, Any] = {}
        self._fractions: dict[str, float] = {}
        self._courses: dict[str, Course] = {}
        self._overall: Any = None
        self._bars.start()

    def _on_plan(self, event: Mapping[str, Any]) -> None:
        super()._on_plan(event)
        if self.total > 1:
            self._overall = self._bars.add_task("run", total=self.total, note="")

    def _on_stage_start(self, event: Mapping[str, Any]) -> None:
        stage = str(event["stage"])
        self._remove(stage)  # of an attempt before this one
        self._started[stage] = self.clock()
        self._tasks[stage] = self._bars.add_task(f"{self._position()}{stage}", total=None, note="")
        self._update_overall()

    def _on_stage_progress(self, event: Mapping[str, Any]) -> None:
        stage = str(event["stage"])
        if stage not in self._tasks:
            return
        step, total = event.get("step", 0), event.get("total")
        note = self._note(stage, event)
        self._bars.update(self._tasks[stage], completed=step, total=total, note=note)
        self._fractions[stage] = min(1.0, step / total) if total else 0.0
        self._update_overall()

    def _note(self, stage: str, event: Mapping[str, Any]) -> str:
        """What stands beside the bar: how far it is, and below it the numbers, the loss with its course so far."""
        figures = [f"{name} {value}" for name, value in shown_fields(event).items()]
        if len(figures) <= FEW:
            return self._progress_text(stage, event)
        if isinstance(loss := event.get("loss"), int | float):
            course = self._courses.setdefault(stage, Course())
            course.add(loss)
            figures.insert(0, course.line())
        step, total = event.get("step", 0), event.get("total")
        first = "  ".join([self._place(step, total), *self._left_of(stage, step, total)])
        return f"{first}\n{'  '.join(figures)}"

    def _on_run_progress(self, event: Mapping[str, Any]) -> None:
        super()._on_run_progress(event)
        self._update_overall()

    def _on_stage_checkpoint(self, event: Mapping[str, Any]) -> None:
        """No line: the bar moves, and every checkpoint of a long run would scroll the terminal away."""

    def _on_stage_cached(self, event: Mapping[str, Any]) -> None:
        super()._on_stage_cached(event)
        self._remove(str(event["stage"]))

    def _on_stage_end(self, event: Mapping[str, Any]) -> None:
        super()._on_stage_end(event)
        self._remove(str(event["stage"]))

    def _remove(self, stage: str) -> None:
        task = self._tasks.pop(stage, None)
        self._courses.pop(stage, None)
        self._fractions.pop(stage, None)
        if task is not None:
            self._bars.remove_task(task)
        self._update_overall()

    def _update_overall(self) -> None:
        """The bar counts stages, a running one by its own share; the time left is the runner's estimate."""
        if self._overall is None:
            return
        done = min(self.total, self.finished + sum(self._fractions.values()))
        left = f", about {human_seconds(self._left)} left" if self._left else ""
        note = f"{self.finished} of {self.total} stages{left}"
        self._bars.update(self._overall, completed=done, total=self.total, note=note)

    def _print(self, text: str, style: str = "") -> None:
        if self._closed:
            super()._print(text, style)
        else:
            self._console.print(text, style=style or None, soft_wrap=True)

    def _take_down(self) -> None:
        self._bars.stop()


class JsonReporter(Reporter):
    """Every event as it is, a JSON object per line."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Write one event."""
        self.stream.write(json_line(event))
        self.stream.flush()

    def close(self) -> None:
        """Warnings are events; none is repeated."""


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON."""
    import json

    return json.dumps(value, ensure_ascii=False) + "\n"


def open_reporter(*, stream: TextIO | None = None, log_format: str = "text") -> Reporter:
    """Bars on a capable terminal, plain lines elsewhere (pipe, file, CI, TERM=dumb), or JSON; stderr by default."""
    target = sys.stderr if stream is None else stream
    if log_format == "json":
        return JsonReporter(target)
    return LiveReporter(target) if wants_bars(target) else Reporter(target)
