"""Heads on a pre-trained model and what they minimise: classes of texts and tokens, answers in a text, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.errors import UsageError
from llmctl.nn.attention import PADDING
from llmctl.nn.config import Head
from llmctl.nn.transformer import Transformer
from llmctl.text.pooling import Pooling
from llmctl.train.batches import Batch
from llmctl.train.cross_entropy import hits
from llmctl.train.objectives import states


def with_head(model: Transformer, head: Head, labels: Sequence[str], seed: int) -> Transformer:
    """`model` with another head: what both have keeps its weights, the rest is fresh, a function of the seed.

    The model itself if it has this head and these labels. UsageError if its kind cannot have it.
    """
    config = model.config
    if config.head == head and config.labels == tuple(labels):
        return model
    if config.traits.kind == "encoder-decoder":
        raise UsageError(
            f"{config.arch} is an encoder-decoder and has no head {head}", hint="use an encoder, or task: seq2seq"
        )
    torch.manual_seed(seed)
    made = Transformer(replace(config, head=head, labels=tuple(labels)))
    kept, wanted = model.state_dict(), made.state_dict()
    # Classes of another task are no start for these.
    fitting = {name: kept[name] for name in wanted if name in kept and not name.startswith("classifier")}
    made.load_state_dict({**wanted, **fitting})
    return made


class Classify:
    """Cross-entropy of a class for each pick of a batch: one per text, or one per word."""

    def weight(self, batch: Batch) -> int:
        """Texts, or words."""
        return len(batch.targets)

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of -log p(class), with `accuracy`."""
        picked = states(model, batch).flatten(0, 1).index_select(0, batch.picks)
        logits = model.answer(picked[:, None]).flatten(0, -2).float()
        return F.cross_entropy(logits, batch.targets, reduction="sum"), {"accuracy": hits(logits, batch.targets)}


class AnswerSpans:
    """Extractive question answering: half of -log p(first token) - log p(last token), among the tokens of the context.

    `Batch.picks` are the first and the last token of each answer in turn, `Batch.candidates` those of the contexts.
    """

    def weight(self, batch: Batch) -> int:
        """Questions."""
        return len(batch.picks) // 2

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over questions, with `accuracy`: how many have both ends right."""
        assert batch.candidates is not None
        scores = model.answer(states(model, batch)).flatten(0, 1).float()
        among = torch.nonzero(batch.candidates.flatten())[:, 0]
        owner = sequence_of(batch)[among][:, None].expand(-1, 2)
        count, candidates = self.weight(batch), scores[among]
        blank = scores.new_full((count, 2), -torch.inf)
        best = blank.scatter_reduce(0, owner, candidates, "amax").detach()
        mass = torch.zeros_like(best).scatter_add(0, owner, (candidates - best.gather(0, owner)).exp())
        first, last = batch.picks[0::2], batch.picks[1::2]
        right = torch.stack([scores[first, 0], scores[last, 1]], dim=-1)
        loss = (best + mass.log() - right).sum() / 2
        return loss, {"accuracy": (right == best).all(-1).sum().float()}


@dataclass(frozen=True)
class SentencePairs:
    """Multiple-negatives ranking (1705.00652, section 4.4): which second text of a batch belongs to a first one?

    Scores are cosines over `temperature`; the batch's sequences are first and second texts in turn.
    """

    pooling: Pooling
    temperature: float

    def weight(self, batch: Batch) -> int:
        """Pairs."""
        assert batch.firsts is not None
        return len(batch.firsts) // 2

    def loss(self, model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of -log p(its own second text), with `accuracy`."""
        vectors = F.normalize(pool(states(model, batch), batch, self.pooling).float(), dim=-1)
        scores = vectors[0::2] @ vectors[1::2].T / self.temperature
        own = torch.arange(len(scores), device=scores.device)
        return F.cross_entropy(scores, own, reduction="sum"), {"accuracy": hits(scores, own)}


def pool(hidden: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
    """One vector per sequence of the batch, `(C, D)`: the mean of its states `(B, T, D)`, or its first one."""
    assert batch.firsts is not None
    flat = hidden.flatten(0, 1)
    if pooling == "cls":
        return flat.index_select(0, batch.firsts)
    owner = sequence_of(batch)
    real = torch.nonzero(owner != PADDING)[:, 0]
    count = len(batch.firsts)
    sums = flat.new_zeros(count, flat.shape[1]).index_add(0, owner[real], flat[real])
    return sums / torch.bincount(owner[real], minlength=count)[:, None]


def sequence_of(batch: Batch) -> Tensor:
    """`(B * T,)`, the number of the sequence that each token belongs to, PADDING for none."""
    if batch.documents is not None:
        return batch.documents.flatten()
    rows, width = batch.tokens.shape
    return torch.arange(rows, device=batch.tokens.device).repeat_interleave(width)
