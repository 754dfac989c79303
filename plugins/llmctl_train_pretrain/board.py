"""TensorBoard as a sink of metrics: with LLMCTL_TENSORBOARD=DIR every number of a stage also becomes a scalar there."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl import hookimpl
from llmctl.errors import MachineError

VARIABLE = "LLMCTL_TENSORBOARD"
_writers: dict[str, Any] = {}
"""By stage: a process runs one, and writes one file."""


@hookimpl
def log_metrics(stage: str, values: Mapping[str, float], step: int | None) -> None:
    """Add the numbers of one step; what has none is final, and is written out at once.

    Nothing without the variable. MachineError if `tensorboard` is not installed.
    """
    if not os.environ.get(VARIABLE):
        return
    writer = _writers.get(stage) or _open(stage)
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    if step is None:
        writer.flush()


def _open(stage: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MachineError(f"{VARIABLE} is set, {error}", hint="pip install 'llmctl[track]'") from error
    folder = Path(os.environ[VARIABLE]) / stage / time.strftime("%Y%m%d-%H%M%S")
    _writers[stage] = SummaryWriter(str(folder), flush_secs=10)
    return _writers[stage]
