"""Samples that survive a crash: each is appended as it ends, and a rerun skips what is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llmctl import Context

Sample = dict[str, Any]


class SampleLog:
    """The finished samples of one task and one model, by the number of their row."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.done: dict[int, Sample] = {}
        kept = b""
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith(b"\n"):
                break  # a crash cut the last line
            kept += line
            row = json.loads(line)
            self.done[row["row"]] = row
        path.write_bytes(kept)

    def add(self, row: int, sample: Sample) -> None:
        """Append one sample and hand it to the operating system."""
        self.done[row] = {"row": row, **sample}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.done[row], ensure_ascii=False) + "\n")

    def in_order(self) -> list[Sample]:
        """All samples in the order of their rows."""
        return [self.done[row] for row in sorted(self.done)]


def collect(
    ctx: Context,
    log: SampleLog,
    rows: Sequence[Any],
    score: Callable[[Sequence[Any]], Iterable[Sample]],
    batch_size: int,
    task: str,
) -> list[Sample]:
    """Score every row that the log lacks, `batch_size` at a time; stops between batches when asked to."""
    left = [number for number in range(len(rows)) if number not in log.done]
    for start in range(0, len(left), batch_size):
        if ctx.should_stop():
            raise ctx.stopped(len(log.done))
        batch = left[start : start + batch_size]
        for number, sample in zip(batch, score([rows[number] for number in batch]), strict=True):
            log.add(number, sample)
        ctx.progress(len(log.done), len(rows), task=task)
    return log.in_order()


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """`samples.jsonl` of the metrics output, appended to."""
    with path.open("a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({k: v for k, v in sample.items() if k != "row"}, ensure_ascii=False) + "\n")
