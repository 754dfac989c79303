from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, logit

from llmctl.errors import InputError, StageError
from llmctl.nn.hf import load_model
from llmctl.stage import Artifact, Context
from llmctl.text.datasets import read_rows
from llmctl.text.tokenizer import Tokenizer
from llmctl.train.conversations import Encoder, read_pairs
from llmctl.train.device import Compute
from llmctl_rlhf.losses import DPO, dpo_loss, implicit_margin
from llmctl_rlhf.pairs import PairSource
from llmctl_rlhf.params import RlhfParams

LEARN = {"max_steps": 80, "batch_size": 8, "lr": 3e-3, "log_every": 10}


def test_loss_equals_its_formula_in_float64() -> None:
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(-20, 8, (50, 2)), rng.normal(-20, 8, (50, 2))
    for beta, smoothing in ((0.1, 0.0), (0.5, 0.2)):
        margin = implicit_margin(torch.tensor(policy), torch.tensor(reference), beta)
        h = beta * ((policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1]))
        assert np.abs(margin.numpy() - h).max() <= 1e-9
        expected = -(1 - smoothing) * np.log(expit(h)) - smoothing * np.log(1 - expit(h))
        assert np.abs(dpo_loss(margin, smoothing).numpy() - expected).max() <= 1e-9


@pytest.mark.parametrize("p", [0.8, 0.55])
def test_a_three_armed_bandits_optimum_is_the_closed_form(p: float) -> None:
    """Arm 0 preferred over arm 1 with probability p: at the optimum the gap to the reference is logit(p) / beta."""
    beta, start = 0.5, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-15)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logs = logits.log_softmax(0)
        both = torch.tensor([[0, 1], [1, 0]])
        policy, reference = logs[both], start[both]
        loss = (dpo_loss(implicit_margin(policy, reference, beta)) * torch.tensor([p, 1 - p])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    logs = logits.detach().log_softmax(0) - start
    assert float(logs[0] - logs[1]) == pytest.approx(logit(p) / beta, abs=1e-6)  # p = .8: 2.77259


def pair_source(world, params: RlhfParams, split: str = "train") -> tuple[PairSource, torch.nn.Module, Context]:
    model = load_model(world.model.path)
    ctx = Context("test", {}, world.model.path, lambda kind, fields: None)
    encoder = Encoder(Tokenizer.load(world.model.path), 48, frozenset({1}), params)
    source = PairSource(read_pairs(ctx, world.preference, split, encoder), 48, params)
    source.measure_reference(ctx, model, Compute.of(params))
    return source, model, ctx


def test_log_probabilities_are_sums_over_the_answer_and_its_end(world) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, _, _ = pair_source(world, RlhfParams(batch_size=5, threads=1))
    model = AutoModelForCausalLM.from_pretrained(world.model.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.model.path)
    for number, row in enumerate(read_rows(world.preference, "train")):
        start = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True))
        for column, key in enumerate(("chosen", "rejected")):
            ids = tokenizer.apply_chat_template(row["prompt"] + row[key])
            assert ids[-1] == tokenizer.eos_token_id
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(logs[i - 1, ids[i]].item() for i in range(start, len(ids)))
            assert source.reference[number, column].item() == pytest.approx(expected, abs=1e-4)


def test_at_the_reference_the_loss_is_log_two_and_micro_batches_do_not_matter(world) -> None:
    source, model, _ = pair_source(world, RlhfParams(batch_size=24, threads=1))
    objective = DPO(beta=0.1, sft_weight=0.5)
    loss, sums = objective.loss(model, whole := source.micro_batches(0)[0])
    nll = sums["nll"].item()
    assert (loss.item() - 0.5 * nll) / 24 == pytest.approx(np.log(2), abs=1e-5)
    assert objective.weight(whole) == 24 and sums["margin"].item() == pytest.approx(0, abs=1e-4)
    split = PairSource(source.pairs, 48, RlhfParams(batch_size=24, micro_batch=7))
    split.reference = source.reference
    parts = [objective.loss(model, batch)[0].item() for batch in split.micro_batches(0)]
    assert len(parts) == 4 and sum(parts) == pytest.approx(loss.item(), rel=1e-5)
    lengths = [chosen.supervised for chosen, _ in source.pairs]
    expected = -(source.reference[:, 0] / torch.tensor(lengths)).sum().item()
    assert nll == pytest.approx(expected, rel=1e-5)


def test_preferences_are_learned_and_swapped_labels_do_the_opposite(train, world, make_dataset) -> None:
    true = [
        {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in read_rows(world.preference, "train")
    ]
    false = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in true]
    found = {}
    for name, rows in (("right", true), ("swapped", false)):
        # Both are measured on the true labels of the questions they were trained on.
        data = make_dataset("dataset.preference", {"train": rows, "validation": true}, name + "-pairs")
        found[name] = train("rlhf", name, LEARN, data=data).metrics
    right, swapped = found["right"], found["swapped"]
    assert right["loss.train"] < 0.2 and right["accuracy.train"] > 0.95 and right["margin.train"] > 1
    assert right["accuracy.validation"] >= 0.95 and swapped["accuracy.validation"] <= 0.05
    assert right["ranking.before"] == swapped["ranking.before"]
    assert right["ranking.after"] > right["ranking.before"] + 0.2 > swapped["ranking.after"] + 0.4
    assert {"chosen.train", "rejected.train", "margin.validation", "ranking.validation"} <= set(right)
    assert right["pairs"] == 24


@pytest.mark.slow
def test_beta_smoothing_and_sft_weight_have_an_effect(train) -> None:
    base = train("rlhf", "base", LEARN)
    held = train("rlhf", "beta", {**LEARN, "beta": 2.0})
    assert abs(held.metrics["margin.train"] / 2.0) < abs(base.metrics["margin.train"] / 0.1)
    smooth = train("rlhf", "smooth", {**LEARN, "label_smoothing": 0.3})
    assert smooth.metrics["margin.train"] < base.metrics["margin.train"]
    anchored = train("rlhf", "sft", {**LEARN, "sft_weight": 1.0})
    assert anchored.metrics["chosen.train"] > base.metrics["chosen.train"]


def test_equal_answers_and_broken_rows(train, make_dataset, tmp_path: Path) -> None:
    def row(chosen: str, rejected: str) -> dict:
        answers = {"chosen": chosen, "rejected": rejected}
        made = {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}
        return {"prompt": [{"role": "user", "content": "Q"}], **made}

    data = make_dataset("dataset.preference", {"train": [row("a", "b")] * 3 + [row("a", "a")]})
    with pytest.raises(StageError, match=r"1 of 4 .* dropped \(1 with equal answers\)"):
        train("rlhf", data=data)
    result = train("rlhf", "b", {"max_dropped": 0.5, "max_steps": 2}, data=data)
    assert result.metrics["pairs"] == 3 and "ranking.after" not in result.metrics
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "Q", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(InputError, match="has no list of messages `prompt`"):
        train("rlhf", "c", data=Artifact(broken, "dataset.preference"))
