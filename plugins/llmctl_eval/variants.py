"""The processes of the variants, seen from the stage: each waits while another works."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl import Artifact, StageError
from llmctl.errors import BY_EXIT_CODE


@dataclass
class Variant:
    """A bundle, its process, and what was measured so far, one value for each turn."""

    name: str
    path: Path
    process: subprocess.Popen[str]
    context: int = 0
    vocabulary: int = 0
    backend: str = ""
    turns: list[dict[str, float]] = field(default_factory=list)
    nats: float | None = None
    top: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, model: Artifact, device: str, threads: int) -> Variant:
        """Open the bundle in a process. Its errors are raised here, with the name of the variant."""
        command = [sys.executable, "-P", "-m", "llmctl_eval.compare_worker"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        variant = cls(name, model.path, process)
        try:
            facts = variant.ask("open", path=str(model.path), device=device, threads=threads)
        except BaseException:
            variant.close()
            raise
        variant.context, variant.vocabulary, variant.backend = facts["context"], facts["vocabulary"], facts["backend"]
        return variant

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """One line to the process, one from it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, "with": given}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise StageError(
                f"the process of variant {self.name} ({self.path}) ended with {self.process.wait()}",
                hint="is there memory for all variants at once? they are open together",
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = BY_EXIT_CODE.get(answer["exit_code"], StageError)
            raise kind(f"variant {self.name}: {answer['error']}", hint=answer["hint"])
        return answer

    def close(self) -> None:
        """End the process, whatever it is at."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    @property
    def bytes(self) -> int:
        """Bytes of all files of the bundle."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
