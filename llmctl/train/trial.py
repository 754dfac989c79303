"""The worst that a run will do, done once before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmctl.train.memory import kept_bytes, largest_fitting, require
from llmctl.train.parts import local
from llmctl.train.restoring import load, restore_tensors, tensors

if TYPE_CHECKING:
    from llmctl.train.loop import _Run


def settle(run: _Run) -> None:
    """The largest batch forward and backward, a step, validation, and the copy that a checkpoint is written from.

    With `micro_batch: auto` the batch is halved until that fits. Weights, optimizer and random states are put back as
    the newest checkpoint has them. torch.OutOfMemoryError or MachineError if it does not fit.
    """
    before = load(run, run.step)
    if run.params.micro_batch == "auto":
        first = before.values["micro_batch"]  # that of the run that is continued: another one sums in another order
        count = largest_fitting(first, lambda count: attempt(run, count), lambda: restore_tensors(run, before))
        run.source.at_once = count
        run.ctx.log(f"micro_batch auto: {count} of {run.source.batch_size} sequences at a time")
    else:
        attempt(run, run.source.at_once)
    restore_tensors(run, before)


def attempt(run: _Run, at_once: int) -> None:
    """The worst of a step with `at_once` sequences; torch.OutOfMemoryError if it does not fit."""
    if run.compute.device.type == "cpu":
        require(estimate(run, at_once))
    run.source.at_once = at_once
    batch = run.source.heaviest()
    # Stages hold several micro-batches at once.
    batches = [batch] * (1 if run.spread.pipeline is None else run.params.micro_batches)
    run.accumulate(run.spread.shares(batches), max(1, run.objective.weight(batch)))
    run.clip()
    run.optimizers.step(1.0)
    if run.validate is not None:
        run.validated(run.validate)
    for tensor in tensors(run).values():
        local(tensor).cpu()


def estimate(run: _Run, at_once: int) -> int:
    """Bytes that a step takes on top of the weights.

    Gradients and two moments, the activations of `at_once` of the longest sequences, and those of one more for what the
    backward pass makes of them.
    """
    run.source.at_once = 1
    batch = run.source.heaviest().to(run.compute.device)
    with run.compute.autocast():
        each = kept_bytes(lambda: run.objective.loss(run.model, batch)[0], run.model)
    return 3 * sum(parameter.nbytes for parameter in run.model.parameters()) + (at_once + 1) * each
