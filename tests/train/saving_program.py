"""What `test_saving.py` runs in every rank: trainings that stop and go on, cases of a JSON file one after the other.

`python saving_program.py CASES OUT`. Cases with the same `base` share their checkpoints; `stop` is the step after which
a case is asked to stop, `fault` breaks the saving in one place.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rank_program import PARAMS, SHAPE, examples

from llmctl.errors import TempFail
from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.stage import Context, Helped
from llmctl.train import restoring, saving
from llmctl.train.checkpoint import Checkpoints
from llmctl.train.data import ExampleSource
from llmctl.train.loop import fit
from llmctl.train.objectives import CausalLM
from llmctl.train.params import TrainParams

COMMIT, LOAD = Checkpoints.commit, restoring.load_parts


def run(case: dict[str, Any], out: Path) -> None:
    """One case; the losses, the final weights, the sizes of the checkpoint's files and what was said go to `out`."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE))
    params = TrainParams(**{**PARAMS, "max_steps": 12, "save_every": 4, **case.get("params", {})})
    base, said = out / case.get("base", case["name"]), out / case["name"] / "said.txt"
    said.parent.mkdir(exist_ok=True)
    asked = iter(range(10_000))
    stop = (lambda: next(asked) >= case["stop"]) if "stop" in case else (lambda: False)
    rank = int(os.environ["RANK"])

    def emit(kind: str, fields: Any) -> None:
        if rank == 0 and kind in ("log", "warning", "checkpoint"):
            with said.open("a") as file:
                file.write(str(fields.get("text") or f"checkpoint {fields['step']}") + "\n")

    ctx = Context("test", {"metrics": base / "metrics"}, base / "resume", emit, stop)
    try:
        fit(ctx, model, CausalLM(), ExampleSource(examples(), 32, params), params)
        torch.save(model.state_dict(), out / case["name"] / "weights.pt")
    except (Helped, TempFail):
        pass


def slow(self: Checkpoints, step: int, *arguments: Any) -> Any:
    """Training goes on for some steps before the checkpoint is complete."""
    time.sleep(0.3)
    return COMMIT(self, step, *arguments)


def killed(self: Checkpoints, step: int, *arguments: Any) -> Any:
    """kill -9 when everything is written, but for the rename."""
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return COMMIT(self, step, *arguments)


def full(self: Checkpoints, step: int, *arguments: Any) -> Any:
    """The disk is full."""
    with self.writing(step):
        if step == 4:
            raise OSError(28, "No space left on device")
    return COMMIT(self, step, *arguments)


def confused(*arguments: Any) -> Any:
    """The optimizer's state is lost on the way."""
    found = LOAD(*arguments)
    return {name: torch.zeros_like(t) if name.endswith("exp_avg") else t for name, t in found.items()}


FAULTS = {"slow": slow, "killed": killed, "full": full}


def main() -> None:
    """All cases; each has a port of its own, since the store of the one before may still be there."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    port = int(os.environ["MASTER_PORT"])
    for number, case in enumerate(cases):
        os.environ["MASTER_PORT"] = str(port + number)
        Checkpoints.commit = FAULTS.get(case.get("fault", ""), COMMIT)
        restoring.load_parts = confused if case.get("fault") == "confused" else LOAD
        run(case, out)


if __name__ == "__main__":
    assert saving.load_parts is LOAD
    main()
