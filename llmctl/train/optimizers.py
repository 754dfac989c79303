"""Which optimizer trains which parameter, at which rate, and their state as named tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmctl.errors import InputError, UsageError
from llmctl.nn.foreign import ForeignModel
from llmctl.train.descent import SGD, Adafactor, AdamW, Descent, Lion, ScheduleFree
from llmctl.train.eight_bit import AdamW8bit
from llmctl.train.muon import Muon
from llmctl.train.offload import Offload
from llmctl.train.params import TrainParams
from llmctl.train.parts import everywhere, placed
from llmctl.train.ranks import ALONE, Ranks

TABLES = ("embedding", "value_embedding", "positions", "segments", "relative", "content_bias", "distance_bias")
"""Parts of the names of matrices whose rows are looked up or added, one by one."""
HEADS = ("unembedding", "next", "classifier")
"""Parts of the names of matrices that score classes."""
OUTER = (*TABLES, *HEADS)
KINDS = ("matrix", "embedding", "head", "vector")
BETAS: tuple[str, ...] = ("beta1", "beta2")

Group = dict[str, Any]
Maker = Callable[[list[Group], TrainParams], torch.optim.Optimizer]


def kind_of(name: str, parameter: Tensor) -> str:
    """One of `KINDS`: a hidden matrix, a table, an output matrix of its own, or all else: gains, biases, filters."""
    parts = name.split(".")
    if any(part in TABLES for part in parts) and parameter.ndim >= 2:
        return "embedding"
    if parameter.ndim != 2:
        return "vector"
    return "head" if any(part in HEADS for part in parts) else "matrix"


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether `parameter` maps hidden states to hidden states: 2-D, and no table, head or bias."""
    return parameter.ndim == 2 and kind_of(name, parameter) == "matrix"


@dataclass(frozen=True)
class Rates:
    """Peak rates by kind of parameter after the scaling rules, and in words what the rules did."""

    of: dict[str, float]
    notes: tuple[str, ...] = ()
    factors: dict[str, float] = field(default_factory=dict)
    """What the rules multiplied each by."""

    @classmethod
    def plan(cls, params: TrainParams, width: int) -> Rates:
        """The rates that `params` give to a model of `width`.

        For k times the batch, sqrt(k) keeps the noise of Adam's steps (2006.09092), k that of SGD's (1706.02677). For k
        times the width, matrices under Adam want 1/k and tables the same rate (2203.03466), or all of them 1/sqrt(k)
        (nanochat). Muon's rate needs no rule: orthogonal updates move the output alike at any width.
        """
        rates = {
            "matrix": params.lr,
            "embedding": params.rest_lr,
            "head": params.rest_lr if params.head_lr is None else params.head_lr,
            "vector": params.rest_lr if params.vector_lr is None else params.vector_lr,
        }
        given, notes = rates, []
        batch, reference = params.batch_size, params.reference_batch
        if (by_batch := params.scale_lr_with_batch) != "none":
            factor = batch / reference if by_batch == "linear" else (batch / reference) ** 0.5
            rates = {kind: rate * factor for kind, rate in rates.items()}
            notes.append(f"batch {batch} for {reference} ({by_batch}): all rates x {factor:.3g}")
        reference = params.reference_width
        if (by_width := params.scale_lr_with_width) != "none":
            factor = reference / width if by_width == "inverse" else (reference / width) ** 0.5
            scaled = [kind for kind in KINDS if by_width == "sqrt" or kind == "matrix"]
            scaled = [kind for kind in scaled if not (kind == "matrix" and params.optimizer == "muon")]
            rates = {kind: rate * factor if kind in scaled else rate for kind, rate in rates.items()}
            named = ", ".join(scaled) or "none"
            notes.append(f"width {width} for {reference} ({by_width}): rates of {named} x {factor:.3g}")
        if notes:
            notes.append("peak rates " + ", ".join(f"{kind} {rate:.3g}" for kind, rate in rates.items()))
        return cls(rates, tuple(notes), {kind: rates[kind] / given[kind] for kind in KINDS})


class Optimizers:
    """One optimizer, or Muon and AdamW driven as one. Rates are set per step as a share of each group's peak."""

    def __init__(self, model: nn.Module, params: TrainParams, ranks: Ranks = ALONE) -> None:
        self._sharing = ranks.group("dp_replicate") if params.parallel.shard_optimizer else None
        trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in trained}
        outer = model.outer_names if isinstance(model, ForeignModel) else frozenset()
        self._kinds = {p: "embedding" if name in outer else kind_of(name, p) for p, name in self._names.items()}
        self._every: dict[str, Tensor] = getattr(model, "every", None) or {n: p for p, n in self._names.items()}
        """Of the whole model, of which a rank of a pipeline holds some."""
        self.rates = Rates.plan(params, getattr(getattr(model, "config", None), "dim", 0))
        groups = self._groups(params)
        self.all: list[torch.optim.Optimizer] = []
        if params.optimizer == "muon" and (hidden := [group for group in groups if group["kind"] == "matrix"]):
            self.all.append(self._made(_muon, hidden, params))
            groups = [group for group in groups if group["kind"] != "matrix"]
        if groups:
            self.all.append(self._made(MAKERS[params.optimizer], groups, params))
        self._peaks = [[(group["lr"], group["weight_decay"]) for group in o.param_groups] for o in self.all]
        self.offload = Offload(self.all) if params.offload_optimizer else None

    def _made(self, make: Maker, groups: list[Group], params: TrainParams) -> torch.optim.Optimizer:
        """The optimizer; ZeRO-1: of this rank's part of the parameters, the others' being sent after each step."""
        if self._sharing is None:
            return make(groups, params)
        return _shared(groups, lambda groups: make(groups, params), self._sharing)

    def _groups(self, params: TrainParams) -> list[Group]:
        """The parameters by kind and what `params.groups` says of them. Norms and biases do not decay unless that says
        so: 0 is no better origin."""
        decays = {"matrix": params.weight_decay, "vector": 0.0}
        outer = params.weight_decay if params.decay_embeddings else 0.0
        members: dict[tuple[tuple[str, ...], object], list[Tensor]] = {}
        for parameter, kind in self._kinds.items():
            parts = self._names[parameter].split(".")
            keys = [key for key in params.groups if key == kind or key in parts]
            # Kernels for many tensors take those that are parted over the same ranks.
            mesh = getattr(parameter, "device_mesh", None)
            members.setdefault(((kind, *keys), mesh), []).append(parameter)
        named = {part for name, shape in self._every.items() for part in (kind_of(name, shape), *name.split("."))}
        if idle := set(params.groups) - named:
            raise UsageError(
                f"groups names `{min(idle)}`, which is in no parameter's name",
                hint=f"a kind ({', '.join(KINDS)}) or a part of a name: {_few_parts(self._every)}",
            )
        groups = []
        for ((kind, *keys), _), alike in sorted(members.items(), key=lambda item: KINDS.index(item[0][0][0])):
            values = {"lr": self.rates.of[kind], "weight_decay": decays.get(kind, outer)}
            own: dict[str, float] = {}
            for key in keys:
                own |= params.groups[key].model_dump(exclude_none=True)
            if "lr" in own:
                own["lr"] *= self.rates.factors[kind]
            betas = {name: own.pop(name) for name in BETAS if name in own}
            group = {"params": alike, "kind": kind, **values, **own}
            groups.append({**group, **_betas(betas, kind, keys, params)})
        return groups

    def step(self, factor: float, momentum: float | None = None, decay: float = 1.0) -> None:
        """Update every parameter at `factor` times its peak rate, then drop the gradients.

        `momentum`: that of Muon and SGD from now on; None: it stays. `decay`: the share of the weight decay.
        """
        for optimizer, peaks in zip(self.all, self._peaks, strict=True):
            for group, (peak, most) in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"], group["weight_decay"] = peak * factor, most * decay
                if momentum is not None and "momentum" in group:
                    group["momentum"] = momentum
            if self.offload is None:
                optimizer.step()
            else:
                self.offload.step(optimizer)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients without a step."""
        for parameter in self._names:
            parameter.grad = None

    def average(self) -> dict[Tensor, Tensor]:
        """The mean of all steps by parameter, where the optimizer's model is that; else empty."""
        found: dict[Tensor, Tensor] = {}
        for optimizer in map(own, self.all):
            if isinstance(optimizer, ScheduleFree):
                found |= optimizer.average()
        return found

    def state(self) -> dict[str, Tensor]:
        """Every state tensor of this rank as `<parameter>/<key>`, empty before the first step; and how many steps."""
        if self.offload is not None:
            self.offload.settle()
        found = {}
        for number, optimizer in enumerate(map(own, self.all)):
            if isinstance(optimizer, Descent) and optimizer.steps:
                found[f"{number}/steps"] = torch.tensor(optimizer.steps)
            for parameter, values in optimizer.state.items():
                for key, value in values.items():
                    found[f"{self._names[parameter]}/{key}"] = value
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; InputError if a tensor belongs to no parameter of the model."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        inner = [own(optimizer) for optimizer in self.all]
        owners = {p: o for o in inner for group in o.param_groups for p in group["params"]}
        for optimizer in inner:
            optimizer.state.clear()
            if isinstance(optimizer, Descent):
                optimizer.steps = 0
        for full, value in state.items():
            name, _, key = full.rpartition("/")
            if key == "steps":
                descent = inner[int(name)]
                assert isinstance(descent, Descent)
                descent.steps = int(value)
                continue
            if name not in parameters:
                raise InputError(f"the checkpoint has optimizer state for `{name}`, which the model lacks")
            parameter = parameters[name]
            if parameter in owners:  # with a shared optimizer some are another rank's
                # Adafactor's sums along an axis meet gradients in parts; Muon's are those of gathered matrices.
                put = everywhere if key in ("row_var", "col_var") else placed
                owners[parameter].state[parameter][key] = put(value, parameter)
        if self.offload is not None:
            self.offload.put_away()


def _few_parts(names: Iterable[str]) -> str:
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    return ", ".join([part for part in parts if part not in ("weight", "bias", "blocks")][:12])


def _betas(given: dict[str, float], kind: str, keys: list[str], params: TrainParams) -> Group:
    """`given` as the optimizer of `kind` takes it; UsageError for one that it does not have."""
    if not given:
        return {}
    muon = params.optimizer == "muon" and kind == "matrix"
    readers = {"beta2"} if muon and params.muon_variance else set() if muon else {"beta1", "beta2"}
    if params.optimizer in ("sgd", "adafactor"):
        readers = set()
    if idle := sorted(set(given) - readers):
        raise UsageError(f"groups.{keys[-1]}: the optimizer of {kind} parameters has no {idle[0]}")
    return given if muon else {"betas": (given.get("beta1", params.beta1), given.get("beta2", params.beta2))}


def own(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this rank's state: one that is shared drives another."""
    return getattr(optimizer, "optim", optimizer)


def _shared(
    groups: list[Group], make: Callable[[list[Group]], torch.optim.Optimizer], among: dist.ProcessGroup
) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        # Its package compiles functions with torch.jit when it is imported, which is deprecated.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    made: torch.optim.Optimizer = ZeroRedundancyOptimizer(groups, make, process_group=among)  # type: ignore[arg-type]  # it calls it
    return made


def _muon(groups: list[Group], params: TrainParams) -> Muon:
    return Muon(
        groups,
        params.lr,
        momentum=params.momentum,
        nesterov=params.nesterov,
        iteration=params.muon_iteration,
        scale=params.muon_scale,
        variance=params.muon_variance,
        equalise=params.muon_equalise,
        renormalise=params.muon_renormalise,
        beta2=params.beta2,
        cautious=params.cautious_decay,
    )


def _adamw(groups: list[Group], params: TrainParams) -> torch.optim.Optimizer:
    betas = (params.beta1, params.beta2)
    if params.cautious_decay and any(group["weight_decay"] for group in groups):
        return AdamW(groups, params.lr, betas, params.epsilon, cautious=True)
    # One kernel per group, or on CPU one vectorised loop per tensor: 27 against 100 ms for 5 million parameters.
    return torch.optim.AdamW(groups, params.lr, betas, params.epsilon, weight_decay=0.0, fused=True)


def _adamw8bit(groups: list[Group], params: TrainParams) -> torch.optim.Optimizer:
    groups = [{**group, "bits": 32 if group["kind"] == "embedding" else 8} for group in groups]
    betas = (params.beta1, params.beta2)
    return AdamW8bit(groups, params.lr, betas, params.epsilon, cautious=params.cautious_decay)


MAKERS: dict[str, Maker] = {
    "muon": _adamw,
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": lambda groups, params: Adafactor(groups, params.lr),
    "lion": lambda groups, params: Lion(
        groups, params.lr, (params.beta1, params.beta2), cautious=params.cautious_decay
    ),
    "sgd": lambda groups, params: SGD(
        groups, params.lr, params.momentum, params.nesterov, cautious=params.cautious_decay
    ),
    "schedule-free": lambda groups, params: ScheduleFree(
        groups, params.lr, (params.beta1, params.beta2), params.epsilon
    ),
}
"""What trains everything; of `muon`, what trains the rest."""
