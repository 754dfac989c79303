"""Objectives against transformers' own losses and closed forms; packed, padded and split batches alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import erf, log_softmax

from llmctl.nn.auxiliary import SpanBoundary
from llmctl.nn.hf import save_model
from llmctl.nn.transformer import Transformer
from llmctl.text.shards import SplitTokens
from llmctl.train.batches import Batch, Piece, lay_out
from llmctl.train.masking import Vocabulary, span_lengths
from llmctl.train.objectives import CausalLM, MaskedLM, states
from llmctl.train.params import TrainParams
from llmctl.train.pieces import CorruptionSource, Frame, MaskedSource, Masking, NextSentenceSource, PrefixSource

VOCAB = 48
FRAME = Frame([1], [2])
KINDS = ["mlm", "pairs", "span", "corruption", "prefix", "prefix pairs"]


@pytest.fixture
def model_of(make_model) -> Callable[[str], Transformer]:
    """A model with every weight random, so that norms and biases count."""

    def make(kind: str) -> Transformer:
        common = {"kv_heads": 4, "context": 64, "pad_id": 0}
        if kind in ("mlm", "pairs", "span"):
            head = "pretraining" if kind == "pairs" else "mlm"
            model = make_model(arch="bert", token_types=2, head=head, **common)
        else:
            model = make_model(arch="gpt2" if kind == "prefix" else "t5", **common)
        if kind == "span":
            model.auxiliary["boundary"] = SpanBoundary(32, 10)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


@pytest.fixture
def source_of(make_split) -> Callable[..., object]:
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, 38, length).tolist() for length in (3, 30, 17, 9, 25, 40, 12, 21)]

    def make(kind: str, **changes: object):
        params = TrainParams(**{"batch_size": 8, "max_steps": 4, **changes})
        split: SplitTokens = make_split([[1, *text, 2] for text in texts], VOCAB)
        special = np.arange(VOCAB) < 4
        vocabulary = Vocabulary(3, np.arange(4, 38), special, (np.zeros(VOCAB, bool), ~special))
        masks = Masking(vocabulary, 0.3)
        spans = Masking(vocabulary, 0.3, span_lengths(0.2, 10))
        return {
            "mlm": lambda: MaskedSource(split, FRAME, 48, params, masks),
            "pairs": lambda: NextSentenceSource(split, FRAME, 48, params, masks),
            "span": lambda: MaskedSource(split, FRAME, 48, params, spans),
            "corruption": lambda: CorruptionSource(split, FRAME, 48, params, list(range(47, 37, -1)), 0, 0.3, 3.0),
            "prefix": lambda: PrefixSource(split, FRAME, 48, params),
            "prefix pairs": lambda: PrefixSource(split, FRAME, 48, params, start=0),
        }[kind]()

    return make


def objective_of(kind: str) -> MaskedLM | CausalLM:
    return MaskedLM() if kind in ("mlm", "pairs", "span") else CausalLM()


def loss_and_gradients(model: Transformer, kind: str, batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    objective = objective_of(kind)
    weight = sum(objective.weight(batch) for batch in batches)
    total = 0.0
    for batch in batches:
        loss, _ = objective.loss(model, batch)
        (loss / weight).backward()
        total += float(loss.detach()) / weight
    zero = torch.zeros(())
    return total, [zero if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_padded_and_split_batches_have_one_loss_and_gradient(model_of, source_of, kind: str) -> None:
    model = model_of(kind)
    packed = source_of(kind).micro_batches(0)
    assert packed[0].tokens.shape[0] < 8 and packed[0].documents is not None
    expected, gradient = loss_and_gradients(model, kind, packed)
    for changes in ({"packing": "none"}, {"micro_batch": 3}, {"packing": "none", "micro_batch": 1}):
        loss, found = loss_and_gradients(model, kind, source_of(kind, **changes).micro_batches(0))
        assert loss == pytest.approx(expected, abs=2e-6)
        scale = max(float(g.abs().max()) for g in gradient)
        assert max(float((a - b).abs().max()) for a, b in zip(found, gradient, strict=True)) <= 2e-6 * max(1, scale)
    # The control: what was packed beside a sequence is seen.
    leaking = Batch(**{**vars(packed[0]), "documents": None, "source_documents": None})
    _, wrong = loss_and_gradients(model, kind, [leaking])
    assert max(float((a - b).abs().max()) for a, b in zip(wrong, gradient, strict=True)) > 1e-3 * max(1, scale)


def test_next_sentences_weigh_the_same_however_a_step_is_split(model_of, source_of) -> None:
    """The control of `balance`: with each part's own ratio the loss is another one."""
    model = model_of("pairs")
    parts = source_of("pairs", micro_batch=3).micro_batches(0)
    expected, _ = loss_and_gradients(model, "pairs", parts)
    own = [Batch(**{**vars(part), "balance": len(part.targets) / len(part.labels)}) for part in parts]
    assert abs(loss_and_gradients(model, "pairs", own)[0] - expected) > 1e-4


def test_bert_has_transformers_loss(model_of, source_of, tmp_path: Path) -> None:
    from transformers import BertForPreTraining

    model = model_of("pairs")
    save_model(model, tmp_path / "bert")
    peer = BertForPreTraining.from_pretrained(tmp_path / "bert").eval()
    (batch,) = source_of("pairs", packing="none").micro_batches(0)
    labels = torch.full(batch.tokens.shape, -100).flatten()
    labels[batch.picks] = batch.targets
    given = {
        "input_ids": batch.tokens,
        "attention_mask": (batch.documents != -1).long(),
        "token_type_ids": batch.segments,
        "labels": labels.view_as(batch.tokens),
    }
    expected = peer(**given, next_sentence_label=batch.labels).loss.item()
    found, _ = loss_and_gradients(model, "pairs", [batch])
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(peer(**given, next_sentence_label=1 - batch.labels).loss.item() - expected) > 1e-2


def test_t5_has_transformers_loss(model_of, source_of, tmp_path: Path) -> None:
    from transformers import T5ForConditionalGeneration

    model = model_of("corruption")
    save_model(model, tmp_path / "t5")
    peer = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").eval()
    (batch,) = source_of("corruption", packing="none").micro_batches(0)
    labels = torch.full(batch.tokens.shape, -100).flatten()
    labels[batch.picks] = batch.targets
    mask = (batch.source_documents != -1).long()
    out = peer(input_ids=batch.source, attention_mask=mask, labels=labels.view_as(batch.tokens))
    assert loss_and_gradients(model, "corruption", [batch])[0] == pytest.approx(out.loss.item(), abs=1e-5)
    unmasked = peer(input_ids=batch.source, labels=labels.view_as(batch.tokens))
    assert abs(unmasked.loss.item() - out.loss.item()) > 1e-4


def test_the_boundary_objective_is_the_papers(model_of, source_of) -> None:
    """Computed again in numpy: h = LN(GELU(W [x_(s-1); x_(e+1); p])) twice, scored by the embedding."""
    model = model_of("span")
    (batch,) = source_of("span", packing="none").micro_batches(0)
    _, further = MaskedLM().loss(model, batch)
    x = states(model, batch).detach().double().numpy().reshape(-1, 32)
    weights = {name: p.detach().double().numpy() for name, p in model.auxiliary["boundary"].named_parameters()}
    total = 0.0
    tokens, width = batch.tokens.numpy().copy().reshape(-1), batch.tokens.shape[1]
    tokens[batch.picks.numpy()] = -1
    for place, target in zip(batch.picks.tolist(), batch.targets.tolist(), strict=True):
        left = max(at for at in range(place - place % width, place) if tokens[at] != -1)
        right = min(at for at in range(place, place - place % width + width) if tokens[at] != -1)
        h = np.concatenate([x[left], x[right], weights["positions.weight"][place - left - 1]])
        for name in ("first", "second"):
            h = weights[f"{name}.weight"] @ h + weights[f"{name}.bias"]
            h = h * (1 + erf(h / np.sqrt(2))) / 2
            h = (h - h.mean()) / np.sqrt(h.var() + 1e-5)
            h = h * weights[f"{name}_norm.weight"] + weights[f"{name}_norm.bias"]
        total -= log_softmax(model.embedding.weight.detach().double().numpy() @ h)[target]
    assert further["boundary_loss"].item() == pytest.approx(total, rel=1e-5)
    shifted = batch.boundaries.clone()
    shifted[:, 0] += 1  # the inner token instead of the outer
    _, wrong = MaskedLM().loss(model, Batch(**{**vars(batch), "boundaries": shifted}))
    assert abs(wrong["boundary_loss"].item() - total) > 1e-2


def test_a_prefix_sees_itself_and_nothing_sees_ahead_of_it(model_of) -> None:
    model = model_of("prefix")
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 38, 20)
    piece = Piece(ids[:-1], np.arange(7, 19), ids[8:], prefix=8)

    def found(changed: int | None, prefix: bool = True) -> torch.Tensor:
        read = piece.ids.copy()
        if changed is not None:
            read[changed] = (read[changed] + 1 - 4) % 34 + 4
        batch = lay_out([Piece(read, piece.places, piece.targets, prefix=8 if prefix else 0)], 64)
        with torch.no_grad():
            return states(model, batch)[0, :19]

    def moved(changed: int, prefix: bool = True) -> list[int]:
        return torch.nonzero((found(changed, prefix) - found(None, prefix)).abs().amax(-1) > 1e-6)[:, 0].tolist()

    assert moved(7) == list(range(19))  # the prefix's end is seen from its start
    assert moved(8) == list(range(8, 19))
    assert moved(12) == list(range(12, 19))
    assert moved(7, prefix=False) == list(range(7, 19))  # the control: causal
