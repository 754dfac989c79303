"""What to do with what a run has exported: commands that work as they are printed."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from llmctl.pipeline.exports import export_targets
from llmctl.pipeline.report import read_rows
from llmctl.pipeline.result import RunResult
from llmctl.spec.files import display
from llmctl.spec.resolved import Pipeline

QUESTIONS = 3
URL = "http://127.0.0.1:8000/v1/chat/completions"


def next_steps(pipeline: Pipeline, result: RunResult, spec: str) -> list[str]:
    """Lines to print after a good run: talk to the last exported model, serve it, ask it; then the spec's own `next`.

    `spec` is how the user named the spec.
    """
    own = [line.replace("{llmctl}", program_name()).replace("{spec}", shlex.quote(spec)) for line in pipeline.next]
    exported = [
        target
        for id, stage in result.stages.items()
        for port, target in export_targets(pipeline.stages[id]).items()
        if stage.ok and stage.outputs[port].type in ("model.hf", "model.onnx")
    ]
    if not exported or pipeline.single:
        return own
    model, program = display(exported[-1]), program_name()
    questions = list(dict.fromkeys(_answered(result)))[:QUESTIONS]
    question = questions[0] if questions else "Who are you?"
    body = json.dumps({"model": exported[-1].name, "messages": [{"role": "user", "content": question}]})
    header = shlex.quote("Content-Type: application/json")
    lines = [
        "next:",
        f"  {program} chat {shlex.quote(model)}",
        f"  {program} serve --model {shlex.quote(model)} --port 8000",
        f"  curl -s {URL} -H {header} -d {shlex.quote(body)}",
    ]
    asked = ["questions it has answered:", *(f"  {text}" for text in questions)] if questions else []
    return lines + asked + own


def _answered(result: RunResult) -> Iterator[str]:
    """Questions that the last evaluation of the run found right, answered by the model in its own words.

    An answer with citations came from documents; where there is a `chance` of being right it was only chosen.
    """
    for stage in reversed(result.stages.values()):
        for row in read_rows(stage, "samples.jsonl"):
            right = row.get("ok") and row.get("expected") and not row.keys() & {"citations", "chance"}
            if right and isinstance(row.get("question"), str):
                yield row["question"]


def program_name() -> str:
    """How this program was started: `llmctl` where the shell would find the same file, else its path."""
    started = Path(sys.argv[0])
    if started.name != "llmctl":
        return f"{shlex.quote(sys.executable)} -m llmctl"
    found = shutil.which("llmctl")
    same = found is not None and started.exists() and Path(found).samefile(started)
    return "llmctl" if same else shlex.quote(display(started.absolute()))
