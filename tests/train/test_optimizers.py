from __future__ import annotations

import pytest
import torch
from torch import nn

from llmctl.train.muon import ITERATIONS, Muon, orthogonalise, rate_factor
from llmctl.train.optimizers import Optimizers, is_hidden_matrix
from llmctl.train.params import TrainParams


def gradients(shape: tuple[int, ...], steps: int = 20) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator), [torch.randn(shape, generator=generator) for _ in range(steps)]


class Net(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(*weight.T.shape, bias=False)
        self.embedding = nn.Embedding(*weight.shape)
        with torch.no_grad():
            self.layer.weight.copy_(weight)
            self.embedding.weight.copy_(weight)


def test_adamw_equals_its_formula_over_20_steps() -> None:
    start, grads = gradients((16, 24))
    net = Net(start).double()  # in float64 the formula must be met to the last digits, not to float32's rounding
    params = TrainParams(optimizer="adamw", lr=1e-2, weight_decay=0.1, embedding_lr=3e-3)
    optimizers = Optimizers(net, params)
    for grad in grads:
        net.layer.weight.grad, net.embedding.weight.grad = grad.double(), grad.double()
        optimizers.step(0.5)
    for parameter, lr, decay in ((net.layer.weight, 5e-3, 0.1), (net.embedding.weight, 1.5e-3, 0.0)):
        w, m, v = start.double(), torch.zeros(16, 24).double(), torch.zeros(16, 24).double()
        for t, grad in enumerate((g.double() for g in grads), start=1):
            w = w - lr * decay * w
            m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
            w = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        assert (parameter - w).abs().max() <= 1e-9


def muon_formula(w: torch.Tensor, grads: list[torch.Tensor], lr: float, decay: float, factor: float) -> torch.Tensor:
    m = torch.zeros_like(w)
    a, b, c = ITERATIONS["newton-schulz"][0]
    for grad in grads:
        m = 0.95 * m + 0.05 * grad
        x = 0.05 * grad + 0.95 * m
        x = x.T if w.shape[0] > w.shape[1] else x
        x = x / x.norm()
        for _ in range(5):
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        x = x.T if w.shape[0] > w.shape[1] else x
        w = w * (1 - lr * decay) - lr * factor * x
    return w


@pytest.mark.parametrize("shape", [(16, 24), (32, 8)])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_equals_its_formula_over_20_steps(shape: tuple[int, int], scale: str) -> None:
    start, grads = gradients(shape)
    weight = nn.Parameter(start.double())
    muon = Muon([weight], lr=0.02, weight_decay=0.1, scale=scale)
    for grad in grads:
        weight.grad = grad.double()
        muon.step()
    factor = {"original": max(1, shape[0] / shape[1]) ** 0.5, "match_rms_adamw": 0.2 * max(shape) ** 0.5}[scale]
    expected = muon_formula(start.double(), [grad.double() for grad in grads], 0.02, 0.1, factor)
    assert (weight - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("shape", [(16, 24), (32, 8)])
def test_muon_equals_torch_when_torch_iterates_in_float32(shape: tuple[int, int], monkeypatch) -> None:
    start, grads = gradients(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon, peer = Muon([ours], lr=0.02), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        muon.step()
        peer.step()
    assert (ours - theirs).abs().max() <= 2e-6


def test_matrices_of_one_shape_are_updated_as_if_alone() -> None:
    start, grads = gradients((3, 8, 12), steps=1)
    together = [nn.Parameter(matrix.clone()) for matrix in start]
    alone = [nn.Parameter(matrix.clone()) for matrix in start]
    for parameters in ([together], [[p] for p in alone]):
        for group in parameters:
            for parameter, grad in zip(group, grads[0] if len(group) > 1 else [None], strict=False):
                parameter.grad = grad
    for parameter, grad in zip(alone, grads[0], strict=True):
        parameter.grad = grad
        Muon([parameter], lr=0.1).step()
    Muon(together, lr=0.1).step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(together, alone, strict=True))


def test_orthogonalised_singular_values_are_near_one_and_vectors_kept(monkeypatch) -> None:
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix[None])[0])
    assert values.min() > 0.6 and values.max() < 1.2  # .682 to 1.134 by other implementations
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    polar = u @ v
    cosine = (orthogonalise(matrix[None])[0] * polar).sum() / polar.norm() / orthogonalise(matrix[None])[0].norm()
    assert cosine > 0.97
    # Control: without the iteration the scaled gradient's values are spread widely.
    monkeypatch.setitem(ITERATIONS, "newton-schulz", ())
    raw = torch.linalg.svdvals(orthogonalise(matrix[None])[0])
    assert raw.max() < 0.3


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_hidden_matrices_only(make_model, arch: str, tied: bool) -> None:
    kv = {} if arch == "gpt2" else {"kv_heads": 2}
    model = make_model(arch=arch, tie_embeddings=tied, **{"kv_heads": 4, **kv})
    optimizers = Optimizers(model, TrainParams(lr=0.02, weight_decay=0.3))
    muon, adamw = optimizers.all
    names = {parameter: name for name, parameter in model.named_parameters()}
    hidden = {names[p] for p in muon.param_groups[0]["params"]}
    assert hidden == {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert {names[p] for g in adamw.param_groups for p in g["params"]} == set(names.values()) - hidden
    assert all(g["weight_decay"] == 0 and g["lr"] == pytest.approx(0.03) for g in adamw.param_groups)
    assert not is_hidden_matrix("unembedding.weight", torch.zeros(2, 2))


def test_muon_refuses_vectors_and_unknown_scales() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match="unknown scale"):
        rate_factor(2, 2, "none")


def test_state_survives_a_round_trip() -> None:
    start, grads = gradients((16, 24), steps=6)
    nets = [Net(start), Net(start)]
    runs = [Optimizers(net, TrainParams()) for net in nets]
    for index, grad in enumerate(grads):
        if index == 3:  # the second goes on from the first's state
            nets[1].load_state_dict(nets[0].state_dict())
            runs[1].load({name: tensor.clone() for name, tensor in runs[0].state().items()})
        for net, run in list(zip(nets, runs, strict=True))[: 1 if index < 3 else 2]:
            net.layer.weight.grad, net.embedding.weight.grad = grad.clone(), grad.clone()
            run.step(1.0)
    assert torch.equal(nets[0].layer.weight, nets[1].layer.weight)
    assert torch.equal(nets[0].embedding.weight, nets[1].embedding.weight)
