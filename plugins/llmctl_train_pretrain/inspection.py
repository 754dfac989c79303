"""What `llmctl inspect` finds out about a model and a text: tokens, distributions, attention, lengths of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmctl.errors import InputError, UsageError
from llmctl.generator import Sampling
from llmctl.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llmctl.nn.inspected import Record
    from llmctl.nn.transformer import Transformer


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    id: int
    text: str


@dataclass(frozen=True)
class Choice:
    """One outcome of a distribution."""

    text: str
    probability: float
    logprob: float
    id: int | None = None


@dataclass(frozen=True)
class Prediction:
    """What the model says at one place."""

    at: int | None
    """Index of the token whose state was read; None for the whole text."""
    what: str
    """`next`, `masked`, `label`, `start` or `end`: what the choices are for."""
    choices: tuple[Choice, ...]
    """The likeliest ones."""
    entropy: float
    """Of the whole distribution, in nats."""
    actual: Choice | None = None
    """What really stands there, where something does."""
    rank: int | None = None
    """Of the actual one, from 1."""
    sampled: tuple[Choice, ...] | None = None
    """After temperature, top-k and top-p; None where none was asked for."""


@dataclass
class Stack:
    """Attention and lengths of an encoder or a decoder, layer by layer."""

    name: str
    maps: list[np.ndarray]
    """`(H, T, T)` per layer."""
    cross: list[np.ndarray]
    """`(H, T, S)` per layer; empty without an encoder."""
    residual: list[np.ndarray]
    """`(T,)`: what enters, then what leaves each layer. This and what follows: empty of an exported graph."""
    attention: list[np.ndarray]
    feed_forward: list[np.ndarray]
    cross_added: list[np.ndarray] = field(default_factory=list)


@dataclass
class Inspection:
    """Everything about one model and one text."""

    model: str
    backend: str
    kind: str
    head: str
    tokens: list[Token]
    """What the states that are read belong to: of an encoder-decoder, the target."""
    source: list[Token]
    """What the encoder of an encoder-decoder reads; empty elsewhere."""
    predictions: list[Prediction]
    sampling: Sampling | None
    stacks: list[Stack] = field(default_factory=list)
    """Empty where the model does not let one look inside."""
    closed: str = ""
    """Then: why."""

    def to_dict(self, maps: bool = False) -> dict[str, Any]:
        """Plain JSON; with `maps` the attention weights as well."""
        return {
            "model": self.model,
            "backend": self.backend,
            "kind": self.kind,
            "head": self.head,
            "tokens": [asdict(token) for token in self.tokens],
            "source": [asdict(token) for token in self.source],
            "sampling": None if self.sampling is None else asdict(self.sampling),
            "predictions": [asdict(prediction) for prediction in self.predictions],
            "closed": self.closed,
            "stacks": [_stack_dict(stack, maps) for stack in self.stacks],
        }


def _stack_dict(stack: Stack, maps: bool) -> dict[str, Any]:
    names = ("maps", "cross", "residual", "attention", "feed_forward", "cross_added")
    wanted = names if maps else names[2:]
    values: dict[str, Any] = {
        name: [np.round(layer.astype(float), 6).tolist() for layer in getattr(stack, name)] for name in wanted
    }
    return {"name": stack.name, "heads": [looks(layer) for layer in stack.maps], **values}


def looks(weights: np.ndarray) -> list[dict[str, float]]:
    """Where each head of `weights (H, T, T)` looks, as means over the tokens: at itself, the token before, the first.

    `entropy` is that of the weights in nats, `distance` how far away they lie on average.
    """
    length = weights.shape[-1]
    index = np.arange(length)
    away = np.abs(index[:, None] - index[None])
    rows = []
    for head in weights.astype(np.float64):
        logs = np.log(np.where(head > 0, head, 1.0))
        previous = head[index[1:], index[:-1]]
        rows.append(
            {
                "self": float(np.diagonal(head).mean()),
                "previous": float(previous.mean()) if length > 1 else 0.0,
                "first": float(head[:, 0].mean()),
                "entropy": float(-(head * logs).sum(-1).mean()),
                "distance": float((head * away).sum(-1).mean()),
            }
        )
    return rows


# -- distributions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Turns logits into predictions over a vocabulary."""

    names: Sequence[str] | None
    """Names of the outcomes; None: the tokens of `tokenizer`."""
    tokenizer: Tokenizer
    top: int
    sampling: Sampling | None = None

    def text(self, id: int) -> str:
        """The name of outcome number `id`."""
        return self.tokenizer.decode([id], skip_special=False) if self.names is None else self.names[id]

    def predict(self, logits: np.ndarray, at: int | None, what: str, actual: int | None = None) -> Prediction:
        """The likeliest outcomes of `logits (V,)`."""
        scores = logits.astype(np.float64)
        scores = scores - scores.max()
        logprobs = scores - np.log(np.exp(scores).sum())
        order = np.argsort(-logprobs, kind="stable")[: self.top]
        probabilities = np.exp(logprobs)
        entropy = float(-(probabilities * np.where(probabilities > 0, logprobs, 0.0)).sum())
        rank = None if actual is None else 1 + int(np.count_nonzero(logprobs > logprobs[actual]))
        return Prediction(
            at,
            what,
            tuple(self._choice(int(id), float(logprobs[id])) for id in order),
            entropy,
            None if actual is None else self._choice(actual, float(logprobs[actual])),
            rank,
            None if self.sampling is None or self.names is not None else self._sampled(logits, self.sampling),
        )

    def _choice(self, id: int, logprob: float) -> Choice:
        return Choice(self.text(id), float(np.exp(logprob)), logprob, id if self.names is None else None)

    def _sampled(self, logits: np.ndarray, sampling: Sampling) -> tuple[Choice, ...]:
        from llmctl.ort.sampling import candidates

        if sampling.temperature == 0:
            best = int(logits.argmax())
            return (Choice(self.text(best), 1.0, 0.0, best),)
        ids, probabilities = candidates(logits, sampling)
        return tuple(
            Choice(self.text(int(id)), float(p), float(np.log(p)) if p > 0 else -np.inf, int(id))
            for id, p in zip(ids[: self.top], probabilities[: self.top], strict=True)
        )


def next_tokens(reader: Reader, logits: np.ndarray, ids: Sequence[int]) -> list[Prediction]:
    """At every token of a decoder, what comes after it; `logits (T, V)`."""
    following: list[int | None] = [*ids[1:], None]
    return [
        reader.predict(row, at, "next", actual) for at, (row, actual) in enumerate(zip(logits, following, strict=True))
    ]


def masked_tokens(reader: Reader, logits: np.ndarray, ids: Sequence[int]) -> list[Prediction]:
    """What an encoder puts at its masked tokens; without any, what it puts at every token."""
    mask = reader.tokenizer.mask_id
    places = [at for at, id in enumerate(ids) if id == mask]
    if places:
        return [reader.predict(logits[at], at, "masked") for at in places]
    return [reader.predict(logits[at], at, "masked", id) for at, id in enumerate(ids)]


# -- models -----------------------------------------------------------------------------------------------------------


def tokens_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Token]:
    """The tokens with the text of each; part of a character reads as U+FFFD."""
    return [Token(id, tokenizer.decode([id], skip_special=False)) for id in ids]


def encode(tokenizer: Tokenizer, text: str, kind: str) -> list[int]:
    """The ids that a model of this kind reads; the texts of special tokens (`[MASK]`) become those tokens."""
    ids = tokenizer.encode(text, special=True)
    if kind != "decoder":
        return tokenizer.frame_document(ids)
    return ids if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def check_text(ids: Sequence[int]) -> None:
    """UsageError for a text without tokens."""
    if not ids:
        raise UsageError("the text is empty", hint="give --text, or pipe a text into the command")


def inspect_model(
    name: str,
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    target: str | None,
    top: int,
    sampling: Sampling | None,
) -> Inspection:
    """Run `model` once over the text with everything recorded; `target`: what an encoder-decoder has written so far."""
    import torch

    from llmctl.nn.inspected import recording

    kind, head = model.config.traits.kind, model.config.head
    device = model.embedding.weight.device
    if (target is not None) and kind != "encoder-decoder":
        raise UsageError(f"a target has no meaning for {model.config.arch}, {kind}", hint="leave --target out")
    ids = encode(tokenizer, text, kind)
    check_text(ids)
    source: list[int] = []
    with torch.inference_mode(), recording(model) as record:
        memory = None
        if kind == "encoder-decoder":
            source, ids = ids, [model.config.decoder_start_id or 0, *tokenizer.encode(target or "", special=True)]
            memory = model.remember(torch.tensor([source], device=device))
        states = model.hidden(torch.tensor([ids], device=device), memory=memory)
        outputs = _outputs(model, states)
    backend = f"torch {device} {str(model.embedding.weight.dtype).removeprefix('torch.')}"
    tokens, read = tokens_of(tokenizer, ids), tokens_of(tokenizer, source)
    found = Inspection(name, backend, kind, head, tokens, read, [], sampling, _stacks(record))
    found.predictions = predictions_of(found, outputs, model.config.labels, tokenizer, top)
    return found


def _outputs(model: Transformer, states: Any) -> np.ndarray | None:
    """What the head makes of the states, without the batch; None for a model without one."""
    if model.config.head == "features":
        return None
    made = model.answer(states) if model.classifier is not None else model.head(states)
    return made[0].float().cpu().numpy()


def predictions_of(
    found: Inspection, outputs: np.ndarray | None, labels: Sequence[str], tokenizer: Tokenizer, top: int
) -> list[Prediction]:
    """The distributions in what a head gave: logits per token, per class, or start and end of an answer `(T, 2)`."""
    if outputs is None:
        return []
    ids = [token.id for token in found.tokens]
    if found.head == "classification":
        return [Reader(labels, tokenizer, top).predict(outputs, None, "label")]
    if found.head == "token-classification":
        reader = Reader(labels, tokenizer, top)
        return [reader.predict(row, at, "label") for at, row in enumerate(outputs)]
    if found.head == "question-answering":
        reader = Reader([f"{at} {token.text}" for at, token in enumerate(found.tokens)], tokenizer, top)
        return [reader.predict(outputs[:, column], None, what) for column, what in enumerate(("start", "end"))]
    if len(outputs) and outputs.shape[-1] < tokenizer.vocab_size:
        raise InputError(
            f"the model has {outputs.shape[-1]} tokens, its tokenizer {tokenizer.vocab_size}",
            hint="use the tokenizer that the model was trained with",
        )
    reader = Reader(None, tokenizer, top, found.sampling)
    return (masked_tokens if found.kind == "encoder" else next_tokens)(reader, outputs, ids)


def _stacks(record: Record) -> list[Stack]:
    """The encoder first: it runs first."""
    stacks = []
    for name in sorted(record.maps, reverse=True):
        maps, norms = record.maps[name], record.norms[name]
        layers = {
            "maps": maps.own,
            "cross": maps.cross,
            "residual": norms.residual,
            "attention": norms.attention,
            "feed_forward": norms.feed_forward,
            "cross_added": norms.cross,
        }
        stacks.append(Stack(name, **{key: [layer[0].numpy() for layer in found] for key, found in layers.items()}))
    return stacks
