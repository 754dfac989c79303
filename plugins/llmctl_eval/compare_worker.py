"""One variant in a process of its own, so that its memory and its caches are nobody else's.

`python -m llmctl_eval.compare_worker` reads a JSON object a line and answers each with one: `open`, `turn`, `score`.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.errors import LlmctlError
from llmctl.ort import OrtGenerator, open_bundle
from llmctl.ort.cache import Rows
from llmctl.ort.generator import prefill
from llmctl.ort.sampling import log_probabilities


class Worker:
    """What answers; `open` comes first."""

    generator: OrtGenerator

    def open(self, path: str, device: str, threads: int) -> dict[str, Any]:
        """Open the bundle; what the others must know of it."""
        self.generator = open_bundle(path, device, threads)
        return {
            "context": self.generator.context_length,
            "vocabulary": self.generator.vocab_size,
            "backend": self.generator.backend,
        }

    def turn(self, prompt: list[int], steps: int, batch: int) -> dict[str, float]:
        """Seconds to the first token, of a step alone and of a step of `batch` rows; the most memory so far.

        The prompt is read once before: what ran in between has emptied the processor's caches.
        """
        one = self.generator.rows(1, len(prompt) + steps)
        prefill(one, 0, prompt)
        one.restart()
        begun = time.perf_counter()
        first = int(prefill(one, 0, prompt).argmax())
        read = time.perf_counter() - begun
        many = one.keep([0] * batch)
        alone = _decode(one, [first], steps)
        return {"first_token": read, "step": alone, "batch": _decode(many, [first] * batch, steps), "peak": peak()}

    def score(self, ids: list[int], sizes: list[int]) -> dict[str, Any]:
        """Nats of the tokens of one window that have a size, and the likeliest token at each of their places."""
        logits = self.generator.logits(ids)[:-1]
        places = np.flatnonzero(np.array(sizes[1:]))
        chosen = np.array(ids[1:], np.int64)[places]
        scores = log_probabilities(logits[places])[np.arange(len(places)), chosen]
        return {"nats": -float(scores.astype(np.float64).sum()), "top": logits[places].argmax(axis=1).tolist()}


def _decode(rows: Rows, tokens: list[int], steps: int) -> float:
    """Seconds of a greedy step."""
    begun = time.perf_counter()
    for _ in range(steps):
        tokens = rows.step(tokens).argmax(axis=1).tolist()
    return (time.perf_counter() - begun) / steps


def peak() -> int:
    """The largest resident set of this process so far, in bytes.

    Not `ru_maxrss` on Linux: it begins with that of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.M)):
        return int(found[1]) << 10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def answer(worker: Worker, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What `asked` gives, or the error that it ended with."""
    ask: Callable[..., dict[str, Any]] = getattr(worker, asked["do"])
    try:
        return ask(**asked["with"])
    except LlmctlError as error:
        return {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}


def main() -> None:
    """Answer until nobody asks any more."""
    # What libraries print must not stand between the answers.
    out, sys.stdout = sys.stdout, sys.stderr
    worker = Worker()
    for line in sys.stdin:
        out.write(json.dumps(answer(worker, json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
