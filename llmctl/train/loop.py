"""THE training loop: every stage that learns drives its objective through `fit`, and gradients are taken nowhere else.

Accumulation, clipping, schedules, mixed precision, validation, logging, checkpoints and exact resume are written once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmctl.errors import StageError
from llmctl.nn.counts import training_flops
from llmctl.nn.foreign_config import ForeignConfig
from llmctl.nn.transformer import Transformer
from llmctl.stage import Context
from llmctl.train.batches import Batch
from llmctl.train.checkpoint import Checkpoint, Checkpoints, require_space, same_tensors
from llmctl.train.data import Source
from llmctl.train.device import Compute
from llmctl.train.objectives import Objective
from llmctl.train.optimizers import Optimizers
from llmctl.train.params import TrainParams
from llmctl.train.schedule import lr_factor
from llmctl.train.throughput import Throughput, utilisation
from llmctl.train.validation import Validate


def fit(
    ctx: Context,
    model: Transformer,
    objective: Objective,
    source: Source,
    params: TrainParams,
    validate: Validate | None = None,
) -> dict[str, float]:
    """Train `model` in place and return its final numbers; `curves.jsonl` goes to the metrics output.

    Continues from the newest checkpoint in `ctx.resume_dir` that was made with the same parameters; on CPU the weights
    are then bit-identical to those of an uninterrupted run. The model comes back on the CPU in evaluation mode.

    Raises StageError for a loss that is not finite, a step without anything to learn, or a full disk; TempFail after a
    checkpoint when the run was asked to stop.
    """
    compute = Compute.of(params)
    total = params.max_steps or max(1, math.ceil(params.epochs * source.steps_per_epoch))
    model.backend = params.attention
    model.set_dropout(params.dropout)
    with compute.limit_threads():
        run = _Run(ctx, model, objective, source, params, validate, compute, total)
        with _compiled(model, params.compile):
            run.train()
        values = run.finish()
    model.backend = "sdpa"  # it stays with the training: the finished model runs anywhere
    model.to("cpu").eval()
    return values


RECENT = 10
"""Steps whose mean is the final `loss.train`."""


class _Run:
    """The state of one training run; `step` counts finished updates."""

    def __init__(
        self,
        ctx: Context,
        model: Transformer,
        objective: Objective,
        source: Source,
        params: TrainParams,
        validate: Validate | None,
        compute: Compute,
        total: int,
    ) -> None:
        self.ctx, self.objective, self.source, self.params = ctx, objective, source, params
        self.validate, self.compute, self.total = validate, compute, total
        self.model = model.to(compute.device).train()
        self.optimizers = Optimizers(model, params)
        self.checkpoints = Checkpoints(ctx.resume_dir / "ckpt")
        self.throughput = Throughput()
        self.step = 0
        self.tokens = 0
        self.targets = 0
        self.curve: list[dict[str, float]] = []
        self.sums: dict[str, float] = {}
        """Loss, metrics and weight since the last point of the curve."""
        self.recent: list[dict[str, float]] = []
        """The same of each of the last steps: the final numbers must not depend on how often points are logged."""
        torch.manual_seed(params.seed)

    def train(self) -> None:
        """From the newest checkpoint, or the start, to the last step."""
        resumed = self.resume()
        self.checkpoints.forget_after(self.step, self.total)
        if not resumed:
            self.first_checkpoint()
        every = self.params.save_every
        self.throughput.skip()
        while self.step < self.total:
            if self.ctx.should_stop():
                self.save()
                raise self.ctx.stopped(self.step)
            self.update()
            last = self.step == self.total
            if last or self.step % self.params.log_every == 0:
                self.log()
            if last or (self.params.eval_every and self.step % self.params.eval_every == 0):
                self.measure()
            if last or (every and self.step % every == 0):
                self.save()

    def update(self) -> None:
        """One optimizer step: gradients of the step's mean loss, clipped, applied."""
        batches = self.source.micro_batches(self.step)
        weight = sum(self.objective.weight(batch) for batch in batches)
        if weight == 0:
            raise StageError(f"step {self.step + 1} has nothing to learn from", hint="check the loss mask of the data")
        sums = self.accumulate(batches, weight)
        limit = self.params.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        loss = sums["loss"] / weight
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise StageError(
                f"the loss is {loss:g} and the gradient norm {norm:g} at step {self.step + 1}",
                hint="lower lr, raise warmup_steps, or set clip",
            )
        self.optimizers.step(self.factor(self.step))
        self.step += 1
        self.throughput.add(sum(batch.size for batch in batches))
        self.tokens += sum(batch.size for batch in batches)
        self.targets += sum(len(batch.targets) for batch in batches)
        self.recent = [*self.recent[1 - RECENT :], {**sums, "weight": weight}]
        for name, value in {**sums, "weight": weight, "grad_norm": norm * weight}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.ctx.progress(self.step, self.total, loss=loss, tokens_per_s=self.throughput.overall())

    def accumulate(self, batches: list[Batch], weight: int) -> dict[str, float]:
        """Add up the gradients of all micro-batches over the weight of all of them together, so that they are those of
        one big batch however it was split. Returns the summed loss and metrics."""
        sums: dict[str, Tensor] = {}
        for batch in (batch.to(self.compute.device) for batch in batches):
            with self.compute.autocast():
                loss, further = self.objective.loss(self.model, batch)
            (loss / weight).backward()  # type: ignore[no-untyped-call]  # torch
            for name, value in {"loss": loss, **further}.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        return {name: float(value) for name, value in sums.items()}

    def factor(self, step: int, total: int | None = None) -> float:
        """The schedule's share of the peak rates at `step`, counted from 0, in a run of `total` steps."""
        params = self.params
        return lr_factor(
            step,
            total=total or self.total,
            warmup=params.warmup_steps,
            schedule=params.schedule,
            min_ratio=params.min_lr_ratio,
            decay_share=params.decay_share,
        )

    def log(self) -> None:
        """A point of the curves: means since the last one."""
        weight = self.sums.pop("weight")
        means = {name: value / weight for name, value in self.sums.items()}
        self.sums = {}
        lr = self.params.lr * self.factor(self.step - 1)
        self.record({**means, "lr": lr, "tokens_per_s": self.throughput.rate()})

    def measure(self) -> None:
        """A validation point of the curves."""
        if self.validate is None:
            return
        self.model.eval()
        self.record(self.validate(self.model, self.compute))
        self.model.train()
        self.throughput.skip()

    def record(self, row: dict[str, float]) -> None:
        """Append `row` to the curves and send it out."""
        self.curve.append({"step": self.step, **row})
        for name, value in row.items():
            self.ctx.metric(name, value, self.step)

    def finish(self) -> dict[str, float]:
        """Write the curves and sum up: means over the last steps, the last validation, sizes and speed."""
        self.checkpoints.finish(self.step)
        if self.ctx.wants("metrics"):
            lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in self.curve)
            (self.ctx.output("metrics") / "curves.jsonl").write_text(lines, encoding="utf-8")
        values: dict[str, float] = {}
        weight = sum(step["weight"] for step in self.recent)
        for name in self.recent[-1] if self.recent else ():
            if name != "weight":
                values[f"{name}.train"] = sum(step[name] for step in self.recent) / weight
        for row in self.curve:
            values |= {name: value for name, value in row.items() if "." in name}
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        values |= {"steps": self.step, "tokens": self.tokens, "targets": self.targets, "parameters": parameters}
        if self.throughput.tokens:  # none where only the end was left to do
            values["tokens_per_s"] = self.throughput.overall()
        return values | self.device_values()

    def device_values(self) -> dict[str, float]:
        """Peak memory, and utilisation of a GPU whose peak is known."""
        if self.compute.device.type != "cuda":
            return {}
        values = {"peak_memory_bytes": float(torch.cuda.max_memory_allocated(self.compute.device))}
        config: Any = self.model.config
        count = config.training_flops if isinstance(config, ForeignConfig) else partial(training_flops, config)
        flops = count(config.context) * self.throughput.overall()
        share = utilisation(flops, torch.cuda.get_device_name(self.compute.device))
        return values if share is None else {**values, "utilisation": share}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint: weights, optimizer state, random states."""
        found = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        found |= {f"optimizer/{name}": tensor for name, tensor in self.optimizers.state().items()}
        found["random/cpu"] = torch.get_rng_state()
        if self.compute.device.type == "cuda":
            found["random/cuda"] = torch.cuda.get_rng_state(self.compute.device)
        return found

    def save(self) -> None:
        """Write a checkpoint of the finished steps."""
        values = {
            "facts": self.params.resume_facts(),
            "total": self.total,
            "tokens": self.tokens,
            "targets": self.targets,
            "curve": self.curve,
            "sums": self.sums,
            "recent": self.recent,
        }
        self.checkpoints.save(self.step, self.tensors(), values)
        self.ctx.checkpointed(self.step)
        self.throughput.skip()

    def first_checkpoint(self) -> None:
        """Save and read back before the first step: a run must not find out at its end that it cannot save."""
        size = sum(parameter.nbytes for parameter in self.model.parameters())
        self.ctx.resume_dir.mkdir(parents=True, exist_ok=True)
        # Weights and two moments, in as many checkpoints as exist at once.
        require_space(self.ctx.resume_dir, 3 * size * (self.checkpoints.keep + 1), "training")
        self.save()
        if not same_tensors(self.tensors(), self.checkpoints.load(self.step).tensors):
            raise StageError(f"a checkpoint in {self.checkpoints.directory} reads back differently from what was saved")

    def resume(self) -> bool:
        """Continue from the newest checkpoint that is whole and fits; False if there is none."""
        for step in self.checkpoints.newest(self.total):
            try:
                found = self.checkpoints.load(step)
            except ValueError as error:
                self.ctx.warn(f"{error}; trying the one before")
                continue
            if found.values.get("facts") != json.loads(json.dumps(self.params.resume_facts())):
                self.ctx.warn(f"the checkpoint of step {step} was made with other parameters; starting anew")
                return False
            self.restore(found)
            return True
        return False

    def restore(self, found: Checkpoint) -> None:
        """Take over everything `save` wrote."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
        for full, tensor in found.tensors.items():
            kind, _, name = full.partition("/")
            parts[kind][name] = tensor
        self.model.load_state_dict(parts["model"], strict=True)
        self.optimizers.load(parts["optimizer"])
        torch.set_rng_state(parts["random"]["cpu"])
        if "cuda" in parts["random"] and self.compute.device.type == "cuda":
            torch.cuda.set_rng_state(parts["random"]["cuda"], self.compute.device)
        values: dict[str, Any] = found.values
        self.step, self.tokens, self.targets = found.step, values["tokens"], values["targets"]
        self.curve, self.sums, self.recent = values["curve"], values["sums"], values["recent"]
        if self.step:
            self.ctx.log(f"continuing from step {self.step} of {self.total}")
        self.compare_schedule(values["total"])

    def compare_schedule(self, planned: int) -> None:
        """Warn if the rates so far, of a run of `planned` steps, are not those that one of this length has."""
        past = (0, self.step - 1) if self.step else ()
        if any(self.factor(step, planned) != self.factor(step, self.total) for step in past):
            share = self.factor(self.step - 1, planned)
            self.ctx.warn(
                f"its run was planned for {planned} steps, the rate was {share:.0%} of its peak at step {self.step}; "
                f"from here on the schedule is that of {self.total}, the result not that of an uninterrupted run"
            )


@contextmanager
def _compiled(model: Transformer, wanted: bool) -> Iterator[None]:
    """With `wanted`, the model's states are computed by torch.compile inside."""
    if not wanted:
        yield
        return
    model.hidden = torch.compile(model.hidden)  # type: ignore[method-assign]  # undone below
    try:
        yield
    finally:
        del model.hidden
