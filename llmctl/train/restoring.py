"""What a checkpoint holds of a run, and how a run takes it over: at the start, at a rewind, after a trial."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmctl.errors import StageError
from llmctl.train.checkpoint import Checkpoint, require_space, same_tensors
from llmctl.train.parts import gathered, placed

if TYPE_CHECKING:
    from llmctl.train.loop import _Run


def rewind(run: _Run) -> None:
    """Weights and optimizer of the last checkpoint that `save_every` planned; the data goes on."""
    for step in anchors(run):
        try:
            restore_tensors(run, load(run, step))
        except ValueError as error:
            run.ctx.warn(f"{error}; trying the one before")
            continue
        run.ctx.warn(f"step {run.step} took the weights back to those of step {step}")
        return
    raise StageError(
        f"step {run.step} is not finite or a spike, and no checkpoint is left to go back to",
        hint="lower lr, or set a smaller save_every",
    )


def anchors(run: _Run) -> list[int]:
    """Where a rewind leads, the newest first: not to what an interruption left, on which no result may depend."""
    run.checkpoints.wait()  # the last may still be on its way to the disk
    every = run.params.save_every
    return [step for step in run.checkpoints.newest(run.step) if (step % every if every else step) == 0]


def tensors(run: _Run) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as this rank has them: weights, optimizer state, random states."""
    found = {f"model/{name}": tensor for name, tensor in run.model.state_dict().items()}
    found |= {f"optimizer/{name}": tensor for name, tensor in run.optimizers.state().items()}
    found |= {f"mean/{name}": tensor for name, tensor in run.averages.state().items()}
    found[_random(run, "cpu")] = torch.get_rng_state()
    if run.compute.device.type == "cuda":
        found[_random(run, "cuda")] = torch.cuda.get_rng_state(run.compute.device)
    return {name: _summed(tensor) for name, tensor in found.items()}


def _random(run: _Run, device: str) -> str:
    """The name of a random state: ranks of the same stream draw the same numbers."""
    stream = run.ranks.stream
    return f"random/{device}-{stream}" if stream else f"random/{device}"


def _summed(tensor: Tensor) -> Tensor:
    """One of which each rank holds a summand cannot be written in parts: all of it."""
    partial = isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements)
    return gathered(tensor) if partial else tensor


def load(run: _Run, step: int) -> Checkpoint:
    """The checkpoint of `step`, of which each rank reads what it needs; ValueError if it is damaged."""
    shards = {name: tensor for name, tensor in run.model.state_dict().items() if isinstance(tensor, DTensor)}

    def like(full: str) -> Tensor | None:
        kind, _, name = full.partition("/")
        return shards.get(name.rpartition("/")[0] if kind == "optimizer" else name)

    return run.checkpoints.load(step, like, run.spread.holds)


def save(run: _Run) -> None:
    """Begin to write a checkpoint of the finished steps; StageError if one of them was not finite."""
    run.readings.look(wait=True)
    run.checkpoints.wait()
    values = {
        "facts": run.params.resume_facts(),
        "total": run.total,
        "tokens": run.tokens,
        "targets": run.targets,
        "curve": run.curve,
        "sums": run.sums,
        "recent": run.recent,
        "guard": run.guard.state(),
        "loss_scale": None if run.loss_scale is None else run.loss_scale.state(),
        "micro_batch": run.source.at_once,
    }
    pinned = anchors(run)[:1] if run.guard.rewinds else []
    run.checkpoints.save(run.step, tensors(run), values, pinned)
    run.throughput.skip()


def first_checkpoint(run: _Run) -> None:
    """Save and read back before the first step: a run must not find out at its end that it cannot save."""
    size = sum(parameter.nbytes for parameter in run.model.parameters())
    run.ctx.resume_dir.mkdir(parents=True, exist_ok=True)
    # Weights, two moments and a mean, in as many checkpoints as exist at once.
    copies = (4 if run.params.ema else 3) * (run.checkpoints.keep + 1 + run.guard.rewinds)
    require_space(run.ctx.resume_dir, copies * size, "training")
    save(run)
    read = load(run, run.step).tensors
    found = {name: tensor for name, tensor in tensors(run).items() if name in read}
    if not found or not same_tensors(found, {name: read[name] for name in found}):
        raise StageError(
            f"a checkpoint in {run.checkpoints.directory} reads back differently from what was saved",
            hint="this disk or file system cannot be trusted: use another store",
        )


def resume(run: _Run) -> bool:
    """Continue from the newest checkpoint that is whole and fits; False if there is none."""
    for step in run.checkpoints.newest(run.total):
        try:
            found = load(run, step)
        except ValueError as error:
            run.ctx.warn(f"{error}; trying the one before")
            continue
        if found.values.get("facts") != json.loads(json.dumps(run.params.resume_facts())):
            run.ctx.warn(f"the checkpoint of step {step} was made with other parameters; starting anew")
            return False
        restore(run, found)
        return True
    return False


def restore(run: _Run, found: Checkpoint) -> None:
    """Take over everything `save` wrote."""
    restore_tensors(run, found)
    values: dict[str, Any] = found.values
    run.step, run.tokens, run.targets = found.step, values["tokens"], values["targets"]
    run.curve, run.sums, run.recent = values["curve"], values["sums"], values["recent"]
    run.guard.load(values["guard"])
    if run.loss_scale is not None:
        run.loss_scale.load(values["loss_scale"])
    if run.step:
        run.ctx.log(f"continuing from step {run.step} of {run.total}")
    compare_schedule(run, values["total"])


def restore_tensors(run: _Run, found: Checkpoint) -> None:
    """Weights, optimizer state, means and random states of a checkpoint; pending gradients are dropped."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "mean": {}, "random": {}}
    for full, tensor in found.tensors.items():
        kind, _, name = full.partition("/")
        parts[kind][name] = tensor
    run.optimizers.drop_gradients()
    kept = run.model.state_dict()
    parts["model"] = {name: placed(tensor, kept[name]) for name, tensor in parts["model"].items()}
    run.model.load_state_dict(parts["model"], strict=True)
    run.optimizers.load(parts["optimizer"])
    run.averages.load(parts["mean"])
    # Of more shares than it was saved with, the further ones begin anew, and not with the numbers of the first step.
    torch.manual_seed(run.params.seed + run.ranks.stream + (found.step << 20))
    random = {f"random/{name}": state for name, state in parts["random"].items()}
    if (state := random.get(_random(run, "cpu"))) is not None:
        torch.set_rng_state(state)
    if run.compute.device.type == "cuda" and (state := random.get(_random(run, "cuda"))) is not None:
        torch.cuda.set_rng_state(state, run.compute.device)


def compare_schedule(run: _Run, planned: int) -> None:
    """Warn if rate, momentum and decay so far, of a run of `planned` steps, are not what one of this length has."""

    def at(step: int, total: int) -> tuple[float, ...]:
        return run.factor(step, total), *run.pace(step, total)

    past = (0, run.step - 1) if run.step else ()
    if any(at(step, planned) != at(step, run.total) for step in past):
        share = run.factor(run.step - 1, planned)
        run.ctx.warn(
            f"its run was planned for {planned} steps, the rate was {share:.0%} of its peak at step {run.step}; "
            f"from here on the schedule is that of {run.total}, the result not that of an uninterrupted run"
        )
