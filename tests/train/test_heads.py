"""Losses of heads against transformers' own and sums by hand, packed or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from llmctl.errors import UsageError
from llmctl.nn.hf import save_model
from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch, Piece, lay_out
from llmctl.train.heads import AnswerSpans, Classify, SentencePairs, pool, with_head
from llmctl.train.objectives import states

SIZES = (5, 14, 9, 22, 7, 11)
LABELS = ("x", "y", "z")


@pytest.fixture
def model_of(make_model) -> Callable[..., Transformer]:
    def make(head: str, **changes: object) -> Transformer:
        labels = LABELS if "classification" in head else ()
        shape = {"arch": "bert", "token_types": 2, "kv_heads": 4, "context": 64, "pad_id": 0}
        model = make_model(head=head, labels=labels, **{**shape, **changes})
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


def pieces(head: str) -> list[Piece]:
    rng = np.random.default_rng(0)
    found = []
    for size in SIZES:
        ids, segments = rng.integers(4, 48, size), (np.arange(size) >= size // 2).astype(np.int64)
        if head == "classification":
            found.append(Piece(ids, np.array([0]), rng.integers(0, 3, 1), segments))
        elif head == "token-classification":
            places = np.sort(rng.choice(size, 3, replace=False))
            found.append(Piece(ids, places, rng.integers(0, 3, 3), segments))
        elif head == "question-answering":
            ends = np.sort(rng.choice(np.arange(size // 2, size), 2))
            found.append(Piece(ids, ends, np.zeros(2, np.int64), segments, candidates=segments == 1))
        else:
            none = np.zeros(0, np.int64)
            found.append(Piece(ids, none, none, segments, label=0))
    return found


OBJECTIVES = {
    "classification": Classify(),
    "token-classification": Classify(),
    "question-answering": AnswerSpans(),
    "features": SentencePairs("mean", 0.1),
}


def loss_of(model: Transformer, head: str, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return OBJECTIVES[head].loss(model, batch)[0]


@pytest.mark.parametrize("head", OBJECTIVES)
def test_packed_and_padded_batches_have_one_loss(model_of, head: str) -> None:
    model, rows = model_of(head), pieces(head)
    packed, padded = (lay_out(rows, 64, packed, causal=False) for packed in (True, False))
    assert packed.tokens.shape[0] < padded.tokens.shape[0] == len(rows)
    assert float(loss_of(model, head, packed)) == pytest.approx(float(loss_of(model, head, padded)), rel=1e-5)
    if head != "features":  # there the other rows are the wrong answers
        alone = sum(float(loss_of(model, head, lay_out([row], 64, False, False))) for row in rows)
        assert float(loss_of(model, head, packed)) == pytest.approx(alone, rel=1e-5)


CLASSES = {
    "classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
}


@pytest.mark.parametrize("head", CLASSES)
def test_losses_are_transformers(model_of, tmp_path: Path, head: str) -> None:
    import transformers

    model, rows = model_of(head), pieces(head)
    save_model(model, tmp_path / "model")
    peer = getattr(transformers, CLASSES[head]).from_pretrained(tmp_path / "model").eval()
    if head != "question-answering":
        assert peer.config.id2label == dict(enumerate(LABELS))
    found = expected = 0.0
    for row in rows:
        if head == "question-answering":  # transformers looks for the answer among all tokens
            row = Piece(row.ids, row.places, row.targets, row.segments, candidates=np.ones(len(row.ids), bool))
        batch = lay_out([row], 64, False, False)
        objective = OBJECTIVES[head]
        found += float(loss_of(model, head, batch)) / objective.weight(batch)
        width, size = batch.tokens.shape[1], len(row.ids)
        real = (torch.arange(width)[None] < size).long()
        given = {"input_ids": batch.tokens[:, :size], "token_type_ids": batch.segments[:, :size]}
        given["attention_mask"] = real[:, :size]
        if head == "classification":
            given["labels"] = batch.targets
        elif head == "token-classification":
            labels = torch.full((1, size), -100)
            labels[0, batch.picks] = batch.targets
            given["labels"] = labels
        else:
            given |= {"start_positions": batch.picks[:1], "end_positions": batch.picks[1:]}
        with torch.no_grad():
            expected += float(peer(**given).loss)
    assert found == pytest.approx(expected, rel=1e-5)


def test_answers_are_looked_for_in_the_context_alone(model_of) -> None:
    model, rows = model_of("question-answering"), pieces("question-answering")
    batch = lay_out(rows, 64, False, False)
    with torch.no_grad():
        scores = model.answer(states(model, batch))
        loss, further = AnswerSpans().loss(model, batch)
    total, right = 0.0, 0
    for number, row in enumerate(rows):
        logits = scores[number, : len(row.ids)].masked_fill(~torch.tensor(row.candidates)[:, None], -torch.inf)
        logs = logits.log_softmax(0)
        total -= float(logs[row.places[0], 0] + logs[row.places[1], 1]) / 2
        right += bool((logs.argmax(0) == torch.tensor(row.places)).all())
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert float(further["accuracy"]) == right


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pairs_are_ranked_by_the_cosines_of_pooled_states(model_of, pooling: str) -> None:
    model, rows = model_of("features"), pieces("features")
    vectors = []
    for row in rows:
        with torch.no_grad():
            hidden = model.hidden(torch.tensor(row.ids)[None], segments=torch.tensor(row.segments)[None])[0]
        vectors.append(F.normalize(hidden.mean(0) if pooling == "mean" else hidden[0], dim=-1))
    first, second = torch.stack(vectors[0::2]), torch.stack(vectors[1::2])
    expected = F.cross_entropy(first @ second.T / 0.1, torch.arange(3), reduction="sum")
    for packed in (True, False):
        batch = lay_out(rows, 64, packed, False)
        with torch.no_grad():
            loss, _ = SentencePairs(pooling, 0.1).loss(model, batch)  # type: ignore[arg-type]
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        assert SentencePairs("mean", 0.1).weight(batch) == 3
    batch = lay_out(rows, 64, True, False)
    with torch.no_grad():
        hidden = states(model, batch)
    assert not torch.allclose(pool(hidden, batch, "mean"), pool(hidden, batch, "cls"), atol=1e-3)


def test_a_new_head_keeps_what_the_model_knows(model_of) -> None:
    model = model_of("pretraining")
    made = with_head(model, "classification", LABELS, seed=3)
    assert made.config.labels == LABELS and made.config.head == "classification"
    shared = {n for n, _ in model.named_parameters()} & {n for n, _ in made.named_parameters()}
    assert "pooler.weight" in shared and "blocks.1.ffn.up.weight" in shared
    for name in shared:
        assert torch.equal(model.get_parameter(name), made.get_parameter(name))
    again = with_head(model, "classification", LABELS, seed=3)
    assert torch.equal(made.classifier.out.weight, again.classifier.out.weight)
    other = with_head(model, "classification", LABELS, seed=4)
    assert not torch.equal(made.classifier.out.weight, other.classifier.out.weight)
    assert with_head(made, "classification", LABELS, 0) is made
    with pytest.raises(UsageError, match="t5 is an encoder-decoder and has no head classification"):
        with_head(model_of("lm", arch="t5", token_types=0), "classification", LABELS, 0)
