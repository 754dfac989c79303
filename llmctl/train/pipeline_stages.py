"""A transformer cut across its depth: which rank holds what, under the names that the whole model has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmctl.errors import UsageError
from llmctl.nn.attention import AttentionContext
from llmctl.nn.foreign import ForeignModel
from llmctl.nn.transformer import Transformer
from llmctl.train.pipeline_cut import EVERY, FIRST, KNOWN, LAST, Stage


def require_stages(model: nn.Module) -> None:
    """UsageError for a model that cannot be cut."""
    if isinstance(model, ForeignModel) or not isinstance(model, Transformer):
        raise UsageError("a model of another library cannot be cut into pipeline stages", hint="set parallel.pp to 1")
    if model.encoder is not None:
        raise UsageError("an encoder-decoder cannot be cut into pipeline stages", hint="set parallel.pp to 1")
    if model.config.traits.stream_weights or model.config.traits.backout or model.config.traits.smear:
        raise UsageError(
            f"a model of the family {model.config.arch} cannot be cut into pipeline stages: it reads states far "
            "behind or beside",
            hint="set parallel.pp to 1",
        )
    further = {name for name, child in model.named_children() if child is not None} - KNOWN
    further |= {name for name, _ in model.named_parameters(recurse=False)}
    if further:
        # A stage would compute something else than the whole model, silently.
        raise UsageError(
            f"a model with `{min(further)}` cannot be cut into pipeline stages", hint="set parallel.pp to 1"
        )


class Segment(Transformer):
    """The part of `whole` that `stages` hold, with its modules and their names; `state_dict` is a subset of its own.

    Of a single stage, `hidden` goes on from `received` instead of embedding tokens, unless it is the first; what its
    blocks share is computed by `relay`, the rank's whole part.
    """

    def __init__(self, whole: Transformer, stages: list[Stage], relay: Relay | None = None) -> None:
        nn.Module.__init__(self)
        self._relay = [relay]  # in a list: its modules are not this one's
        self.config, self.backend, self.loss_chunk = whole.config, whole.backend, whole.loss_chunk
        self.loss = whole.loss
        self.stages = stages
        self.received: Tensor | None = None
        """States `(B, T, D)` that the stage before has sent."""
        held = set[str]().union(*(stage.children(whole) for stage in stages))
        for name in (*FIRST, *EVERY, "encoder"):
            setattr(self, name, getattr(whole, name) if name in held else None)
        self.backout = self.smear = self.smear_gate = None  # see require_stages
        self.blocks = nn.ModuleList()
        for stage in stages:
            for layer in range(stage.start, stage.stop):
                self.blocks.add_module(str(layer), cast(Any, whole.blocks)[layer])
        for name in LAST:
            setattr(self, name, getattr(whole, name) if name in held else None)

    def embed(self, *given: Any, **named: Any) -> Tensor:
        """What enters the first of these blocks, `(B, T, D)`."""
        if self.stages[0].first:
            return super().embed(*given, **named)
        assert self.received is not None
        return self.received

    def attention_context(self, *given: Any, **named: Any) -> AttentionContext:
        """As the rank's whole part makes it."""
        relay = self._relay[0]
        return super().attention_context(*given, **named) if relay is None else relay.attention_context(*given, **named)


class Relay(Segment):
    """A rank's part of the model, which its optimizer and checkpoints know; in evaluation it stands for the whole.

    Under `torch.no_grad` every rank of `group` calls `hidden` alike: the stages run one after another on their ranks,
    and every rank gets the last one's states. `head` needs `answering` around it. Learning goes through
    `llmctl.train.pipeline_schedules.Pipeline`. What other ranks hold is taken out of the memory of `whole` until
    `reunite`.
    """

    def __init__(self, whole: Transformer, stages: list[Stage], group: dist.ProcessGroup) -> None:
        self_rank, ranks = group.rank(), group.size()
        super().__init__(whole, [stage for stage in stages if stage.index % ranks == self_rank])
        self.rank, self.ranks, self.group = self_rank, ranks, group
        self.parts = {stage.index: Segment(whole, [stage], self) for stage in self.stages}
        """By stage; their modules are this model's own."""
        self.count = len(stages)
        self.holders: dict[str, list[int]] = {name: [] for name, _ in whole.named_parameters()}
        """Which ranks of the group hold each parameter of the whole model."""
        for stage in stages:
            for name in stage.names(whole):
                self.holders[name] = sorted({*self.holders[name], stage.index % ranks})
        self.every = {name: torch.empty_like(parameter, device="meta") for name, parameter in whole.named_parameters()}
        """Shapes of the whole model's parameters."""
        self.total = sum(parameter.numel() for parameter in whole.parameters())
        """Parameters of the whole model."""
        self._shared = _groups([ranks for ranks in self.holders.values() if len(ranks) > 1], group)
        self._whole = [whole]  # in a list: its modules are not this model's
        self._part_with()

    def train(self, mode: bool = True) -> Self:
        """As of any module, and of the segments, which share its modules."""
        super().train(mode)
        for segment in getattr(self, "parts", {}).values():
            segment.training = mode
        return self

    def hidden(self, tokens: Tensor, *given: Any, **named: Any) -> Tensor:
        """As the whole model's; without gradients, and called by all ranks of the group."""
        if torch.is_grad_enabled():
            raise RuntimeError("a model in stages learns through its pipeline, not through `hidden`")
        cache, context = (given[2:] + (None, None))[:2] if len(given) > 2 else (named.get("cache"), None)
        if cache is not None or context is not None:
            raise UsageError("a model in pipeline stages generates nothing", hint="set parallel.pp to 1")
        states = torch.empty(0)
        for index in range(self.count):
            if index % self.ranks != self.rank:
                continue
            segment = self.parts[index]
            if index:
                segment.received = self._room(tokens)
                dist.recv(segment.received, group=self.group, group_src=(index - 1) % self.ranks)
            states = segment.hidden(tokens, *given, **named).contiguous()
            segment.received = None
            if index < self.count - 1:
                dist.send(states, group=self.group, group_dst=(index + 1) % self.ranks)
        last = (self.count - 1) % self.ranks
        states = states if self.rank == last else self._room(tokens)
        dist.broadcast(states, group=self.group, group_src=last)
        return states

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Every rank of the group has what reads the last states inside, as it is now."""
        whole, last = self._whole[0], (self.count - 1) % self.ranks
        lacking = [name for name in (*LAST, "embedding") if getattr(self, name) is None]
        for name, ranks in self.holders.items():
            child = name.split(".")[0]
            if child in (*LAST, "embedding") and last in ranks and len(ranks) < self.ranks:
                self._spread(name, last)
        lacking = [name for name in lacking if (child := getattr(whole, name)) is not None and not _is_away(child)]
        for name in lacking:
            setattr(self, name, getattr(whole, name))
        try:
            yield
        finally:
            for name in lacking:
                setattr(self, name, None)
            self._part_with()

    def reunite(self) -> None:
        """Give the whole model all its parameters back, on the first rank of the group alone; all must call."""
        for name, ranks in self.holders.items():
            if ranks[0]:
                self._spread(name, ranks[0], only=0)

    @torch.no_grad()
    def join_shared(self) -> None:
        """Add up the gradients of parameters that several ranks hold: a tied embedding is used at both ends."""
        for name, parameter in self.named_parameters():
            if len(self.holders[name]) > 1:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self._shared[tuple(self.holders[name])])

    def own(self) -> list[nn.Parameter]:
        """Parameters that count as this rank's where each counts once."""
        return [parameter for name, parameter in self.named_parameters() if self.holders[name][0] == self.rank]

    def _room(self, tokens: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return torch.empty((*tokens.shape, self.config.dim), dtype=dtype, device=tokens.device)

    def _spread(self, name: str, source: int, only: int | None = None) -> None:
        """`source` sends a parameter to all, or to one; those that lack it put it into the whole model."""
        if only is not None and self.rank not in (source, only):
            return
        path, _, leaf = name.rpartition(".")
        module = self._whole[0].get_submodule(path)
        parameter = module.get_parameter(leaf)
        device = next(self.parameters()).device
        value = parameter.detach() if not parameter.is_meta else torch.empty_like(parameter, device=device)
        if only is None:
            dist.broadcast(value, group=self.group, group_src=source)
        elif self.rank == source:
            dist.send(value.contiguous(), group=self.group, group_dst=only)
        else:
            dist.recv(value, group=self.group, group_src=source)
        if parameter.is_meta:
            setattr(module, leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))

    def _part_with(self) -> None:
        """Parameters of the whole model that this rank does not hold leave the memory."""
        whole = self._whole[0]
        for path, module in whole.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                name = f"{path}.{leaf}".lstrip(".")
                if self.rank not in self.holders[name] and not parameter.is_meta:
                    setattr(module, leaf, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))


def _is_away(child: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in child.parameters())


def _groups(shared: list[list[int]], group: dist.ProcessGroup) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """A process group for each set of ranks of `group` that hold a parameter together; each for its members."""
    found: dict[tuple[int, ...], dist.ProcessGroup] = {}
    every = dist.get_process_group_ranks(group)
    for ranks in sorted({tuple(ranks) for ranks in shared}):
        if len(ranks) == len(every):
            found[ranks] = group
        elif group.rank() in ranks:
            # Pipelines beside this one make theirs on their own.
            found[ranks] = dist.new_group([every[rank] for rank in ranks], use_local_synchronization=True)
    return found
