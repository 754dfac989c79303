"""A pruned model's zeros stay exactly 0 in training with `keep_zeros`, and without it they do not."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from llmctl.errors import TempFail, UsageError
from llmctl.train.data import ExampleSource
from llmctl.train.loop import fit
from llmctl.train.objectives import CausalLM
from llmctl.train.params import TrainParams

from .rank_program import make_sparse
from .test_ranks import case, launch


def params(**changes: object) -> TrainParams:
    values = {"batch_size": 4, "max_steps": 6, "warmup_steps": 0, "save_every": 2, "lr": 0.01, "weight_decay": 0.1}
    return TrainParams(**{**values, **changes})


def sparse_model(make_model):
    model = make_model(1)
    make_sparse(model)
    return model


def zeros_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() == 0 for name, p in model.blocks.named_parameters() if p.ndim == 2}


RECIPES: dict[str, dict[str, object]] = {
    "muon": {},
    "adamw": {"optimizer": "adamw"},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "ema": {"ema": 0.9},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_stay_exactly_zero_and_without_it_they_do_not(make_context, make_model, make_examples, recipe) -> None:
    for keep in (True, False):
        model, values = sparse_model(make_model), params(keep_zeros=keep, **RECIPES[recipe])
        before, dense = zeros_of(model), model.embedding.weight.detach().clone()
        weights = [parameter.detach().clone() for parameter in model.blocks.parameters()]
        fit(make_context(f"{keep}"), model, CausalLM(), ExampleSource(make_examples(12), 32, values), values)
        after = zeros_of(model)
        assert all(torch.equal(after[name], before[name]) for name in before) is keep
        if keep:  # what is not 0 learns
            moved = zip(weights, model.blocks.parameters(), strict=True)
            assert all(not torch.equal(old, new) for old, new in moved)
            assert not torch.equal(model.embedding.weight, dense)
        else:
            assert sum(int(mask.sum()) for mask in after.values()) < 0.1 * sum(int(m.sum()) for m in before.values())


def test_a_resumed_run_has_the_mask_of_the_model_that_was_given(make_context, make_model, make_examples) -> None:
    values = params(keep_zeros=True)
    found = []
    for stops in ([], [3]):
        name = f"stops{len(stops)}"
        for stop in stops:
            with pytest.raises(TempFail):
                source = ExampleSource(make_examples(12), 32, values)
                fit(make_context(name, stop), sparse_model(make_model), CausalLM(), source, values)
        model = sparse_model(make_model)
        before = zeros_of(model)
        fit(make_context(name), model, CausalLM(), ExampleSource(make_examples(12), 32, values), values)
        assert all(torch.equal(mask, before[name]) for name, mask in zeros_of(model).items())
        found.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_cannot_be_kept_is_refused(make_context, make_model, make_examples) -> None:
    values = params(keep_zeros=True)
    with pytest.raises(UsageError, match="no weight of the model's hidden matrices is 0") as error:
        fit(make_context(), make_model(), CausalLM(), ExampleSource(make_examples(4), 32, values), values)
    assert "prune" in (error.value.hint or "")
    with pytest.raises(ValidationError, match="keep_zeros does not reach the mean"):
        params(keep_zeros=True, optimizer="schedule-free", schedule="constant")


def test_a_fresh_model_has_no_zeros_to_keep() -> None:
    from llmctl_train_pretrain.params import PretrainParams

    assert PretrainParams(keep_zeros=True).required_inputs() == {"model": "keep_zeros"}
    assert PretrainParams().required_inputs() == {}


@pytest.mark.slow
def test_ranks_keep_the_zeros_of_their_parts(tmp_path) -> None:
    schemes = {"ddp": {"dp_replicate": 2}, "zero-3": {"dp_shard": 2}, "tp": {"tp": 2}}
    cases = [case(name, scheme, sparse=True, keep_zeros=True) for name, scheme in schemes.items()]
    cases.append(case("free", schemes["zero-3"], sparse=True))
    out = launch(cases, tmp_path / "two", 2)
    alone = launch([case("alone", sparse=True, keep_zeros=True)], tmp_path / "one", 1)
    expected = torch.load(alone / "alone" / "weights.pt")
    hidden = [name for name, value in expected.items() if name.startswith("blocks") and value.ndim == 2]
    for name in (*schemes, "free"):
        found = torch.load(out / name / "weights.pt")
        same = [torch.equal(found[each] == 0, expected[each] == 0) for each in hidden]
        assert all(same) if name != "free" else not any(same), name
        for each, value in expected.items():
            if name != "free":
                torch.testing.assert_close(found[each], value, rtol=0, atol=5e-6)
