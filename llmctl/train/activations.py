"""What a forward pass keeps for the gradient, in bytes, from the model's configuration alone. Free of torch.

The counts are those of torch's own kernels: a test compares them with what autograd saves, family by family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmctl.nn.config import ModelConfig

FLOAT = 4
"""Bytes of what is never computed in a smaller type: residuals, norms, losses."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward and backward pass of one process: `rows` of `length` tokens each, `targets` of them predicted."""

    rows: int
    length: int
    targets: int
    product: int = FLOAT
    """Bytes of a number in products of matrices: 2 with bf16 or fp16."""
    fused: bool = False
    """CUDA's kernels: a norm or a dropout keeps less there than on the CPU."""
    recompute: str = "none"
    dropout: float = 0.0
    masked: bool = False
    """Rows hold several documents, none of which may see another."""
    skips: bool = False
    """The kernel skips what is masked instead of adding a mask (`attention: flex`)."""
    split: int = 1
    """Ranks that share each matrix (tensor parallel)."""
    cut: int = 1
    """Ranks that share each sequence: each has `length` tokens of it, and gathers the keys of all."""

    @property
    def keys(self) -> int:
        """Keys that a token may see."""
        return self.length * self.cut

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.length


def kept(config: ModelConfig, step: Pass) -> float:
    """Bytes of all that stays until the gradient is taken, from the embedding to the head's input; logits are apart."""
    layers = sum(block(config, step, layer) for layer in range(config.layers))
    if config.traits.kind == "encoder-decoder":
        layers += config.encoder_layers * block(config, step, 0, cross=False)
    return layers + around(config, step)


def around(config: ModelConfig, step: Pass) -> float:
    """Bytes beside the blocks: token ids, biases and masks that layers share, the last norm, the head's input."""
    traits, tokens = config.traits, step.tokens
    total = 8.0 * tokens
    if traits.final_norm:
        total += tokens * _norm(config, step, config.dim)
    if traits.embedding_norm:
        total += tokens * _norm(config, step, config.dim)
    total += step.targets * config.dim * step.product
    if config.head in ("mlm", "pretraining"):
        total += step.targets * config.dim * (2 * FLOAT + 2 * step.product)
    if traits.positions in ("t5", "alibi"):
        total += config.heads / step.split * step.length**2 * FLOAT * (step.rows if step.masked else 1)
    if step.masked and not step.skips:
        total += tokens * step.keys  # which tokens see which, one byte each
    if step.dropout:
        total += tokens * config.dim * (1 if step.fused else FLOAT)
    return total


def block(config: ModelConfig, step: Pass, layer: int, cross: bool | None = None) -> float:
    """Bytes that one block keeps; with `recompute: full` its input alone."""
    entrance = step.tokens * config.dim * FLOAT
    if step.recompute == "full":
        return entrance
    pair = config.traits.kind == "encoder-decoder" if cross is None else cross
    parts = list(_per_token(config, step, layer))
    if pair:
        parts += [*_attention(config, step, 0), (config.dim, "norm")]
    if step.recompute == "selective":
        return entrance + step.tokens * sum(size * step.product for size, kind in parts if kind == "product")
    sizes = {"product": step.product, "between": step.product, "float": FLOAT, "byte": 1}
    per_token = sum(_norm(config, step, int(size)) if kind == "norm" else size * sizes[kind] for size, kind in parts)
    return step.tokens * per_token


def widest(config: ModelConfig, step: Pass) -> float:
    """Bytes that the backward pass of one block takes on top of what it reads: gradients of its widest tensors."""
    gated = 3 if config.traits.gated else 2
    return step.tokens * (gated * config.ff_dim / step.split * step.product + 2 * config.dim * FLOAT)


def _norm(config: ModelConfig, step: Pass, width: int) -> float:
    """Where neither CUDA's kernel nor `llmctl.nn.kernels` does it, an RMSNorm keeps the normed states as well."""
    if config.traits.norm == "layer":
        return width * FLOAT + 2 * FLOAT
    whole = step.fused or (config.traits.norm in ("rms", "rms0") and step.product == FLOAT)
    return width * FLOAT * (1 if whole else 2) + FLOAT


def _per_token(config: ModelConfig, step: Pass, layer: int) -> Iterator[tuple[float, str]]:
    """(numbers, kind) of one block without cross-attention. `product`: the output of a product of matrices; `between`:
    other tensors of its type; `norm`: the input of a norm; `float`: always float32."""
    traits, split = config.traits, step.split
    norms = 4 if traits.order == "sandwich" else 2
    yield from ((config.dim, "norm") for _ in range(norms))
    if traits.stream_weights:
        yield (config.dim, "float")
    yield from _attention(config, step, config.layer_window(layer))
    yield from _inputs(config, step, 2 if traits.gated else 1)
    wide = config.ff_dim / split
    yield (wide, "between" if traits.activation == "relu" and not traits.gated else "product")
    if traits.gated:
        yield from ((wide, "product"), (wide, "between"), (wide, "between"))
    elif traits.activation != "relu":
        yield (wide, "between")
    if step.dropout:
        yield from ((config.dim, "byte" if step.fused else "float") for _ in range(2))


def _inputs(config: ModelConfig, step: Pass, readers: int) -> Iterator[tuple[float, str]]:
    """What enters several matrices: one tensor, but each matrix has a copy of its own in a smaller type."""
    yield from ((config.dim, "between") for _ in range(readers if step.product < FLOAT else 1))


def _attention(config: ModelConfig, step: Pass, window: int) -> Iterator[tuple[float, str]]:
    traits, split = config.traits, step.split
    heads, keys = config.heads / split, config.kv_heads / split
    q, kv = heads * config.head_dim, keys * config.head_dim * step.cut
    yield from _inputs(config, step, 3)
    yield from ((q, "product"), (kv, "product"), (kv, "product"), (q, "product"), (heads, "float"))
    if traits.qk_norm:
        yield from ((q, "norm"), (kv, "norm"))
    seen = min(step.keys, window) if window else step.keys
    if config.attention_softcap:
        yield from ((heads * seen, "float") for _ in range(3))
    elif (step.dropout and not step.fused) or traits.positions in ("t5", "xl"):
        yield from ((heads * seen, "float") for _ in range(3 if step.dropout else 1))
    if traits.positions == "xl":
        yield (heads * step.keys, "float")
    elif step.masked and not step.skips and traits.positions not in ("t5", "alibi"):
        yield (seen, "between")  # the mask as numbers, made anew for every layer
