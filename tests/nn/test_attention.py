"""Attention against closed forms in float64: softmax, grouped heads, rotary positions, masks, the cache."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llmctl.errors import UsageError
from llmctl.nn.attention import AttentionContext, KVCache, backend
from llmctl.nn.config import ModelConfig
from llmctl.nn.positions import interleaved_to_half, rotary_angles, rotate
from llmctl.nn.transformer import Transformer


def tiny(arch: str = "llama", dtype: torch.dtype = torch.float64, **changes) -> Transformer:
    torch.manual_seed(0)
    kv_heads = 4 if arch == "gpt2" else 2
    shape = {"vocab_size": 50, "dim": 32, "layers": 3, "heads": 4, "kv_heads": kv_heads, "context": 48}
    model = Transformer(ModelConfig(arch=arch, **{**shape, **changes})).to(dtype)
    with torch.no_grad():
        for block in model.blocks:  # fresh blocks do little; a fault in them should show
            block.attention.out.weight.mul_(20)
            block.ffn.down.weight.mul_(20)
    return model


def shape(heads: int = 4, kv_heads: int = 0, head_dim: int = 8, **changes) -> ModelConfig:
    """A configuration for attention alone."""
    own = {"vocab_size": 9, "dim": 32, "layers": 1, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return ModelConfig(arch="llama", **{**own, **changes})


def attention(q, k, v, context: AttentionContext):
    return backend(context).attend(q, k, v, 0, context, None)


def naive(q, k, v, group: int, expand=torch.repeat_interleave):
    """softmax(q k' / sqrt(d)) v, causal; `(B, T, H, d)` in and `(B, T, H * d)` out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = expand(k, group, dim=1), expand(v, group, dim=1)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
def test_equals_the_naive_formula_with_grouped_heads(kv_heads):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 9, h, 8, dtype=torch.float64) for h in (6, kv_heads, kv_heads))
    ours = attention(q, k, v, AttentionContext(shape(6, kv_heads)))
    torch.testing.assert_close(ours, naive(q, k, v, 6 // kv_heads), rtol=0, atol=1e-12)
    # Control: expanding the heads in the wrong order (tiling) is another function.
    if 1 < kv_heads < 6:
        tiled = naive(q, k, v, 6 // kv_heads, lambda x, n, dim: x.repeat(1, n, 1, 1))
        assert (ours - tiled).abs().max() > 0.1
    # Control: so is leaving out 1 / sqrt(d).
    assert (ours - naive(q * math.sqrt(8), k, v, 6 // kv_heads)).abs().max() > 0.1


def test_an_unknown_backend_lists_the_known_ones():
    q = torch.zeros(1, 1, 1, 2)
    with pytest.raises(UsageError) as caught:
        attention(q, q, q, AttentionContext(shape(), backend="flash9"))
    assert "sdpa" in (caught.value.hint or "")


def test_rotary_products_depend_on_the_offset_alone():
    torch.manual_seed(2)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(i: int, j: int) -> float:
        places = (torch.tensor([[p]], dtype=torch.float64) for p in (i, j))
        a, b = (rotate(x, *rotary_angles(p, shape(head_dim=16))) for x, p in zip((q, k), places, strict=True))
        return float((a * b).sum())

    assert product(3, 10) == pytest.approx(product(23, 30), abs=1e-12)
    assert product(3, 10) == pytest.approx(product(4003, 4010), abs=1e-11)
    assert abs(product(3, 10) - product(3, 11)) > 1e-2


def test_half_split_rotation_is_the_interleaved_one_after_the_permutation():
    torch.manual_seed(3)
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    cos, sin = rotary_angles(torch.arange(5)[None], shape())
    even, odd = x[..., 0::2], x[..., 1::2]  # the paper turns neighbouring channels
    interleaved = torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    permuted = torch.cat((even, odd), dim=-1)
    torch.testing.assert_close(rotate(permuted, cos, sin), interleaved, rtol=0, atol=1e-12)
    assert (rotate(x, cos, sin) - interleaved).abs().max() > 0.1
    # A projection of Meta's layout, permuted once, gives what the paper's rotation of neighbours gives.
    weight, inputs = torch.randn(16, 6, dtype=torch.float64), torch.randn(1, 5, 6, dtype=torch.float64)
    theirs = (inputs @ weight.T).unflatten(-1, (2, 8))
    even, odd = theirs[..., 0::2], theirs[..., 1::2]
    turned = torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    ours = (inputs @ interleaved_to_half(weight, 8).T).unflatten(-1, (2, 8))
    torch.testing.assert_close(rotate(ours, cos, sin), turned, rtol=0, atol=1e-12)


def test_rotary_angles_keep_large_positions_apart_in_bfloat16():
    model = tiny(dtype=torch.bfloat16)
    cos, _ = model.attention_context(torch.zeros(1, 4, dtype=torch.int64), None, None, None).rotary["L"]
    assert cos.dtype == torch.float32
    angles = rotary_angles(torch.tensor([[256, 257]]), shape(head_dim=16))[1]
    assert not torch.equal(angles[0, 0], angles[0, 1])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_future_token_leaves_earlier_logits_bit_identical(arch, dtype):
    model = tiny(arch, dtype)
    tokens = torch.randint(0, 50, (2, 20))
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])
    # With a cache, where queries are fewer than keys.
    caches = [KVCache(model.config, 2, 20, dtype=dtype) for _ in range(2)]
    for cache in caches:
        model(tokens[:, :8], cache=cache)
    first, second = (model(x[:, 8:], cache=cache) for x, cache in zip((tokens, changed), caches, strict=True))
    assert torch.equal(first[:, :4], second[:, :4])
    assert not torch.equal(first[:, 4:], second[:, 4:])


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 5, 1, 1, 6], [19, 1]])
def test_cached_pieces_equal_the_full_forward(arch, pieces):
    model = tiny(arch)
    tokens = torch.randint(0, 50, (3, 20))
    cache = KVCache(model.config, 3, 24, dtype=torch.float64)
    parts, start = [], 0
    for length in pieces:
        parts.append(model(tokens[:, start : start + length], cache=cache))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=1e-11)
    assert cache.length == 20


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_cache_rows_of_different_lengths_equal_rows_alone(arch):
    model = tiny(arch)
    rows = [torch.randint(0, 50, (n,)) for n in (3, 9, 6)]
    new = torch.randint(0, 50, (3, 4))
    cache = KVCache(model.config, 3, 16, dtype=torch.float64)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7)
    model(padded, cache=cache)
    lengths = torch.tensor([3, 9, 6])
    together = torch.stack(
        [model(new[:, i : i + 1], positions=(lengths + i)[:, None], cache=cache)[:, 0] for i in range(4)], 1
    )
    for row, prompt in enumerate(rows):
        alone = model(torch.cat((prompt, new[row]))[None])[0, -4:]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-11)
    # Control: without each row's own positions the short rows see padding.
    cache = KVCache(model.config, 3, 16, dtype=torch.float64)
    model(padded, cache=cache)
    assert (model(new[:, :1], cache=cache)[0, 0] - together[0, 0]).abs().max() > 1e-3


def packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return documents, positions


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_packed_documents_equal_documents_alone(arch, dtype, tolerance):
    model = tiny(arch, dtype)
    lengths = [5, 1, 11, 7]
    tokens = torch.randint(0, 50, (1, 24))
    documents, positions = packed(lengths)
    together = model(tokens, positions=positions, documents=documents)
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=tolerance)
    assert (model(tokens) - alone).abs().max() > 1e-2  # control: unpacked attention crosses documents
    assert (model(tokens, documents=documents) - alone).abs().max() > (1e-3 if arch == "gpt2" else -1)


def test_document_mask_by_hand():
    context = AttentionContext(shape(), documents=torch.tensor([[4, 4, 9]]))
    mask = context.mask(0, 3, torch.device("cpu"))
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_position_zero_everywhere_hides_the_order():
    """The control of rotary positions: equal tokens in another order, the same last token."""
    model = tiny(layers=1)  # deeper layers learn the order from the causal mask
    tokens = torch.tensor([[3, 8, 21, 5]])
    swapped = torch.tensor([[21, 3, 8, 5]])
    zeros = torch.zeros(1, 4, dtype=torch.int64)
    same = model(tokens, positions=zeros)[:, -1] - model(swapped, positions=zeros)[:, -1]
    assert same.abs().max() < 1e-12
    assert (model(tokens)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-3


def test_rows_of_absent_tokens_get_exactly_no_gradient():
    model = tiny(tie_embeddings=False)
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    gradient = model.embedding.weight.grad
    assert gradient[[0, *range(4, 50)]].abs().max() == 0
    assert (gradient[1:4].abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_gradient_equals_finite_differences(arch):
    model = tiny(arch, layers=1)
    tokens = torch.tensor([[1, 2, 3, 2]])

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])

    loss().backward()
    for name, parameter in model.named_parameters():
        index = int(parameter.grad.abs().argmax())
        kept, step = float(parameter.data.flatten()[index]), 1e-5
        values = []
        for value in (kept + step, kept - step):
            parameter.data.view(-1)[index] = value
            values.append(float(loss().detach()))
        parameter.data.view(-1)[index] = kept
        measured = (values[0] - values[1]) / (2 * step)
        assert measured == pytest.approx(float(parameter.grad.view(-1)[index]), rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_more_tokens_than_the_context_name_the_limit(arch):
    model = tiny(arch)
    with pytest.raises(UsageError, match="49 tokens do not fit the model's context of 48"):
        model(torch.zeros(1, 49, dtype=torch.int64))
    cache = KVCache(model.config, 1, 8, dtype=torch.float64)
    with pytest.raises(UsageError, match="9 tokens do not fit the model's context of 8"):
        model(torch.zeros(1, 9, dtype=torch.int64), cache=cache)


def test_documents_and_a_cache_are_refused_together():
    model = tiny()
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(UsageError, match="cannot be combined"):
        model(tokens, documents=tokens, cache=KVCache(model.config, 1, 8, dtype=torch.float64))


def test_cache_bytes_shrink_by_the_group_factor():
    sizes = []
    for kv_heads in (4, 1):
        config = ModelConfig(arch="llama", vocab_size=9, dim=32, layers=2, heads=4, kv_heads=kv_heads)
        cache = KVCache(config, 1, 10)
        sizes.append(sum(x.nbytes for x in cache.keys + cache.values))  # noqa: SIM118  # a list
    assert sizes[0] == 4 * sizes[1] == 2 * 2 * 10 * 32 * 4


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
def test_exports_with_dynamic_batch_and_length(arch):
    model = tiny(arch, torch.float32).eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(
        model, (torch.zeros(2, 10, dtype=torch.int64),), dynamic_shapes=({0: batch, 1: length},)
    )
    tokens = torch.randint(0, 50, (3, 17))
    torch.testing.assert_close(program.module()(tokens), model(tokens), rtol=0, atol=1e-6)


def test_equal_seeds_give_equal_weights_and_init_keeps_the_scale():
    config = ModelConfig(arch="llama", vocab_size=512, dim=128, layers=4, heads=4)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(Transformer(config))
    first, same, other = (list(model.state_dict().values()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    # A fresh model knows nothing: its loss is about the uniform one.
    tokens, targets = torch.randint(0, 512, (4, 64)), torch.randint(0, 512, (256,))
    torch.manual_seed(2)
    for model, off in ((models[0], 1.0), (Transformer(replace(config, tie_embeddings=False)), 0.2)):
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets)
        assert float(loss.detach()) == pytest.approx(math.log(512), abs=off)
