"""The whole transformer in one file, read top to bottom: model, encoder, block, attention, feed-forward, heads, norms,
initialisation.

Built from `ModelConfig`; how families differ is in their `Traits` (`llmctl/nn/config.py`), and each difference is one
line here:

* three kinds: a decoder reads what stands before (GPT, LLaMA), an encoder reads both sides (BERT), an encoder-decoder
  has one of each and the decoder also attends to what the encoder left (T5)
* positions: learned, sinusoidal, rotary with its scalings, T5's and ALiBi's biases, Transformer-XL's distances, or none
  (`llmctl/nn/positions.py`)
* attention: multi-head, grouped or single key/value heads; all of the sequence, a sliding window, or both in turn
  (`llmctl/nn/attention.py`)
* norms before each sub-layer, after its sum, or on both sides; RMSNorm or LayerNorm; with or without biases and gates
* what nanochat adds: embeddings of values, weights of the stream, backout, smear
* packed documents, and a key/value cache whose rows may differ in length
* logits equal those of transformers (`llmctl/nn/hf.py` maps the weights)

Letters in shapes: B batch, T tokens, S tokens attended to, D model width, H query heads, KV key/value heads, d head
width, F feed-forward width, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from llmctl.errors import UsageError
from llmctl.nn.attention import PADDING, AttentionContext, KVCache, Memory, Slots, angles_of, backend
from llmctl.nn.config import ModelConfig
from llmctl.nn.kernels import RMSNorm
from llmctl.nn.positions import alibi_slopes, rotary_angles, sinusoid, t5_bucket
from llmctl.nn.products import Linear, linear


class Transformer(nn.Module):
    """A language model of any kind. Fresh weights come from torch's global generator: seed it before."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, traits = config, config.traits
        self.backend = "sdpa"
        """How attention is computed: a name in `llmctl.nn.attention`."""
        self.loss_chunk = 0
        """Targets whose logits a loss holds at a time (`llmctl.train.cross_entropy`); 0: all."""
        self.loss: Callable[[Tensor, Tensor], Tensor] | None = None
        """How training takes the loss of states and targets; set by `llmctl.train.compilation`."""
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        learned = traits.positions == "learned"
        self.positions = nn.Embedding(config.context + traits.position_offset, config.dim) if learned else None
        self.segments = nn.Embedding(config.token_types, config.dim) if config.token_types else None
        self.embedding_norm = make_norm(config) if traits.embedding_norm else None
        self.smear_gate = Linear(config.smear_channels, 1, bias=False) if traits.smear else None
        self.smear = nn.Parameter(torch.empty(1)) if traits.smear else None
        pair = traits.kind == "encoder-decoder"
        self.encoder = Encoder(config) if pair else None
        self.relative = nn.Embedding(config.relative_buckets, config.heads) if traits.positions == "t5" else None
        self.blocks = nn.ModuleList(Block(config, layer, cross=pair) for layer in range(config.layers))
        self.backout = nn.Parameter(torch.empty(1)) if traits.backout else None
        self.norm = make_norm(config) if traits.final_norm else None
        words = config.head in ("lm", "mlm", "pretraining")
        untied = words and not config.tie_embeddings
        self.unembedding = Linear(config.dim, config.vocab_size, bias=False) if untied else None
        self.masked = MaskedHead(config) if config.head in ("mlm", "pretraining") else None
        self.pooler = Linear(config.dim, config.dim) if config.has_pooler else None
        self.next = Linear(config.dim, 2) if config.head == "pretraining" else None
        self.classifier = None if words or config.head == "features" else Classifier(config)
        initialise(self)
        self.auxiliary = nn.ModuleDict()
        """What only an objective needs (`llmctl/nn/auxiliary.py`): trained with the model, no part of its weights."""

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        context: AttentionContext | None = None,
        *,
        segments: Tensor | None = None,
        memory: Memory | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Logits `(B, T, V)` of the token after, or of encoders at, each of `tokens (B, T)`; arguments as `hidden`."""
        states = self.hidden(
            tokens, positions, documents, cache, context, segments=segments, memory=memory, prefix=prefix
        )
        return self.head(states)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        context: AttentionContext | None = None,
        *,
        segments: Tensor | None = None,
        memory: Memory | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """States `(B, T, D)` from which `head` makes logits; of an encoder-decoder, those of the decoder.

        `positions (B, T)` int64: where each token stands; by default 0 … T - 1, or on from the cache's end.
        `documents (B, T)` int: ids of packed documents, PADDING for none; a token sees only its own document, and in a
        decoder only what comes before. Reset `positions` at each document's start if documents are to be computed as if
        alone. `cache`: keys and values are written to it and attention reaches back over it; not with `documents`.
        `segments (B, T)` int64: BERT's token types, 0 by default. `memory`: what `remember` returned; an
        encoder-decoder needs it. `prefix (B, T)` bool: tokens that their whole document sees.
        `context`: an attention backend's own, instead of the one built from the arguments above.
        Raises UsageError for more tokens than the context.
        """
        if context is None:
            context = self.attention_context(tokens, positions, documents, cache, memory=memory, prefix=prefix)
        x = self.enter(tokens, context, positions, segments)
        for layer, block in enumerate(self.blocks):
            x = block(x, context)
            if layer == len(self.blocks) // 2:
                middle = x
        if self.backout is not None:
            x = x - self.backout * middle
        if cache is not None and context.slots is not None:
            cache.length = max(cache.length, context.slots.end)
        return x if self.norm is None else self.norm(x)

    def enter(
        self,
        tokens: Tensor,
        context: AttentionContext,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """What `embed` gives, with what the blocks read of it beside `x` left in `context`."""
        x = self.embed(tokens, positions, context.slots, segments)
        if self.smear is not None and self.smear_gate is not None:
            before = context.before(tokens)
            there = (before >= 0).to(x.dtype)[..., None]
            gate = self.smear * torch.sigmoid(self.smear_gate(x[..., : self.smear_gate.in_features]))
            x = x + gate * there * self.embed(before.clamp(min=0), positions, context.slots)
        context.tokens, context.start = tokens, x
        return x

    def embed(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        slots: Slots | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """What enters the first block, `(B, T, D)`: token embeddings and, where they are added, positions, segments."""
        x: Tensor = self.embedding(tokens)
        if self.config.traits.scale_embedding:
            x = x * torch.tensor(self.config.dim**0.5, dtype=x.dtype, device=x.device)
        if self.positions is not None:
            x = x + self.positions(self._positions(tokens, positions, slots) + self.config.traits.position_offset)
        elif self.config.traits.positions == "sinusoidal":
            x = x + sinusoid(self._positions(tokens, positions, slots), self.config.dim).to(x.dtype)
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(tokens) if segments is None else segments)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return F.dropout(x, self.config.dropout, self.training)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `(…, V)` of states `(…, D)`; training may select the supervised positions before."""
        if self.masked is not None:
            return linear(self.masked(hidden), self.head_weight, self.masked.bias)
        if self.config.traits.scale_tied_head and self.unembedding is None:
            hidden = hidden * self.config.dim**-0.5
        logits = linear(hidden, self.head_weight)
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def set_dropout(self, share: float) -> None:
        """From now on, zero this share in training."""
        self.config = replace(self.config, dropout=share)
        for module in self.modules():
            if isinstance(module, Block | Classifier):
                module.dropout = share

    @property
    def head_weight(self) -> Tensor:
        """The matrix `(V, D)` of the output head: its own, or the embedding's."""
        return self.embedding.weight if self.unembedding is None else self.unembedding.weight

    def head_parameters(self) -> list[nn.Parameter]:
        """All that `head` reads."""
        matrix = self.embedding.weight if self.unembedding is None else self.unembedding.weight
        return [matrix, *(() if self.masked is None else self.masked.parameters())]

    def encode(self, source: Tensor, documents: Tensor | None = None) -> Tensor:
        """The encoder's states `(B, S, D)` of `source (B, S)`; of an encoder-only model, those of `hidden`."""
        if self.encoder is None:
            return self.hidden(source, documents=documents)
        self._check_length(source.shape[1])
        dropout = self.config.dropout if self.training else 0.0
        context = AttentionContext(self.config, self.backend, causal=False, documents=documents, dropout=dropout)
        return self.encoder(self.embed(source), context)  # type: ignore[no-any-return]

    def remember(self, source: Tensor, documents: Tensor | None = None) -> Memory:
        """Run the encoder of an encoder-decoder over `source (B, S)`, and every decoder block's keys and values of it.

        `documents (B, S)`: as in `hidden`; a target then sees the source with its own id, or all that is no padding.
        """
        return self.memory(self.encode(source, documents), documents)

    def memory(self, states: Tensor, documents: Tensor | None = None) -> Memory:
        """What the decoder needs of the encoder's `states (B, S, D)`."""
        crosses = [module for module in self.modules() if isinstance(module, CrossAttention)]
        pairs = [cross.project_memory(states) for cross in crosses]
        return Memory([k for k, _ in pairs], [v for _, v in pairs], documents)

    def pooled(self, states: Tensor) -> Tensor:
        """BERT's summary `(B, D)` of `states (B, T, D)`: tanh of a layer on the first token's."""
        assert self.pooler is not None
        return torch.tanh(self.pooler(states[:, 0]))

    def next_sentence(self, states: Tensor) -> Tensor:
        """Logits `(B, 2)` of whether the second segment follows the first (0) or not (1)."""
        assert self.next is not None
        return self.next(self.pooled(states))  # type: ignore[no-any-return]

    def answer(self, states: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits of a classification head for one text per row.

        `(B, C)` for classification, `(B, T, C)` for token classification, `(B, T, 2)` (start, end) for question
        answering. `documents (B, T)` tells which tokens are padding.
        """
        assert self.classifier is not None
        if self.config.head != "classification":
            return self.classifier(states)  # type: ignore[no-any-return]
        if self.pooler is not None:
            return self.classifier(self.pooled(states))  # type: ignore[no-any-return]
        if self.config.traits.kind == "encoder":
            return self.classifier(states[:, 0])  # type: ignore[no-any-return]
        length = states.shape[1]
        real = torch.ones_like(states[..., 0], dtype=torch.bool) if documents is None else documents != PADDING
        last = (real * torch.arange(length, device=states.device)).argmax(-1)
        return self.classifier(states[torch.arange(states.shape[0], device=states.device), last])  # type: ignore[no-any-return]

    def attention_context(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        cache: KVCache | None,
        *,
        memory: Memory | None = None,
        prefix: Tensor | None = None,
    ) -> AttentionContext:
        """Rotary angles, biases and cache slots of one forward, computed once for all layers."""
        config, length = self.config, tokens.shape[1]
        if cache is None:
            self._check_length(length)
        if (memory is None) == (config.traits.kind == "encoder-decoder"):
            raise UsageError(
                "an encoder-decoder needs the memory of its encoder, other models have none",
                hint="memory = model.remember(source)",
            )
        context = AttentionContext(
            config,
            self.backend,
            causal=config.traits.kind != "encoder",
            documents=documents,
            prefix=prefix,
            slots=None if cache is None else self._slots(length, positions, documents, cache),
            cache=cache,
            memory=memory,
            dropout=config.dropout if self.training else 0.0,
        )
        if config.traits.positions == "rope":
            self._add_rotary(context, self._positions(tokens, positions, context.slots))
        context.bias = self.bias(context.where(length, tokens.device), context.key_count(length))
        return context

    def bias(self, where: Tensor, keys: int) -> Tensor | None:
        """What T5 and ALiBi add to the scores of queries at `where (1 or B, T)` over `keys`, `(1 or B, H, T, S)`."""
        return shared_bias(self.config, self.relative, where, keys, self.config.traits.kind == "encoder")

    def _add_rotary(self, context: AttentionContext, where: Tensor) -> None:
        scaling, length = self.config.rope_scaling, 0
        if scaling is not None and scaling.kind == "dynamic":
            # The frequencies change as the sequence grows, so cached keys are rotated when they are read.
            length = int(where.max()) + 1
            if context.cache is not None:
                slots = torch.arange(context.key_count(where.shape[1]), device=where.device)[None]
                context.key_rotary = rotary_angles(slots, self.config, length=length)
        context.rotary = angles_of(self.config, where, length)

    def _slots(self, length: int, positions: Tensor | None, documents: Tensor | None, cache: KVCache) -> Slots:
        if documents is not None:
            raise UsageError("packed documents cannot be combined with a cache")
        if positions is None:
            slots = Slots(cache.length, cache.length + length)
        else:
            last = int(positions.max()) + 1
            slots = Slots(0, max(last, cache.length), positions)
        self._check_length(slots.end, min(cache.capacity, self.config.context))
        return slots

    def _check_length(self, length: int, limit: int = 0) -> None:
        limit = limit or self.config.context
        # While tracing, the length is symbolic and a comparison would pin it.
        if not torch.compiler.is_compiling() and length > limit:
            raise UsageError(
                f"{length} tokens do not fit the model's context of {limit}",
                hint="shorten the sequence or use a model with a longer context",
            )

    def _positions(self, tokens: Tensor, positions: Tensor | None, slots: Slots | None) -> Tensor:
        """`(1, T)` by default: equal positions of all rows are computed once."""
        if positions is not None:
            return positions
        start = 0 if slots is None else slots.start
        return torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]


def shared_bias(config: ModelConfig, table: nn.Embedding | None, where: Tensor, keys: int, both: bool) -> Tensor | None:
    """T5's or ALiBi's bias `(1 or B, H, T, S)`, the same in every layer; `both`: queries look ahead as well."""
    if config.traits.positions not in ("t5", "alibi"):
        return None
    distance = torch.arange(keys, device=where.device) - where[..., None]
    if table is not None:
        buckets = t5_bucket(distance, config.relative_buckets, config.relative_distance, both)
        return table(buckets).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
    slopes = alibi_slopes(config.heads).to(where.device)
    return -slopes[:, None, None] * distance[:, None].abs()


class Encoder(nn.Module):
    """The encoder of an encoder-decoder: blocks that look both ways. It shares the decoder's token embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.relative = nn.Embedding(config.relative_buckets, config.heads) if config.traits.positions == "t5" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.encoder_layers))
        self.norm = make_norm(config) if config.traits.final_norm else None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Embedded `x (B, S, D)` to states `(B, S, D)`."""
        where = context.where(x.shape[1], x.device)
        context.rotary = angles_of(self.config, where, 0)
        context.bias = shared_bias(self.config, self.relative, where, x.shape[1], both=True)
        for block in self.blocks:
            x = block(x, context)
        return x if self.norm is None else self.norm(x)


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x); a decoder with an encoder attends to it in between."""

    def __init__(self, config: ModelConfig, layer: int, cross: bool = False) -> None:
        super().__init__()
        self.order, self.dropout = config.traits.order, config.dropout
        self.recompute: Callable[..., Tensor] | None = None
        """How training calls `compute` to keep fewer activations; set by `llmctl.train.recompute`."""
        sandwich = self.order == "sandwich"
        self.keep = nn.Parameter(torch.empty(1)) if config.traits.stream_weights else None
        self.again = nn.Parameter(torch.empty(1)) if config.traits.stream_weights else None
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.attention_after = make_norm(config) if sandwich else None
        self.cross_norm = make_norm(config) if cross else None
        self.cross = CrossAttention(config, layer) if cross else None
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)
        self.ffn_after = make_norm(config) if sandwich else None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x (B, T, D)` to `(B, T, D)`."""
        if self.recompute is not None and torch.is_grad_enabled():
            return self.recompute(self.compute, x, context)
        return self.compute(x, context)

    def compute(self, x: Tensor, context: AttentionContext) -> Tensor:
        """What `forward` returns, with all activations kept."""
        x = self.attended(x, context)
        y = self.ffn(self.ffn_input(x))
        x = x + self._drop(y if self.ffn_after is None else self.ffn_after(y))
        return self.ffn_norm(x) if self.order == "post" else x

    def attended(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x` after its own tokens' attention and, in a decoder with an encoder, that over the source."""
        x = self.mixed(x, context)
        before = self.order != "post"
        y = self.attention(self.attention_input(x), context)
        x = x + self._drop(y if self.attention_after is None else self.attention_after(y))
        x = x if before else self.attention_norm(x)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self._drop(self.cross(self.cross_norm(x) if before else x, context))
            x = x if before else self.cross_norm(x)
        return x

    def mixed(self, x: Tensor, context: AttentionContext) -> Tensor:
        """What the block goes on from: `x`, or its weighted sum with what entered the first block."""
        if self.keep is None or self.again is None:
            return x
        assert context.start is not None
        return self.keep * x + self.again * context.start

    def attention_input(self, x: Tensor) -> Tensor:
        """What attention reads of `mixed`."""
        return x if self.order == "post" else self.attention_norm(x)

    def ffn_input(self, x: Tensor) -> Tensor:
        """What the feed-forward layer reads of the attended `x`."""
        return x if self.order == "post" else self.ffn_norm(x)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Attention(nn.Module):
    """Projections around `llmctl.nn.attention`.

    Query, key and value stay separate matrices: Muon orthogonalises each by itself, and most of Hugging Face stores
    them so.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.head_dim = config, layer, config.head_dim
        traits = config.traits
        bias, q_dim, kv_dim = traits.bias, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.dim, q_dim, bias=bias or traits.qkv_bias)
        self.k = Linear(config.dim, kv_dim, bias=bias or traits.qkv_bias)
        self.v = Linear(config.dim, kv_dim, bias=bias or traits.qkv_bias)
        self.out = Linear(q_dim, config.dim, bias=bias)
        self.q_norm = make_norm(config, config.head_dim) if traits.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim) if traits.qk_norm else None
        valued = config.has_values(layer)
        self.value_embedding = nn.Embedding(config.vocab_size, kv_dim) if valued else None
        self.value_gate = Linear(config.gate_channels, config.kv_heads, bias=False) if valued else None
        self.distance = Linear(config.dim, q_dim, bias=False) if traits.positions == "xl" else None
        """Transformer-XL's W_R, which turns encoded distances into keys (1901.02860, section 3.3)."""
        if self.distance is not None:
            self.content_bias = nn.Parameter(torch.empty(config.heads, config.head_dim))
            self.distance_bias = nn.Parameter(torch.empty(config.heads, config.head_dim))

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x (B, T, D)` to `(B, T, D)`."""
        q, k, v = self.project(x)
        if self.value_embedding is not None and self.value_gate is not None:
            assert context.tokens is not None
            gate = 3 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))
            v = v + gate[..., None] * self.value_embedding(context.tokens).unflatten(-1, (-1, self.head_dim))
        bias = context.bias
        if self.distance is not None:
            bias = self.relative(q, context)
            q = q + self.content_bias
        return self.out(backend(context).attend(q, k, v, self.layer, context, bias))  # type: ignore[no-any-return]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, T, H, d)`, keys and values `(B, T, KV, d)`, before the rotary positions."""
        q = self.q(x).unflatten(-1, (-1, self.head_dim))
        k = self.k(x).unflatten(-1, (-1, self.head_dim))
        v = self.v(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def relative(self, q: Tensor, context: AttentionContext) -> Tensor:
        """Transformer-XL's scaled scores of distances, `(B, H, T, S)`, for `q (B, T, H, d)`.

        (q + v) W_R r, with r the sinusoid of how far the key is behind. Each query scores all distances; the lookup
        then puts them where their keys are (the paper's shift, for queries anywhere). Keys ahead get what is masked.
        """
        assert self.distance is not None
        count = context.key_count(q.shape[1])
        reach = torch.arange(context.distances(count), device=q.device)
        encoded = self.distance(sinusoid(reach, self.config.dim).to(q.dtype)).unflatten(-1, (-1, self.head_dim))[:count]
        reach = reach[:count]
        scores = torch.einsum("bthd,shd->bhts", q + self.distance_bias, encoded) * self.config.scale
        behind = (context.where(q.shape[1], q.device)[..., None] - reach).clamp(min=0)
        return scores.gather(-1, behind[:, None].expand(*scores.shape[:3], -1))


class CrossAttention(Attention):
    """Queries of the decoder over keys and values of the encoder's states, without positions."""

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x (B, T, D)` to `(B, T, D)`."""
        q = self.q(x).unflatten(-1, (-1, self.head_dim))
        return self.out(backend(context).cross(q, self.layer, context))  # type: ignore[no-any-return]

    def project_memory(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, KV, S, d)` of the encoder's `states (B, S, D)`."""
        k, v = (f(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.k, self.v))
        return k, v


class FeedForward(nn.Module):
    """down(act(gate x) * up x) (2002.05202), or down(act(up x)) without a gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = config.traits.bias
        self.activation = config.traits.activation
        self.gate = Linear(config.dim, config.ff_dim, bias=bias) if config.traits.gated else None
        self.up = Linear(config.dim, config.ff_dim, bias=bias)
        self.down = Linear(config.ff_dim, config.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x (…, D)` to `(…, D)`."""
        return self.down(self.inner(x))  # type: ignore[no-any-return]

    def inner(self, x: Tensor) -> Tensor:
        """What `down` reads, `(…, F)`; pruning measures its channels."""
        if self.gate is None:
            return activate(self.up(x), self.activation)
        return activate(self.gate(x), self.activation) * self.up(x)  # type: ignore[no-any-return]


def activate(x: Tensor, name: str) -> Tensor:
    """The non-linearity called `name` in `Traits.activation`."""
    if name == "silu":
        return F.silu(x)
    if name.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    return F.relu(x) if name == "relu" else F.relu(x).square()


class MaskedHead(nn.Module):
    """What BERT does to a state before the output matrix, and the bias of its logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.traits.activation
        self.dense = Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """`x (…, D)` to `(…, D)`."""
        return self.norm(activate(self.dense(x), self.activation))  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """Classes of a text or its tokens, or start and end of an answer: one matrix, in some families behind a layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        whole = config.head == "classification"
        self.kind = config.traits.classifier
        between = whole and self.kind in ("dense", "relu")
        self.dense = Linear(config.dim, config.dim) if between else None
        bias = not (whole and config.traits.kind == "decoder")
        self.out = Linear(config.dim, len(config.labels) or 2, bias=bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """`x (…, D)` to `(…, C)`."""
        if self.dense is not None:
            x = torch.tanh(self.dense(x)) if self.kind == "dense" else F.relu(self.dense(x))
        return self.out(F.dropout(x, self.dropout, self.training))  # type: ignore[no-any-return]


class OffsetRMSNorm(nn.Module):
    """RMSNorm whose gain is 1 + weight, computed in float32 (Gemma)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """`x (…, dim)`, normed over its last axis."""
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


def make_norm(config: ModelConfig, dim: int = 0) -> nn.Module:
    """The family's norm over `dim` channels, D by default."""
    if config.traits.norm == "rms0":
        return RMSNorm(dim or config.dim, eps=config.norm_eps, elementwise_affine=False)
    kinds: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "rms": RMSNorm, "rms1": OffsetRMSNorm}
    return kinds[config.traits.norm](dim or config.dim, eps=config.norm_eps)


def initialise(model: Transformer) -> None:
    """Fresh weights.

    | Parameter                       | Value                                        | with `initial: zero`            |
    |---------------------------------|----------------------------------------------|---------------------------------|
    | embedding                       | normal, std 1 / (2 sqrt(D)): logits of       | std 0.8, a norm follows         |
    |                                 | order 1 at any width                         |                                 |
    | untied head                     | the same                                     | std 0.001: all tokens alike     |
    | learned positions, segments     | normal, std 0.02 (GPT-2, BERT)               |                                 |
    | relative table, XL's two biases | normal, std 0.02                             |                                 |
    | out, down                       | normal, std 1 / (10 sqrt(fan-in * 2 layers)) | 0: blocks are the identity      |
    |                                 | blocks start near the identity               |                                 |
    | other matrices                  | normal, std 1 / sqrt(fan-in): keeps the      | up: .4 of it                    |
    |                                 | scale at any width                           |                                 |
    | gates of values, of smear       | normal, std 0.02: half open                  |                                 |
    | weights of x, x0, backout       | 1.15 to 1.05 and .2 to .05 by depth, .2      |                                 |
    | norms, biases, weight of smear  | a gain of 1, 0, 0                            |                                 |

    Where scores are not scaled, queries are smaller by the root of the head width instead, as in T5's own recipe.

    Small `out` and `down` and the embedding's scale are worth .2 nats after 150 steps of 2048 tokens with Muon (D 128,
    4 layers, vocabulary 2048, two seeds: 4.83 and 4.78 to 4.62). Exactly 0 is as good, but then a fresh model computes
    the same whatever its attention does, and can test nothing.
    """
    config, depth = model.config, 2 * model.config.layers
    zero = config.traits.initial == "zero"
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        kind, last = ("", *name.split("."))[-2:]
        if last in ("keep", "again", "backout", "smear"):
            share = int(kind) / max(1, config.layers - 1) if kind else 0.0
            begin = {"keep": 1.15 - 0.1 * share, "again": 0.2 - 0.15 * share, "backout": 0.2, "smear": 0.0}
            nn.init.constant_(parameter, begin[last])
        elif last in ("content_bias", "distance_bias") or kind in (
            "positions",
            "segments",
            "relative",
            "value_gate",
            "smear_gate",
        ):
            nn.init.normal_(parameter, std=0.02)
        elif last == "bias":
            nn.init.zeros_(parameter)
        elif kind in ("embedding", "unembedding"):
            std = {"embedding": 0.8, "unembedding": 0.001}[kind] if zero else 0.5 * config.dim**-0.5
            nn.init.normal_(parameter, std=std)
        elif kind in ("out", "down") and name.startswith(("blocks", "encoder")):
            nn.init.normal_(parameter, std=0.0 if zero else 0.1 * (parameter.shape[1] * depth) ** -0.5)
        elif parameter.ndim == 2:
            unscaled = kind == "q" and not config.traits.scaled
            std = (parameter.shape[1] * (config.head_dim if unscaled else 1)) ** -0.5
            nn.init.normal_(parameter, std=0.4 * std if zero and kind == "up" else std)
        else:
            nn.init.constant_(parameter, 0.0 if config.traits.norm == "rms1" and "masked" not in name else 1.0)
