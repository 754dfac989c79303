"""THE training loop: every stage that learns drives its objective through `fit`, and gradients are taken nowhere else.

Accumulation, clipping, schedules, mixed precision, validation, logging, checkpoints and exact resume are written once.
The host never waits for the device between two points of the curves, unless a guard has to judge each step.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmctl.errors import MachineError, StageError
from llmctl.launch.heartbeats import Heartbeat
from llmctl.nn.transformer import Transformer
from llmctl.stage import Context, Helped, muted
from llmctl.train import restoring
from llmctl.train.averages import Averages
from llmctl.train.batches import Batch
from llmctl.train.checkpoint import Checkpoints
from llmctl.train.compilation import compiled_blocks
from llmctl.train.data import Source
from llmctl.train.device import Compute, LossScale
from llmctl.train.display import Display, used
from llmctl.train.fp8 import fp8_blocks
from llmctl.train.guards import Guard
from llmctl.train.heap import keep_freed
from llmctl.train.kernels import KernelWatch
from llmctl.train.memory import HINT
from llmctl.train.objectives import Objective, WritingObjective
from llmctl.train.optimizers import Optimizers
from llmctl.train.params import TrainParams
from llmctl.train.prefetch import Prefetch
from llmctl.train.ranks import ALONE, Ranks, joined
from llmctl.train.readings import Reading, Readings
from llmctl.train.recompute import recomputed
from llmctl.train.schedule import decay_factor, lr_factor, momentum_at
from llmctl.train.spread import Spread
from llmctl.train.throughput import Throughput
from llmctl.train.trial import settle
from llmctl.train.validation import Validate
from llmctl.train.zeros import Zeros, require_zeros


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

    With `params.parallel` every rank calls this with the same arguments, but for `ctx`, of which ranks above 0 use
    nothing that writes or speaks. Rank 0 returns; the others raise `Helped` when their part is done.

    Raises StageError for a loss that is not finite, a step without anything to learn, or a full disk; TempFail after a
    checkpoint when the run was asked to stop.
    """
    compute = Compute.of(params)
    if compute.device.type == "cpu":
        keep_freed()
    total = params.max_steps or max(1, math.ceil(params.epochs * source.steps_per_epoch))
    if any(parameter.dtype in HALVES for parameter in model.parameters()):
        model.float()  # such weights stall: an update below their last digit is lost
    if params.keep_zeros:
        require_zeros(model)
    with joined(params.parallel, compute.device) as ranks:
        # The model that was given stays as it is until the end.
        trained = copy.deepcopy(model) if params.parallel.changes else model
        with _prepared(trained, params, compute):
            heard = ctx if ranks.main else muted(ctx)
            run = _Run(heard, trained, objective, source, params, validate, compute, total, ranks)
            try:
                run.train()
            except torch.OutOfMemoryError as error:
                raise MachineError(f"out of memory at step {run.step + 1}: {error}", hint=HINT) from error
            finally:
                run.prefetch.close()
                run.heartbeat.close()
                run.checkpoints.close()
            values = run.finish()
        run.spread.give_back(model)
    if not ranks.main:
        raise Helped
    model.to("cpu").eval()
    return values


@contextmanager
def _prepared(model: Transformer, params: TrainParams, compute: Compute) -> Iterator[None]:
    """The model computes as `params` say inside; the finished one runs anywhere."""
    model.set_dropout(params.dropout)
    model.backend, model.loss_chunk = params.attention, params.loss_chunk
    # Compiled blocks compute again what is cheap by themselves.
    mode = "none" if params.compile and params.recompute == "selective" else params.recompute
    with ExitStack() as stack:
        stack.enter_context(compute.limit_threads())
        stack.enter_context(recomputed(model, mode, params.dropout))
        stack.enter_context(fp8_blocks(model, compute.precision == "fp8"))
        stack.enter_context(compiled_blocks(model, params.compile))
        yield
    model.backend, model.loss_chunk = "sdpa", 0


HALVES = (torch.bfloat16, torch.float16)
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
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.ctx, self.objective, self.source, self.params = ctx, objective, source, params
        self.validate, self.compute, self.total = validate, compute, total
        self.spread = Spread(model, ranks, compute, objective)
        self.model = self.spread.model.train()
        self.optimizers = Optimizers(self.model, params, ranks)
        self.averages = Averages(self.model, self.optimizers, params.ema)
        self.zeros = Zeros(self.model, params.keep_zeros)
        self.loss_scale = LossScale() if compute.precision == "fp16" else None
        self.guard = Guard(params, scaled=self.loss_scale is not None)
        self.readings = Readings(self.take)
        self.prefetch = Prefetch(source, params.prefetch, compute.device, ranks.data_rank, ranks.data_ranks)
        self.checkpoints = Checkpoints(ctx.resume_dir / "ckpt", written=ctx.checkpointed)
        self.throughput = Throughput()
        self.heartbeat = Heartbeat(ctx.resume_dir, ranks.rank, stage=ctx.stage)
        self.step = 0
        self.tokens = 0
        self.targets = 0
        self.curve: list[dict[str, float]] = []
        self.loss = self.norm = math.nan
        """Loss and gradient norm of the last step whose numbers are known."""
        self.display = Display()
        self.kernels = KernelWatch(params)
        self.sums: dict[str, float] = {}
        """Loss, metrics and weight since the last point of the curve."""
        self.recent: list[dict[str, float]] = []
        """The same of each of the last steps: the final numbers must not depend on how often points are logged."""
        torch.manual_seed(params.seed + ranks.stream)  # dropout differs where the data do

    def train(self) -> None:
        """From the newest checkpoint, or the start, to the last step."""
        for note in self.optimizers.rates.notes:
            self.ctx.log(note)
        if self.spread.pipeline is not None:
            self.ctx.log(self.spread.pipeline.describe(self.params.micro_batches))
        resumed = restoring.resume(self)
        self.ranks.wait()  # all have read what is removed now
        if self.ranks.main:
            self.checkpoints.forget_after(self.step, self.total)
        if not resumed:
            restoring.first_checkpoint(self)
        if self.step < self.total and (self.params.micro_batch == "auto" or self.compute.device.type == "cuda"):
            settle(self)
        every = self.params.save_every
        self.throughput.skip()
        while self.step < self.total:
            asked = self.ranks.most(2 if self.ctx.should_stop() else int(self.ctx.should_save()))
            if asked:
                restoring.save(self)
            if asked == 2:
                self.checkpoints.wait()
                raise self.ctx.stopped(self.step)
            self.update()
            self.checkpoints.poll()
            last = self.step == self.total
            if last or self.step % self.params.log_every == 0:
                self.log()
            if last or (self.params.eval_every and self.step % self.params.eval_every == 0):
                self.measure()
            if last or (every and self.step % every == 0):
                self.heartbeat.enter("checkpoint", self.step)
                restoring.save(self)
        self.checkpoints.wait()  # what goes wrong with the last one is an error while those before are still there

    def update(self) -> None:
        """One optimizer step: gradients of the step's mean loss, clipped, judged, applied."""
        self.heartbeat.enter("data", self.step + 1)
        batches = self.spread.shares(self.written(self.prefetch.take(self.step)))
        self.heartbeat.enter("gradients", self.step + 1)
        weight, size, targets = self.counted(batches)
        if weight == 0:
            raise StageError(f"step {self.step + 1} has nothing to learn from", hint="check the loss mask of the data")
        sums = self.ranks.summed(self.accumulate(batches, weight))
        if self.kernels.news():
            self.ctx.log(self.kernels.describe())
            self.ctx.report({"attention.kernel": ", ".join(self.kernels.kernels)})
        reading = Reading(self.step, weight, {**sums, "grad_norm": self.clip().double() * weight})
        # On the CPU the numbers are there, and the weights are spared; a GPU is not waited for unless it must be.
        verdict = self.judge(reading) if self.guard.before or reading.at_hand else "take"
        self.heartbeat.enter("optimizer", self.step + 1)
        if verdict == "take":
            self.optimizers.step(self.factor(self.step), *self.pace(self.step))
            self.zeros.keep()
            self.averages.update(self.step)
        self.optimizers.drop_gradients()
        self.step += 1
        self.throughput.add(size)
        self.tokens += size
        self.targets += targets
        if verdict == "take":
            self.readings.add(reading)
        elif verdict == "rewind":
            restoring.rewind(self)
        self.ctx.progress(self.step, self.total, **self.display.fields(self))

    def written(self, batches: list[Batch]) -> list[Batch]:
        """The batches that are learned from, of an objective whose model writes them."""
        objective = self.objective
        if not isinstance(objective, WritingObjective):
            return batches
        self.heartbeat.enter("writing", self.step + 1)
        return self.spread.look(lambda model: objective.write(model, self.step, batches))

    def counted(self, batches: list[Batch]) -> tuple[int, int, int]:
        """Weight, tokens and targets of a step on all ranks; labels are balanced by all of them together."""
        weight, size, targets, labels = self.ranks.counted(
            sum(self.objective.weight(batch) for batch in batches),
            sum(batch.size for batch in batches),
            sum(len(batch.targets) for batch in batches),
            sum(len(batch.labels) for batch in batches if batch.labels is not None),
        )
        if labels and self.ranks.data_ranks > 1:
            batches[:] = [replace(batch, balance=targets / labels) for batch in batches]
        return weight, size, targets

    def accumulate(self, batches: list[Batch], weight: int) -> dict[str, Tensor]:
        """Add up the gradients of all micro-batches over the weight of all of them together, so that they are those of
        one big batch however it was split. Returns the summed loss and metrics of this rank's share, on the device."""
        sums: dict[str, Tensor] = {}
        # The ranks' gradients are averaged: those of a sum are wanted.
        factor = self.ranks.token_ranks * (1.0 if self.loss_scale is None else self.loss_scale.scale) / weight
        if self.spread.pipeline is not None:
            moved = [batch.to(self.compute.device) for batch in batches]
            with self.kernels.forward():
                sums = self.spread.pipeline.gradients(self.objective, moved, factor)
            self.spread.reduce()
            return sums
        for number, batch in enumerate((batch.to(self.compute.device) for batch in batches), 1):
            with self.spread.accumulating(last=number == len(batches)):
                with self.compute.autocast(), self.kernels.forward():
                    loss, further = self.spread(partial(self.objective.loss, batch=batch))
                (loss * factor).backward()  # type: ignore[no-untyped-call]  # torch
            for name, value in {"loss": loss, **further}.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        self.spread.reduce()
        return sums

    def clip(self) -> Tensor:
        """Scale the gradients back, then down to the largest norm allowed; returns their norm before that."""
        if self.loss_scale is not None:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(self.loss_scale.scale)
        return self.spread.clip(self.params.clip)

    def judge(self, reading: Reading) -> str:
        """What the guard says of a step, whose numbers are waited for."""
        self.readings.look(wait=True)
        values = reading.read()
        verdict = self.guard.judge(reading.step, values["loss"] / reading.weight, values["grad_norm"] / reading.weight)
        if self.loss_scale is not None:
            self.loss_scale.update(verdict == "overflow")
        return verdict

    def take(self, reading: Reading, sums: dict[str, float]) -> None:
        """Add the numbers of a step that was taken to those of the curves; StageError if they are not finite."""
        self.loss, self.norm = sums["loss"] / reading.weight, sums["grad_norm"] / reading.weight
        if not self.guard.before and not reading.at_hand:
            self.guard.judge(reading.step, self.loss, self.norm)
        values = {**sums, "weight": float(reading.weight)}
        self.recent = [*self.recent[1 - RECENT :], {name: values[name] for name in values if name != "grad_norm"}]
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

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

    def pace(self, step: int, total: int | None = None) -> tuple[float, float]:
        """Momentum, and the share of the weight decay, at `step` of a run of `total` steps."""
        params, total = self.params, total or self.total
        momentum = momentum_at(
            step,
            total=total,
            peak=params.momentum,
            start=params.momentum_start,
            warmup=params.momentum_warmup,
            end=params.momentum_end,
            decay_share=params.decay_share,
        )
        return momentum, decay_factor(step, total=total, schedule=params.decay_schedule)

    def log(self) -> None:
        """A point of the curves: means since the last one."""
        self.readings.look(wait=True)
        weight = self.sums.pop("weight", 0)
        means = {name: value / weight for name, value in self.sums.items()}
        self.sums = {}
        lr = self.optimizers.rates.of["matrix"] * self.factor(self.step - 1)
        counts = {name: float(count) for name, count in self.guard.counts.items()}
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.scale}
        self.record({**means, **counts, **scale, "lr": lr, "tokens_per_s": self.throughput.rate()})

    def measure(self) -> None:
        """A validation point of the curves."""
        if self.validate is None:
            return
        self.heartbeat.enter("validation", self.step)
        self.readings.look(wait=True)
        self.record(self.validated(self.validate))
        self.throughput.skip()

    def validated(self, validate: Validate) -> dict[str, float]:
        """What `validate` says of the model as it would be saved now."""
        self.model.eval()
        with self.averages.swapped():
            found = self.spread.look(lambda model: validate(model, self.compute))
        self.model.train()
        return found

    def record(self, row: dict[str, float]) -> None:
        """Append `row` to the curves and send it out."""
        self.curve.append({"step": self.step, **row})
        for name, value in row.items():
            self.ctx.metric(name, value, self.step)

    def finish(self) -> dict[str, float]:
        """Write the curves and sum up: means over the last steps, the last validation, sizes and speed."""
        if self.ranks.main:
            self.checkpoints.finish(self.step)
        self.averages.finish()
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
        parameters = self.spread.size
        values |= {"steps": self.step, "tokens": self.tokens, "targets": self.targets, "parameters": parameters}
        if self.throughput.tokens:  # none where only the end was left to do
            values["tokens_per_s"] = self.throughput.overall()
        values |= {name: float(count) for name, count in self.guard.counts.items()}
        if self.params.micro_batch == "auto":
            values["micro_batch"] = self.source.at_once
        return values | self.device_values()

    def device_values(self) -> dict[str, float]:
        """Peak memory, and utilisation of a GPU whose peak is known."""
        if self.compute.device.type != "cuda":
            return {}
        values = {"peak_memory_bytes": float(torch.cuda.max_memory_allocated(self.compute.device))}
        share = used(self)
        return values if share is None else {**values, "utilisation": share}
