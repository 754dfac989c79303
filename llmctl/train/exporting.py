"""A checkpoint as a model: at any step, also while the run that writes it goes on."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from llmctl.errors import InputError, UsageError
from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.train.checkpoint import STEP, Checkpoint, Checkpoints


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint `step-N`, or the newest below a work directory; InputError if there is none, or it is damaged."""
    match = STEP.match(path.name)
    if match and path.is_dir():
        checkpoints, step = Checkpoints(path.parent), int(match[1])
    else:
        checkpoints = Checkpoints(path / "ckpt" if (path / "ckpt").is_dir() else path)
        if not checkpoints.steps():
            raise InputError(f"{path} holds no checkpoint", hint="give a directory step-N, or one that has some")
        step = checkpoints.steps()[-1]
    try:
        return checkpoints.load(step)
    except ValueError as error:
        raise InputError(str(error)) from error


def model_of(checkpoint: Checkpoint, weights: str = "auto") -> Transformer:
    """The model of a checkpoint on the CPU: with `mean` its averaged weights, with `last` those of the last step.

    `auto`: the mean if there is one, which is what the run itself would leave. UsageError if there is none to take;
    InputError if the checkpoint does not say which shape it has, as those of models that transformers computes.
    """
    config = checkpoint.values.get("config")
    if config is None:
        raise InputError(
            f"the checkpoint of step {checkpoint.step} does not hold the shape of its model",
            hint="it is of an older version, or of a model that transformers computes: let its run end",
        )
    tensors = parts(checkpoint, "model")
    means = averaged(checkpoint, tensors) if weights != "last" else {}
    if weights == "mean" and not means:
        raise UsageError(f"the checkpoint of step {checkpoint.step} has no mean of weights", hint="train with ema")
    model = Transformer(ModelConfig.from_dict(config))
    model.load_state_dict(tensors | means, strict=True)
    return model.eval()


def averaged(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each parameter that has one: of `ema`, or of a schedule-free optimizer."""
    facts = checkpoint.values["facts"]
    if facts["optimizer"] != "schedule-free":
        return parts(checkpoint, "mean")
    moved = parts(checkpoint, "optimizer")
    points = {re.sub(r"/z\Z", "", name): z for name, z in moved.items() if name.endswith("/z")}
    return {name: tensors[name].lerp(z, 1 - 1 / facts["beta1"]) for name, z in points.items()}


def parts(checkpoint: Checkpoint, kind: str) -> dict[str, Tensor]:
    """The tensors of one kind, by the rest of their names."""
    return {
        name.removeprefix(f"{kind}/"): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(f"{kind}/")
    }
