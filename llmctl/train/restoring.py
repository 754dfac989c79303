"""What a checkpoint holds of a run, and how a run takes it over: at the start, at a rewind, after a trial."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmctl.errors import StageError
from llmctl.train.checkpoint import Checkpoint, require_space
from llmctl.train.parts import placed
from llmctl.train.saving import load_parts, same_parts

if TYPE_CHECKING:
    from llmctl.train.loop import _Run


def rewind(run: _Run) -> None:
    """Weights and optimizer of the last checkpoint that `save_every` planned; the data goes on."""
    run.saver.wait()
    for step in anchors(run):
        try:
            restore_tensors(run, load(run, step))
        except ValueError as error:
            run.ctx.warn(f"{error}; trying the one before")
            continue
        run.ctx.warn(f"step {run.step} took the weights back to those of step {step}")
        return
    raise StageError(f"step {run.step} is not finite or a spike, and no checkpoint is left to go back to")


def anchors(run: _Run) -> list[int]:
    """Where a rewind leads, the newest first: not to what an interruption left, on which no result may depend."""
    every = run.params.save_every
    return [step for step in run.checkpoints.newest(run.step) if (step % every if every else step) == 0]


def tensors(run: _Run) -> dict[str, Tensor]:
    """The tensors of a checkpoint, as this rank holds them: weights, optimizer state, random states."""
    found = {f"model/{name}": tensor.detach() for name, tensor in run.model.state_dict().items()}
    found |= {f"optimizer/{name}": tensor.detach() for name, tensor in run.optimizers.state().items()}
    found |= {f"mean/{name}": tensor.detach() for name, tensor in run.averages.state().items()}
    found[random_name(run, "cpu")] = torch.get_rng_state()
    if run.compute.device.type == "cuda":
        found[random_name(run, "cuda")] = torch.cuda.get_rng_state(run.compute.device)
    return found


def random_name(run: _Run, kind: str) -> str:
    """That of this rank's random state: every share of the batch draws its own dropout."""
    return f"random/{kind}.{run.ranks.data_rank}" if run.ranks.data_rank else f"random/{kind}"


def save(run: _Run) -> None:
    """Start to write a checkpoint of the finished steps; StageError if one of them was not finite."""
    run.readings.look(wait=True)
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
    run.saver.start(run.step, tensors(run), json.loads(json.dumps(values)), pinned)
    run.throughput.skip()


def first_checkpoint(run: _Run) -> None:
    """Save and read back before the first step: a run must not find out at its end that it cannot save."""
    size = sum(parameter.nbytes for parameter in run.model.parameters())
    run.ctx.resume_dir.mkdir(parents=True, exist_ok=True)
    # Weights, two moments and a mean, in as many checkpoints as exist at once.
    copies = (4 if run.params.ema else 3) * (run.checkpoints.keep + 1 + run.guard.rewinds)
    require_space(run.ctx.resume_dir, copies * size, "training")
    save(run)
    run.saver.wait()
    if not same_parts(tensors(run), load(run, run.step).tensors):
        raise StageError(f"a checkpoint in {run.checkpoints.directory} reads back differently from what was saved")


def load(run: _Run, step: int) -> Checkpoint:
    """Read one checkpoint, what several ranks have written as parted as this rank holds it; ValueError if damaged."""
    if run.checkpoints.is_whole(step):
        return run.checkpoints.load(step)
    values, held = run.checkpoints.values(step), run.model.state_dict()

    def like(name: str) -> Tensor | None:
        kind, _, rest = name.partition("/")
        return held.get(rest.rpartition("/")[0] if kind == "optimizer" else rest)

    return Checkpoint(step, load_parts(run.checkpoints.path(step), like, run.ranks.mesh is None), values)


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
    restore_random(run, found)


def restore_random(run: _Run, found: Checkpoint) -> None:
    """This rank's random states; one that the checkpoint's run did not have begins with numbers of its own."""
    kinds = ["cpu", "cuda"] if run.compute.device.type == "cuda" else ["cpu"]
    states = [found.tensors.get(random_name(run, kind)) for kind in kinds]
    if states[0] is None:
        torch.manual_seed(hash((run.params.seed, run.ranks.data_rank, found.step)))
        return
    torch.set_rng_state(states[0])
    if len(states) > 1 and states[1] is not None:
        torch.cuda.set_rng_state(states[1], run.compute.device)


def compare_schedule(run: _Run, planned: int) -> None:
    """Warn if the rates so far, of a run of `planned` steps, are not those that one of this length has."""
    past = (0, run.step - 1) if run.step else ()
    if any(run.factor(step, planned) != run.factor(step, run.total) for step in past):
        share = run.factor(run.step - 1, planned)
        run.ctx.warn(
            f"its run was planned for {planned} steps, the rate was {share:.0%} of its peak at step {run.step}; "
            f"from here on the schedule is that of {run.total}, the result not that of an uninterrupted run"
        )
