"""What a step is said to keep against what autograd keeps, and how the parts follow from the parameters."""

from __future__ import annotations

import pytest
import torch

from llmctl.nn.config import ModelConfig
from llmctl.nn.counts import count, matrices
from llmctl.nn.presets import PRESETS, preset
from llmctl.nn.transformer import Transformer
from llmctl.train.activations import Pass, kept
from llmctl.train.cross_entropy import summed_loss
from llmctl.train.footprint import Load, footprint
from llmctl.train.memory import kept_bytes
from llmctl.train.optimizers import is_hidden_matrix
from llmctl.train.params import TrainParams
from llmctl.train.recompute import recomputed

VOCAB, ROWS, LENGTH = 100, 2, 64


def saved_and_said(name, *, bf16=False, mode="none", packed=False, dropout=0.0):
    torch.manual_seed(0)
    config = preset(name, vocab_size=VOCAB, overrides={"context": LENGTH, "layers": 2})
    model = Transformer(config).train()
    model.set_dropout(dropout)
    count_of = ROWS * LENGTH
    tokens, targets = torch.randint(0, VOCAB, (ROWS, LENGTH)), torch.randint(0, VOCAB, (count_of,))
    documents = positions = None
    if packed:
        places = torch.arange(LENGTH)[None].repeat(ROWS, 1)
        documents, positions = places // 10, places % 10

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            pair = config.traits.kind == "encoder-decoder"
            further = {"memory": model.remember(tokens, documents)} if pair else {}
            states = model.hidden(tokens, documents=documents, positions=positions, **further)
            return summed_loss(model, states.flatten(0, 1), targets)[0]

    with recomputed(model, mode, dropout):
        saved = kept_bytes(forward, model)
    saved -= count_of * (4 * VOCAB + 8)  # log-probabilities and targets, which the footprint counts with the logits
    if config.logit_softcap:
        saved -= count_of * 4 * VOCAB
    if bf16:
        inner = sum(p.numel() for n, p in model.named_parameters() if is_hidden_matrix(n, p))
        saved -= 2 * (inner + VOCAB * config.dim)  # copies of weights, counted once and not per token
    step = Pass(
        rows=ROWS,
        length=LENGTH,
        targets=count_of,
        product=2 if bf16 else 4,
        recompute=mode,
        dropout=dropout,
        masked=packed,
    )
    return saved, kept(config, step)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_kept_is_what_autograd_keeps(name):
    saved, said = saved_and_said(name)
    assert said == pytest.approx(saved, rel=0.11)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama", {"bf16": True}),
        ("gpt2", {"bf16": True}),
        ("llama", {"packed": True}),
        ("bert", {"packed": True}),
        ("llama", {"dropout": 0.1}),
        ("gpt2", {"dropout": 0.1}),
        ("llama", {"mode": "full"}),
    ],
)
def test_so_with_what_changes_it(name, how):
    saved, said = saved_and_said(name, **how)
    assert said == pytest.approx(saved, rel=0.06)


def test_the_comparison_tells_a_wrong_count_apart():
    saved, _ = saved_and_said("llama")
    _, other = saved_and_said("llama", dropout=0.1)
    assert other != pytest.approx(saved, rel=0.11)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "gopher"])
def test_matrices_are_the_models(name):
    config = preset(name, vocab_size=VOCAB)
    with torch.device("meta"):
        model = Transformer(config)
    found: dict[tuple[int, ...], int] = {}
    for title, parameter in model.named_parameters():
        if is_hidden_matrix(title, parameter):
            found[tuple(parameter.shape)] = found.get(tuple(parameter.shape), 0) + 1
    assert matrices(config) == found


LARGE = {"arch": "llama", "vocab_size": 32000, "dim": 4096, "layers": 32, "heads": 32, "context": 4096}


def planned(shape=LARGE, **params):
    given = {"batch_size": 8, "micro_batch": 1, "optimizer": "adamw", "recompute": "full", **params}
    config, settings = ModelConfig(**shape), TrainParams(**given)
    return footprint(config, settings, Load.of(settings, config.context, cuda=True))


def test_sharding_parts_the_state_and_nothing_else():
    """The closed form of ZeRO (1910.02054, figure 1) with float32 weights, gradients and two moments: 16 bytes."""
    n = count(ModelConfig(**LARGE)).total
    whole, shared = planned(), planned(batch_size=64, parallel={"dp_shard": 8})
    assert whole.parts["weights"] == 4 * n and whole.parts["optimizer"] == 8 * n
    assert shared.parts["optimizer"] == pytest.approx(n, rel=1e-6)
    assert shared.parts["weights"] > 4 * n / 8  # and what is gathered of it
    assert shared.parts["gradients"] == pytest.approx(whole.parts["gradients"] / 8, rel=0.15)
    first = planned(parallel={"dp_replicate": 8, "shard_optimizer": True})
    assert first.parts["optimizer"] == pytest.approx(n, rel=1e-6) and first.parts["weights"] == 4 * n
    assert planned(parallel={"dp_replicate": 8}).total == planned(batch_size=1).total


def test_tensor_parallel_parts_matrices_and_what_they_give():
    whole, shared = planned(recompute="none"), planned(recompute="none", parallel={"tp": 4})
    assert shared.parts["weights"] == pytest.approx(whole.parts["weights"] / 4)
    assert 0.25 < shared.parts["activations"] / whole.parts["activations"] < 0.75


def test_what_is_advised_helps():
    whole = planned(recompute="none", micro_batch=8)
    assert whole.largest == "activations"
    assert planned(recompute="full", micro_batch=8).parts["activations"] < whole.parts["activations"] / 5
    wide = {"arch": "llama", "vocab_size": 200_000, "dim": 64, "layers": 2, "heads": 2, "context": 1024}
    many = planned(wide, micro_batch=8)
    assert many.largest == "logits"
    assert planned(wide, micro_batch=8, loss_chunk=1024).total < many.total / 2
    assert planned(optimizer="adafactor").total < planned(optimizer="lion").total < planned(optimizer="adamw").total


def test_copies_of_the_weights_and_micro_batches():
    assert planned(ema=0.9).parts["mean"] == planned().parts["weights"]
    one, two = planned(batch_size=8, micro_batch=8), planned(batch_size=8, micro_batch=4)
    assert two.parts["activations"] < one.parts["activations"]
    assert planned(batch_size=8, micro_batch=2).parts["gradients"] >= 4 * count(ModelConfig(**LARGE)).total


def test_the_worst_rank_of_a_pipeline_and_its_schedules():
    def stages(**parallel):
        return planned(batch_size=32, micro_batch=1, recompute="none", parallel={"pp": 4, **parallel})

    whole = planned(batch_size=32, micro_batch=1, recompute="none")
    usual, all_first = stages(), stages(pp_schedule="gpipe")
    interleaved = stages(pp_schedule="interleaved", virtual_stages=2)
    # The first stage of four holds four micro-batches of a quarter of the blocks.
    assert usual.parts["activations"] == pytest.approx(whole.parts["activations"], rel=0.15)
    assert all_first.parts["activations"] == pytest.approx(8 * usual.parts["activations"], rel=0.15)
    # 2 (4 - 1) + 4 + 1 pieces of half a stage: 5.5 instead of 4.
    assert interleaved.parts["activations"] == pytest.approx(5.5 / 4 * usual.parts["activations"], rel=0.1)
    assert usual.parts["optimizer"] < whole.parts["optimizer"] / 3


def test_a_cut_sequence_keeps_its_part_and_the_keys_of_all():
    whole, shared = (planned(recompute="none", packing="none", parallel={"cp": cp}) for cp in (1, 4))
    assert 0.25 < shared.parts["activations"] / whole.parts["activations"] < 0.5
    assert shared.parts["weights"] == whole.parts["weights"]
