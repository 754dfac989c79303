"""Optimizers that torch lacks, or has with a wait for the device in every step: SGD with decoupled decay, AdamW with
cautious decay, Lion, Adafactor and schedule-free AdamW.

Their state is tensors alone, so that a checkpoint can hold it, and no step reads a number back from the device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Groups = Iterable[Tensor] | Iterable[dict[str, Any]]
State = dict[str, Any]


def decay_(parameter: Tensor, update: Tensor, share: float, cautious: bool = False) -> None:
    """Shrink `parameter` by `share` of itself, in place (decoupled decay, 1711.05101).

    `cautious`: only where `update`, which is going to be subtracted, shrinks it too (2510.12402).
    """
    if not share:
        return
    if cautious:
        parameter.sub_(parameter * (parameter * update > 0), alpha=share)
    else:
        parameter.mul_(1 - share)


class Descent(torch.optim.Optimizer):
    """Applies `update` to every parameter that has a gradient; `steps` counts from 1 and is part of a checkpoint."""

    def __init__(self, params: Groups, **values: Any) -> None:
        super().__init__(params, values)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure here
        """One update from `.grad`; parameters without a gradient stay as they are."""
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)

    @abstractmethod
    def update(self, p: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        """Move `p` in place; `grad` may be used up."""


class SGD(Descent):
    """p -= lr v, v = momentum v + g (from v = g); Nesterov takes g + momentum v instead of v."""

    def __init__(
        self,
        params: Groups,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        cautious: bool = False,
    ) -> None:
        values = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "cautious": cautious}
        super().__init__(params, lr=lr, **values)

    def update(self, p: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        """See the class."""
        momentum = group["momentum"]
        if momentum:
            if "momentum_buffer" in state:
                state["momentum_buffer"].mul_(momentum).add_(grad)
            else:
                state["momentum_buffer"] = grad.clone()
            buffer = state["momentum_buffer"]
            grad = grad.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        decay_(p, grad, group["lr"] * group["weight_decay"], group["cautious"])
        p.add_(grad, alpha=-group["lr"])


class AdamW(Descent):
    """AdamW (1711.05101) with cautious decay; without it torch's own is faster."""

    def __init__(
        self,
        params: Groups,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        cautious: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, cautious=cautious)

    def update(self, p: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        """See the class."""
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        direction = adam_direction(state["exp_avg"], state["exp_avg_sq"], grad, self.steps, group)
        decay_(p, direction, group["lr"] * group["weight_decay"], group["cautious"])
        p.add_(direction, alpha=-group["lr"])


def adam_direction(mean: Tensor, square: Tensor, grad: Tensor, steps: int, group: dict[str, Any]) -> Tensor:
    """Move both moments in place and return m' / (sqrt(v') + eps), each with its bias corrected."""
    beta1, beta2 = group["betas"]
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    size = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
    direction: Tensor = mean / (1 - beta1**steps) / size
    return direction


class Lion(Descent):
    """p -= lr sign(beta1 m + (1 - beta1) g), then m = beta2 m + (1 - beta2) g (2302.06675).

    Every weight moves by lr: take a third to a tenth of AdamW's rate, and as much more decay.
    """

    def __init__(
        self,
        params: Groups,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        cautious: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, cautious=cautious)

    def update(self, p: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        """See the class."""
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        direction = state["exp_avg"].lerp(grad, 1 - beta1).sign_()
        decay_(p, direction, group["lr"] * group["weight_decay"], group["cautious"])
        p.add_(direction, alpha=-group["lr"])
        state["exp_avg"].lerp_(grad, 1 - beta2)


class Adafactor(Descent):
    """Second moments of matrices as a row and a column, no first moment (1804.04235).

    The step is min(lr, 1 / sqrt(t)) times the parameter's own root mean square (at least 1e-3), the update is cut to a
    root mean square of 1, and the moments' decay is 1 - t^-0.8. `torch.optim.Adafactor` reads two numbers per parameter
    and step back from the device, and bounds the mean square of a matrix from below by 1e-7 where the paper has 1e-30:
    gradients of large models are smaller than that.
    """

    def __init__(self, params: Groups, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def update(self, p: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        """See the class."""
        rate = min(group["lr"], self.steps**-0.5) * rms(p).clamp(min=1e-3)
        decay_(p, grad, group["lr"] * group["weight_decay"])
        direction = grad * self._second_moment(grad.square() + 1e-30, state, self.steps**-0.8).rsqrt()
        p.sub_(direction * (rate / rms(direction).clamp(min=1.0)))

    def _second_moment(self, squares: Tensor, state: State, share: float) -> Tensor:
        if squares.ndim < 2:
            if "variance" not in state:
                state["variance"] = torch.zeros_like(squares)
            variance: Tensor = state["variance"].lerp_(squares, share)
            return variance
        rows, columns = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
        if "row_var" not in state:
            state["row_var"], state["col_var"] = torch.zeros_like(rows), torch.zeros_like(columns)
        rows, columns = state["row_var"].lerp_(rows, share), state["col_var"].lerp_(columns, share)
        estimate: Tensor = rows / rows.mean(-2, keepdim=True) * columns
        return estimate


def rms(x: Tensor) -> Tensor:
    """Root mean square, a 0-dimensional tensor."""
    size: Tensor = torch.linalg.vector_norm(x) / x.numel() ** 0.5
    return size


class ScheduleFree(Descent):
    """Schedule-free AdamW (2405.15682): steps are taken at z, gradients at y, and the model is x, the mean of all z.

    y = (1 - beta1) z + beta1 x. The parameters hold y; `average` gives x for evaluation and for the finished model. The
    mean weights each z by its squared rate, so that those of the warm-up count little. Decay is taken at y.
    """

    def __init__(
        self,
        params: Groups,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(self, p: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        """See the class."""
        if not state:
            state["z"], state["exp_avg_sq"] = p.clone(), torch.zeros_like(p)
            state["weight"] = torch.zeros((), dtype=torch.float64, device=p.device)
        beta1, beta2 = group["betas"]
        z, square, lr = state["z"], state["exp_avg_sq"], group["lr"]
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        direction = grad / ((square / (1 - beta2**self.steps)).sqrt_().add_(group["eps"]))
        direction.add_(p, alpha=group["weight_decay"])
        share = (lr**2 / state["weight"].add_(lr**2)).to(p.dtype)
        p.lerp_(z, share).add_(direction * (lr * (beta1 * (1 - share) - 1)))
        z.sub_(direction, alpha=lr)

    @torch.no_grad()
    def average(self) -> dict[Tensor, Tensor]:
        """x of every parameter that has been moved: a new tensor."""
        found = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if "z" in self.state[parameter]:
                    found[parameter] = parameter.lerp(self.state[parameter]["z"], 1 - 1 / group["betas"][0])
        return found
