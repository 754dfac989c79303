"""The whole transformer in one file, read top to bottom: model, block, attention, feed-forward, norm, initialisation.

Built from `ModelConfig`; which norm, positions and feed-forward a family uses are its `Traits`. Notable:

* LLaMA family: RMSNorm, rotary positions (half-split, as Hugging Face), grouped-query attention, SwiGLU, no biases;
  Qwen3 adds RMSNorm over each head's queries and keys
* GPT-2 family: LayerNorm, learned positions, GELU (tanh), biases
* pre-norm residual blocks, head tied to the embedding or not, no dropout
* packed documents, and a key/value cache whose rows may differ in length
* logits equal those of transformers (`llmctl/nn/hf.py` maps the weights)

Letters in shapes: B batch, T tokens, D model width, H query heads, KV key/value heads, d head width, F feed-forward
width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from llmctl.errors import UsageError
from llmctl.nn.attention import AttentionContext, KVCache, Slots, attention, cache_mask, document_mask, rotary_angles
from llmctl.nn.config import ModelConfig


class Transformer(nn.Module):
    """A decoder-only language model. Fresh weights come from torch's global generator: seed it before."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.context, config.dim) if config.traits.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.unembedding = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        initialise(self)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """Logits `(B, T, V)` of the token after each of `tokens (B, T)`; the arguments are those of `hidden`."""
        return self.head(self.hidden(tokens, positions, documents, cache, context))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """Normed states `(B, T, D)` from which `head` makes logits.

        `positions (B, T)` int64: where each token stands; by default 0 … T - 1, or on from the cache's end.
        `documents (B, T)` int: ids of packed documents; a token sees only earlier tokens of its own document. Reset
        `positions` at each document's start if documents are to be computed as if alone.
        `cache`: keys and values are written to it and attention reaches back over it; not with `documents`.
        `context`: an attention backend's own, instead of the one built from the arguments above.
        Raises UsageError for more tokens than the context.
        """
        if context is None:
            context = self.attention_context(tokens, positions, documents, cache)
        x = self.embed(tokens, positions, context.slots)
        for block in self.blocks:
            x = block(x, context)
        if cache is not None and context.slots is not None:
            cache.length = max(cache.length, context.slots.end)
        return self.norm(x)  # type: ignore[no-any-return]

    def embed(self, tokens: Tensor, positions: Tensor | None = None, slots: Slots | None = None) -> Tensor:
        """What enters the first block, `(B, T, D)`: token embeddings and, where they are learned, positions."""
        x: Tensor = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(self._positions(tokens, positions, slots))
        return x

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `(…, V)` of states `(…, D)`; training may select the supervised positions before."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The matrix `(V, D)` of the output head: its own, or the embedding's."""
        return self.embedding.weight if self.unembedding is None else self.unembedding.weight

    def attention_context(
        self, tokens: Tensor, positions: Tensor | None, documents: Tensor | None, cache: KVCache | None
    ) -> AttentionContext:
        """Rotary angles, mask and cache slots of one forward, computed once for all layers."""
        length = tokens.shape[1]
        # While tracing, the length is symbolic and a comparison would pin it.
        if not torch.compiler.is_compiling() and length > self.config.context:
            raise _too_long(length, self.config.context)
        slots = None
        if cache is not None:
            if documents is not None:
                raise UsageError("packed documents cannot be combined with a cache")
            slots = self._slots(length, positions, cache)
        mask = None
        if documents is not None:
            mask = document_mask(documents)
        elif slots is not None and (slots.positions is not None or (slots.start > 0 and length > 1)):
            mask = cache_mask(self._positions(tokens, positions, slots), slots.end)
        rotary = None
        if self.config.traits.positions == "rope":
            where = self._positions(tokens, positions, slots)
            rotary = rotary_angles(where, self.config.head_dim, self.config.rope_theta)
        # is_causal aligns at the top left, so it is right only where the queries are all the tokens there are; a
        # single query at the end of the cache sees everything.
        return AttentionContext(
            causal=slots is None or slots.start == 0, mask=mask, rotary=rotary, cache=cache, slots=slots
        )

    def _slots(self, length: int, positions: Tensor | None, cache: KVCache) -> Slots:
        if positions is None:
            slots = Slots(cache.length, cache.length + length)
        else:
            last = int(positions.max()) + 1
            slots = Slots(0, max(last, cache.length), positions)
        limit = min(cache.capacity, self.config.context)
        if slots.end > limit:
            raise _too_long(slots.end, limit)
        return slots

    def _positions(self, tokens: Tensor, positions: Tensor | None, slots: Slots | None) -> Tensor:
        """`(1, T)` by default: equal positions of all rows are computed once."""
        if positions is not None:
            return positions
        start = 0 if slots is None else slots.start
        return torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]


def _too_long(length: int, limit: int) -> UsageError:
    return UsageError(
        f"{length} tokens do not fit the model's context of {limit}",
        hint="shorten the sequence or use a model with a longer context",
    )


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x (B, T, D)` to `(B, T, D)`."""
        x = x + self.attention(self.attention_norm(x), context)
        return x + self.ffn(self.ffn_norm(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Projections around `llmctl.nn.attention.attention`.

    Query, key and value stay separate matrices: Muon orthogonalises each by itself, and Hugging Face stores them so.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        bias, q_dim, kv_dim = config.traits.bias, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.dim, q_dim, bias=bias)
        self.k = nn.Linear(config.dim, kv_dim, bias=bias)
        self.v = nn.Linear(config.dim, kv_dim, bias=bias)
        self.out = nn.Linear(q_dim, config.dim, bias=bias)
        qk_norm = config.traits.qk_norm
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if qk_norm else None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x (B, T, D)` to `(B, T, D)`."""
        q, k, v = self.project(x)
        return self.out(attention(q, k, v, self.layer, context))  # type: ignore[no-any-return]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, T, H, d)`, keys and values `(B, T, KV, d)`, before the rotary positions."""
        q = self.q(x).unflatten(-1, (-1, self.head_dim))
        k = self.k(x).unflatten(-1, (-1, self.head_dim))
        v = self.v(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class FeedForward(nn.Module):
    """down(silu(gate x) * up x) (SwiGLU, arXiv 2002.05202), or down(gelu_tanh(up x)) without a gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = config.traits.bias
        gated = config.traits.ffn == "swiglu"
        self.gate = nn.Linear(config.dim, config.ff_dim, bias=bias) if gated else None
        self.up = nn.Linear(config.dim, config.ff_dim, bias=bias)
        self.down = nn.Linear(config.ff_dim, config.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x (…, D)` to `(…, D)`."""
        return self.down(self.inner(x))  # type: ignore[no-any-return]

    def inner(self, x: Tensor) -> Tensor:
        """What `down` reads, `(…, F)`; pruning measures its channels."""
        if self.gate is None:
            return F.gelu(self.up(x), approximate="tanh")
        return F.silu(self.gate(x)) * self.up(x)  # type: ignore[no-any-return]


def make_norm(config: ModelConfig) -> nn.Module:
    """The family's norm over D."""
    kind = nn.LayerNorm if config.traits.norm == "layer" else nn.RMSNorm
    return kind(config.dim, eps=config.norm_eps)


def initialise(model: Transformer) -> None:
    """Fresh weights.

    | Parameter               | Value                                         | Why                                |
    |-------------------------|-----------------------------------------------|------------------------------------|
    | embedding, untied head  | normal, std 1 / (2 sqrt(D))                   | logits of order 1 at any width     |
    | learned positions       | normal, std 0.02                              | GPT-2                              |
    | q, k, v, gate, up       | normal, std 1 / sqrt(D)                       | keeps the scale at any width       |
    | out, down               | normal, std 1 / (10 sqrt(fan-in * 2 layers))  | blocks start close to the identity |
    | norms                   | 1 (bias 0)                                    |                                    |
    | biases                  | 0                                             |                                    |

    Small `out` and `down` and the embedding's scale are worth .2 nats after 150 steps of 2048 tokens with Muon (D 128,
    4 layers, vocabulary 2048, two seeds: 4.83 and 4.78 to 4.62). Exactly 0 is as good, but then a fresh model would
    compute the same whatever its attention does, and could test nothing.
    """
    depth = 2 * model.config.layers
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        kind = name.split(".")[-2]
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif kind in ("embedding", "unembedding"):
            nn.init.normal_(parameter, std=0.5 * model.config.dim**-0.5)
        elif kind == "positions":
            nn.init.normal_(parameter, std=0.02)
        elif kind in ("out", "down"):
            nn.init.normal_(parameter, std=0.1 * (parameter.shape[1] * depth) ** -0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            nn.init.ones_(parameter)
