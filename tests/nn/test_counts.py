"""Sizes and costs against torch's own counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmctl.nn.attention import KVCache
from llmctl.nn.config import TRAITS, ModelConfig
from llmctl.nn.counts import cache_bytes, count, forward_flops, serving_bytes, training_bytes, training_flops
from llmctl.nn.transformer import Transformer

SHAPE = {"vocab_size": 50, "dim": 32, "layers": 3, "heads": 4, "context": 64}
HEADS = ("mlm", "pretraining", "features", "classification", "token-classification", "question-answering")


def shapes() -> list[ModelConfig]:
    found = []
    for arch, traits in TRAITS.items():
        segments = {"token_types": 2} if traits.kind == "encoder" else {}
        found.append(ModelConfig(arch=arch, tie_embeddings=False, **SHAPE, **segments))
        heads = HEADS if traits.kind == "encoder" else ("classification", "token-classification", "features")
        for head in heads if traits.kind != "encoder-decoder" else ():
            labels = ("a", "b", "c") if "classification" in head else ()
            if head != "pretraining" or traits.pooler:
                found.append(ModelConfig(arch=arch, head=head, labels=labels, **SHAPE, **segments))
        if traits.kind == "encoder-decoder":
            found.append(ModelConfig(arch=arch, encoder_layers=2, **SHAPE))
    return found


def test_parameters_are_torchs_for_every_family_and_head():
    for config in shapes():
        with torch.device("meta"):
            model = Transformer(config)
        assert config.parameters() == sum(parameter.numel() for parameter in model.parameters()), config


def test_parts_are_where_they_say():
    config = ModelConfig(arch="gpt2", tie_embeddings=False, **SHAPE)
    parts, model = count(config), Transformer(config)
    assert parts.embedding == parts.head == model.embedding.weight.numel()
    assert parts.positions == model.positions.weight.numel()
    assert parts.without_embedding == parts.total - parts.embedding - parts.positions - parts.head


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "gemma2", "t5", "gopher", "bloom"])
def test_operations_are_torchs(arch):
    """The math backend: its attention products are counted, on CPU the fused one's are not."""
    model = Transformer(ModelConfig(arch=arch, **SHAPE))
    tokens = torch.zeros(3, 16, dtype=torch.long)
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter:
        memory = model.remember(tokens) if arch == "t5" else None
        model(tokens, memory=memory).sum().backward()
    counted, expected = counter.get_total_flops(), training_flops(model.config, 16) * tokens.numel()
    if arch == "gopher":
        # Distances are projected once for all rows, and their sinusoids have no gradient.
        assert 0.9 * expected < counted < expected
    else:
        assert counted == expected


def test_a_window_saves_operations_and_cache():
    full = ModelConfig(arch="mistral", **SHAPE)
    banded = replace(full, window=8, pattern="LS", layers=3)
    assert forward_flops(banded, 64) < forward_flops(full, 64)
    assert forward_flops(banded, 8) == forward_flops(full, 8)
    assert cache_bytes(banded, length=64) == cache_bytes(full, length=64) - 2 * 32 * 4 * (64 - 8)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_cache_bytes_are_the_caches(kv_heads):
    config = ModelConfig(arch="llama", kv_heads=kv_heads, **SHAPE)
    cache = KVCache(config, 1, 10)
    held = sum(x.nbytes for x in cache.keys + cache.values)  # noqa: SIM118  # a list
    assert cache_bytes(config) * 10 == held == cache_bytes(config, length=10)
    assert cache_bytes(config, "bf16") * 2 == cache_bytes(config)
    assert cache_bytes(ModelConfig(arch="bert", **SHAPE)) == 0


def test_bytes_of_training_and_serving():
    config = ModelConfig(arch="llama", **SHAPE)
    model = Transformer(config)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    states = (value for state in optimizer.state.values() for name, value in state.items() if name != "step")
    held = 2 * weights + sum(value.nbytes for value in states)
    assert training_bytes(config) == held
    assert training_bytes(config, "bf16") == held + weights // 2
    assert serving_bytes(config) == weights
    assert serving_bytes(config, "int4") == weights // 8
