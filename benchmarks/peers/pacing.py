"""Time training in rounds that the parent process asks for, so that several trainers take turns on one machine.

Needs torch alone: the same instrument is put into every trainer, whatever its loop looks like. A round is so many
optimizer steps; between rounds the trainer is held inside its optimizer's step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Pace:
    """Holds the trainer after `warmup` steps, then lets it train `steps` at each line on stdin.

    Prints `{"seconds": ..., "cpu_seconds": ...}` for each round. An empty stdin ends the process.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.left, self.steps = warmup, steps
        self.begun: tuple[float, float] | None = None
        # The trainer's own output must not mix with ours.
        self.answers: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        register_optimizer_step_post_hook(self.stepped)

    def stepped(self, *_: Any) -> None:
        """Count an optimizer step that has just been taken."""
        self.left -= 1
        if self.left:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = (time.perf_counter(), time.process_time())
        seconds = [b - a for a, b in zip(self.begun or now, now, strict=True)]
        print(json.dumps({"seconds": seconds[0], "cpu_seconds": seconds[1]}), file=self.answers)
        if not sys.stdin.readline():
            self.answers.flush()
            os._exit(0)  # the trainer would go on, and save
        self.left = self.steps
        self.begun = (time.perf_counter(), time.process_time())
