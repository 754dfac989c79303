"""How large a model is and what it costs, by its configuration alone: parameters, operations, bytes. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.nn.config import ModelConfig

BYTES = {"float32": 4, "bf16": 2, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}


@dataclass(frozen=True)
class Parameters:
    """Trainable parameters by where they are; a tied head counts with the embedding."""

    embedding: int
    """Token embeddings, and those of values."""
    positions: int
    """Learned positions and segments, the norm over them, the gate of `smear`."""
    blocks: int
    """All blocks of encoder and decoder, their final norms and tables of relative positions."""
    head: int
    """What reads the states: an untied output matrix, a masked-LM head, a pooler, a classifier."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.positions + self.blocks + self.head

    @property
    def without_embedding(self) -> int:
        """Those of matrix products over the hidden states, which scaling laws often count alone."""
        return self.blocks


def count(config: ModelConfig) -> Parameters:
    """The exact numbers; a test compares each family's with torch's own."""
    traits, dim = config.traits, config.dim
    positions = 0
    if traits.positions == "learned":
        positions += (config.context + traits.position_offset) * dim
    positions += config.token_types * dim
    positions += _norm(config) if traits.embedding_norm else 0
    positions += config.smear_channels + 1 if traits.smear else 0
    blocks = config.layers * _block(config, cross=traits.kind == "encoder-decoder") + _around(config)
    if traits.kind == "encoder-decoder":
        blocks += config.encoder_layers * _block(config, cross=False) + _around(config)
    valued = sum(config.has_values(layer) for layer in range(config.layers))
    blocks += valued * config.gate_channels * config.kv_heads
    tables = dim + valued * config.kv_heads * config.head_dim
    return Parameters(config.vocab_size * tables, positions, blocks, _head(config))


def _norm(config: ModelConfig) -> int:
    if config.traits.norm == "rms0":
        return 0
    return config.dim * (2 if config.traits.norm == "layer" else 1)


def _around(config: ModelConfig) -> int:
    """What a stack has beside its blocks."""
    final = (_norm(config) if config.traits.final_norm else 0) + config.traits.backout
    return final + (config.relative_buckets * config.heads if config.traits.positions == "t5" else 0)


def _block(config: ModelConfig, cross: bool) -> int:
    traits, dim, ff = config.traits, config.dim, config.ff_dim
    feed_forward = (3 if traits.gated else 2) * dim * ff
    if traits.bias:
        feed_forward += (2 if traits.gated else 1) * ff + dim
    norms = 4 if traits.order == "sandwich" else 2
    total = _attention(config) + feed_forward + norms * _norm(config) + 2 * traits.stream_weights
    if traits.positions == "xl":
        total += config.heads * config.head_dim * (dim + 2)  # the projection of distances, and two biases
    return total + (_attention(config) + _norm(config) if cross else 0)


def _attention(config: ModelConfig) -> int:
    traits, dim = config.traits, config.dim
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    total = _attention_matrices(config)
    if traits.bias or traits.qkv_bias:
        total += q_dim + 2 * kv_dim
    if traits.bias:
        total += dim
    return total + (2 * config.head_dim if traits.qk_norm and traits.norm != "rms0" else 0)


def _attention_matrices(config: ModelConfig) -> int:
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return config.dim * (2 * q_dim + 2 * kv_dim)


def _head(config: ModelConfig) -> int:
    dim, classes = config.dim, len(config.labels)
    total = dim * (dim + 1) if config.has_pooler else 0
    if config.head in ("lm", "mlm", "pretraining"):
        total += 0 if config.tie_embeddings else config.vocab_size * dim
    if config.head in ("mlm", "pretraining"):
        total += dim * (dim + 1) + 2 * dim + config.vocab_size
    if config.head == "pretraining":
        total += 2 * (dim + 1)
    if config.head == "question-answering":
        total += 2 * (dim + 1)
    if config.head == "classification":
        total += dim * (dim + 1) if config.traits.classifier in ("dense", "relu") else 0
        total += classes * (dim + (0 if config.traits.kind == "decoder" else 1))
    if config.head == "token-classification":
        total += classes * (dim + 1)
    return total


def forward_flops(config: ModelConfig, length: int) -> int:
    """Operations of one forward pass per token in sequences of `length`: two per multiply-add of a matrix product.

    Attention is counted as torch's FlopCounterMode does: in full, the causal half that kernels may skip included, and
    of a sliding window what it sees. The embedding look-up counts nothing, the output head does. Of an encoder-decoder
    it is a token of the source and one of the target together, both sequences of `length`.
    """
    ffn = (3 if config.traits.gated else 2) * config.dim * config.ff_dim
    total = 0
    for layer in range(config.layers):
        window = config.layer_window(layer)
        total += _attended(config, min(length, window) if window else length, length) + ffn
        total += config.gate_channels * config.kv_heads if config.has_values(layer) else 0
    if config.traits.kind == "encoder-decoder":
        cross = config.layers * _attended(config, length, length)
        total += cross + config.encoder_layers * (_attended(config, length, length) + ffn)
    total += config.smear_channels if config.traits.smear else 0
    if config.head in ("lm", "mlm", "pretraining"):
        total += config.dim * config.vocab_size
    if config.head in ("mlm", "pretraining"):
        total += config.dim**2
    return 2 * total


def _attended(config: ModelConfig, seen: int, length: int) -> int:
    """Multiply-adds per token of one attention over `seen` keys."""
    q_dim = config.heads * config.head_dim
    # Transformer-XL projects every distance once per sequence, and scores them as it does the keys.
    relative = q_dim * (config.dim + seen) if config.traits.positions == "xl" else 0
    return _attention_matrices(config) + 2 * q_dim * seen + relative


def training_flops(config: ModelConfig, length: int) -> int:
    """Operations of one training step per token: forward plus twice as much backward."""
    return 3 * forward_flops(config, length)


def cache_bytes(config: ModelConfig, dtype: str = "float32", length: int | None = None) -> int:
    """Bytes of keys and values that a sequence keeps per token; with `length`, all of a sequence of so many tokens.

    A layer with a sliding window keeps no more than its window of a long sequence. Encoders keep nothing; what an
    encoder-decoder keeps of its source is not counted.
    """
    if config.traits.kind == "encoder":
        return 0
    per_token = int(2 * config.kv_heads * config.head_dim * BYTES[dtype])
    if length is None:
        return config.layers * per_token
    kept = (min(length, config.layer_window(layer) or length) for layer in range(config.layers))
    return per_token * sum(kept)


def training_bytes(config: ModelConfig, precision: str = "float32") -> int:
    """Bytes of weights, gradients and AdamW's two moments, without activations: 16 per parameter in float32.

    In mixed precision the weights are kept in float32 too and a copy in the smaller type comes on top.
    """
    extra = 0 if precision == "float32" else int(BYTES[precision])
    return count(config).total * (16 + extra)


def serving_bytes(config: ModelConfig, dtype: str = "float32") -> int:
    """Bytes of the weights; the cache of each sequence comes on top."""
    return int(count(config).total * BYTES[dtype])


def matrices(config: ModelConfig) -> dict[tuple[int, int], int]:
    """How many matrices of each shape `(out, in)` all blocks have; what maps hidden states to hidden states."""
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = [(q_dim, config.dim), (kv_dim, config.dim), (kv_dim, config.dim), (config.dim, q_dim)]
    widening = [(config.ff_dim, config.dim)] * (2 if config.traits.gated else 1)
    feed_forward = [*widening, (config.dim, config.ff_dim)]
    distance = [(q_dim, config.dim)] if config.traits.positions == "xl" else []
    pair = config.traits.kind == "encoder-decoder"
    found: dict[tuple[int, int], int] = {}
    for shapes, times in (
        ([*attention, *feed_forward, *distance, *(attention if pair else [])], config.layers),
        ([*attention, *feed_forward], config.encoder_layers if pair else 0),
    ):
        for shape in shapes if times else ():
            found[shape] = found.get(shape, 0) + times
    return found
