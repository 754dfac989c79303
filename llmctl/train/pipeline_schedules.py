"""Micro-batches on their way through the stages of a model, in torch's schedules: GPipe (1811.06965), 1F1B and
interleaved 1F1B (2104.04473).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmctl.errors import UsageError
from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch
from llmctl.train.objectives import CausalLM, MaskedLM, Objective
from llmctl.train.padding import alike
from llmctl.train.parallel import bubble_share, schedule_misfit
from llmctl.train.pipeline_cut import cut
from llmctl.train.pipeline_stages import Relay, Segment, require_stages

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

CLASSES = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B"}
"""torch's names of the schedules."""


class Pipeline:
    """The stages of `model` on the ranks of `group`, `virtual` per rank, and a step's gradients through all of them.

    `model` is left without what other ranks hold until `relay.reunite`. `autocast` is entered around each forward.
    Raises UsageError for a model or numbers that do not fit.
    """

    def __init__(
        self,
        model: Transformer,
        group: dist.ProcessGroup,
        schedule: str = "1f1b",
        virtual: int = 1,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.group, self.schedule, self.virtual, self.autocast = group, schedule, virtual, autocast
        require_stages(model)
        self.stages = cut(model.config, group.size() * virtual)
        self.relay = Relay(model, self.stages, group)
        self._built: tuple[tuple[int, ...], Any] | None = None
        """The last schedule and what it was built for: micro-batches, rows, tokens."""
        self._batches: list[Batch] = []
        self._objective: Objective = CausalLM()
        self._factor = 1.0
        self._sums: dict[str, Tensor] = {}
        self._names: list[str] | None = None

    @property
    def device(self) -> torch.device:
        """Where the stages of this rank are."""
        return next(self.relay.parameters()).device

    def describe(self, micro_batches: int) -> str:
        """The cut and the schedule in words, with the share of time that is waited away."""
        share = bubble_share(self.group.size(), micro_batches, self.virtual)
        ends = [(str(stage.start), str(stage.stop - 1)) for stage in self.stages]
        blocks = ", ".join(first if first == last else f"{first}-{last}" for first, last in ends)
        return (
            f"pipeline of {len(self.stages)} stages on {self.group.size()} processes, blocks {blocks}; {self.schedule} "
            f"with {micro_batches} micro-batches: bubble {share:.1%} of the time that is computed"
        )

    def gradients(self, objective: Objective, batches: list[Batch], factor: float) -> dict[str, Tensor]:
        """Add `factor` times the gradient of the objective's sum over `batches` to the parameters held here.

        Every rank of the group gives the same batches. Returns the summed loss and metrics, on every rank.
        """
        if not isinstance(objective, CausalLM | MaskedLM):
            raise UsageError(
                f"{type(objective).__name__} cannot be learned in pipeline stages", hint="set parallel.pp to 1"
            )
        causal = self.relay.config.traits.kind != "encoder"
        self._batches = alike(batches, causal)
        self._objective, self._factor, self._sums = objective, factor, {}
        rows, width = self._batches[0].tokens.shape
        schedule = self._schedule(len(batches), rows, width)
        numbers = torch.arange(len(batches))
        first, last = 0 in self.relay.parts, self.relay.count - 1 in self.relay.parts
        schedule.step(
            *((numbers,) if first else ()),
            part=numbers,
            **({"target": numbers} if last else {}),
            return_outputs=False,
        )
        self.relay.join_shared()
        return self._everywhere(last)

    def average(self, group: dist.ProcessGroup) -> None:
        """Average the gradients held here over `group`: the same stages, with other tokens."""
        works, parameters = [], list(self.relay.parameters())
        # One that nobody has used stays without a gradient: with zeros the optimizer would let it decay.
        used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
        for parameter, wanted in zip(parameters, used.tolist(), strict=True):
            if not wanted:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            works.append(dist.all_reduce(parameter.grad, dist.ReduceOp.AVG, group=group, async_op=True))
        for work in works:
            work.wait()

    def clip(self, largest: float) -> Tensor:
        """Scale the gradients of all stages down to the norm `largest` over all of them; returns that norm before."""
        norms = [parameter.grad for parameter in self.relay.own() if parameter.grad is not None]
        square = nn.utils.get_total_norm(norms).to(self.device).square()
        dist.all_reduce(square, group=self.group)
        total = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.relay.parameters(), largest, total)
        return total

    def _schedule(self, count: int, rows: int, width: int) -> Any:
        """torch's schedule for micro-batches of one shape; it holds their buffers, so only the last is kept."""
        # Not at the top: the package brings the compiler along, which sets a variable of the environment.
        from torch.distributed import pipelining

        key = (count, rows, width)
        if self._built is None or self._built[0] != key:
            if reason := schedule_misfit(self.schedule, self.group.size(), count):
                raise UsageError(reason)
            stages = [self._stage(index, segment, rows, width) for index, segment in self.relay.parts.items()]
            # The loss is a sum over the weight of the whole step: nothing is left to scale.
            named: dict[str, Any] = {"n_microbatches": count, "loss_fn": self._loss, "scale_grads": False}
            made: Any = getattr(pipelining, CLASSES[self.schedule])
            self._built = key, made(stages if self.schedule == "interleaved" else stages[0], **named)
        return self._built[1]

    def _stage(self, index: int, segment: Segment, rows: int, width: int) -> PipelineStage:
        from torch.distributed.pipelining import PipelineStage

        dtype = next(self.relay.parameters()).dtype
        states = torch.empty(rows, width, segment.config.dim, dtype=dtype, device="meta", requires_grad=True)
        # Shapes are given: to find them out, torch would run the first micro-batch once more.
        given = torch.zeros(1, dtype=torch.int64) if index == 0 else states
        runner = _Runner(self, segment)
        return PipelineStage(runner, index, self.relay.count, self.device, given, states, group=self.group)

    def run(self, segment: Segment, given: Tensor, part: int) -> Tensor:
        """States `(B, T, D)` behind `segment` for micro-batch number `part`."""
        batch = self._batches[part]
        segment.received = None if segment.stages[0].first else given
        further = {name: getattr(batch, name) for name in ("segments", "prefix")}
        with self.autocast():
            states = segment.hidden(
                batch.tokens,
                batch.positions,
                batch.documents,
                **{name: value for name, value in further.items() if value is not None},
            )
        segment.received = None
        return states.to(next(self.relay.parameters()).dtype)

    def _loss(self, states: Tensor, number: Tensor) -> Tensor:
        last: Any = _Answer(self.relay.parts[self.relay.count - 1], states)
        with self.autocast():
            loss, further = self._objective.loss(last, self._batches[int(number)])
        for name, value in {"loss": loss, **further}.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        return loss * self._factor

    def _everywhere(self, last: bool) -> dict[str, Tensor]:
        """The sums of the last stage on every rank."""
        if self._names is None:
            box: list[Any] = [sorted(self._sums)]
            dist.broadcast_object_list(box, group=self.group, group_src=(self.relay.count - 1) % self.group.size())
            self._names = box[0]
        names = self._names
        values = (
            torch.stack([self._sums[name].double() for name in names])
            if last
            else torch.empty(len(names), dtype=torch.float64, device=self.device)
        )
        dist.broadcast(values, group=self.group, group_src=(self.relay.count - 1) % self.group.size())
        return dict(zip(names, values.unbind(), strict=True))


class _Runner(nn.Module):
    """What torch's stage calls."""

    def __init__(self, pipeline: Pipeline, segment: Segment) -> None:
        super().__init__()
        self.segment, self._pipeline = segment, [pipeline]

    def forward(self, given: Tensor, part: Tensor) -> Tensor:
        """`given`: states of the stage before, or of the first a number. `part (1,)`: number of the micro-batch."""
        return self._pipeline[0].run(self.segment, given, int(part))


class _Answer:
    """The last stage with its states computed: to an objective, a model."""

    def __init__(self, segment: Segment, states: Tensor) -> None:
        self._segment, self._states = segment, states

    def hidden(self, *given: Any, **named: Any) -> Tensor:
        """The states, whatever is asked."""
        return self._states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._segment, name)
