"""Which optimizer trains which parameter, and their state as named tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmctl.errors import InputError
from llmctl.nn.foreign import ForeignModel
from llmctl.train.muon import Muon
from llmctl.train.params import TrainParams

TABLES = ("embedding", "positions", "segments", "relative", "unembedding", "next", "classifier")
BIASES = ("content_bias", "distance_bias")
OUTER = (*TABLES, *BIASES)
"""Parts of the names of matrices that are no hidden matrices: rows are looked up, scored or added one by one."""


class Optimizers:
    """Muon and AdamW, or AdamW alone, driven as one. Rates are set per step as a share of each group's peak."""

    def __init__(self, model: nn.Module, params: TrainParams) -> None:
        trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in trained}
        outer = model.outer_names if isinstance(model, ForeignModel) else frozenset()
        hidden = [p for p, name in self._names.items() if is_hidden_matrix(name, p) and name not in outer]
        others = [p for p, name in self._names.items() if not is_hidden_matrix(name, p) or name in outer]
        self.all: list[torch.optim.Optimizer] = []
        groups = []
        if params.optimizer == "muon" and hidden:
            self.all.append(
                Muon(hidden, params.lr, params.weight_decay, momentum=params.momentum, scale=params.muon_scale)
            )
        elif hidden:
            groups.append({"params": hidden, "lr": params.lr, "weight_decay": params.weight_decay})
        if others:
            # No decay for norms, biases and embeddings: it would pull towards a wrong origin.
            groups.append({"params": others, "lr": params.rest_lr, "weight_decay": 0.0})
        if groups:
            betas = (params.beta1, params.beta2)
            self.all.append(torch.optim.AdamW(groups, lr=params.lr, betas=betas, eps=1e-8))
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all]

    def step(self, factor: float) -> None:
        """Update every parameter at `factor` times its peak rate, then drop the gradients."""
        for optimizer, peaks in zip(self.all, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every state tensor as `<parameter>/<key>`, empty before the first step."""
        found = {}
        for optimizer in self.all:
            for parameter, values in optimizer.state.items():
                for key, value in values.items():
                    found[f"{self._names[parameter]}/{key}"] = value
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; InputError if a tensor belongs to no parameter of the model."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        owners = {p: o for o in self.all for group in o.param_groups for p in group["params"]}
        for full, value in state.items():
            name, _, key = full.rpartition("/")
            if name not in parameters:
                raise InputError(f"the checkpoint has optimizer state for `{name}`, which the model lacks")
            parameter = parameters[name]
            # torch wants AdamW's step count on the CPU; everything else lives beside its parameter.
            owners[parameter].state[parameter][key] = value if key == "step" else value.to(parameter.device)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether `parameter` maps hidden states to hidden states: 2-D, and no table, head or bias."""
    return parameter.ndim == 2 and not any(part in OUTER for part in name.split("."))
