"""Kinds of attention and of model: windows, patterns, biases, prefixes, memories, every backend, against plain sums."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers.models.xlnet.modeling_xlnet import XLNetConfig, XLNetRelativeAttention

from llmctl.errors import UsageError
from llmctl.nn.attention import PADDING, KVCache
from llmctl.nn.config import TRAITS, ModelConfig, RopeScaling
from llmctl.nn.positions import sinusoid
from llmctl.nn.transformer import Transformer

DECODERS = [arch for arch, traits in TRAITS.items() if traits.kind == "decoder"]


def build(arch: str = "llama", dtype: torch.dtype = torch.float64, positions: str = "", **changes) -> Transformer:
    """A small model whose blocks do something; `positions` replaces the family's."""
    torch.manual_seed(0)
    traits = changes.pop("traits", TRAITS[arch])
    traits = replace(traits, positions=positions) if positions else traits
    shape = {"vocab_size": 50, "dim": 32, "layers": 3, "heads": 4, "context": 96, "relative_distance": 40}
    model = Transformer(ModelConfig(arch=arch, traits=traits, **{**shape, **changes})).to(dtype).eval()
    zero = model.config.traits.initial == "zero"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                parameter.copy_(0.5 * torch.randn_like(parameter)) if zero else parameter.mul_(20)
            if name.startswith("smear"):
                parameter.copy_(torch.randn_like(parameter))
            if "relative" in name or "content_bias" in name or "distance_bias" in name or "positions" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model.requires_grad_(False)


def ids(length: int = 24, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(3))


VARIANTS = {
    **{arch: {"arch": arch} for arch in DECODERS},
    "speedrun": {"arch": "speedrun", "value_pattern": "V-", "qk_gain": 1.2, "kv_heads": 2, "logit_softcap": 15.0},
    "smear": {"traits": replace(TRAITS["speedrun"], smear=True), "arch": "speedrun", "value_pattern": "-V"},
    "sinusoidal": {"positions": "sinusoidal"},
    "t5 bias": {"positions": "t5"},
    "none": {"positions": "none"},
    "alibi gqa": {"positions": "alibi", "kv_heads": 2},
    "xl gqa": {"positions": "xl", "kv_heads": 2},
    "window": {"window": 5, "kv_heads": 2},
    "banded": {"arch": "gpt3", "window": 5, "pattern": "LS"},
    "window alibi": {"positions": "alibi", "window": 5},
    "window xl": {"positions": "xl", "window": 5, "pattern": "SL"},
    "caps": {"arch": "gemma2", "window": 5, "pattern": "SL", "attention_softcap": 2.0, "logit_softcap": 3.0},
    "local base": {"arch": "gemma3", "window": 5, "pattern": "SSL", "local_rope_theta": 100.0},
    "nope": {"arch": "smollm3", "pattern": "LN"},
    "partial": {"arch": "phi3", "rotary_share": 0.5},
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=4, original_context=16)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_decode_equal_the_whole(name):
    model, tokens = build(**VARIANTS[name]), ids()
    cache, start, parts = KVCache(model.config, 2, 30, dtype=torch.float64), 0, []
    for length in (9, 7, *[1] * 8):
        parts.append(model(tokens[:, start : start + length], cache=cache))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_different_lengths_equal_rows_alone(name):
    model = build(**VARIANTS[name])
    rows, new = [ids(n, 1)[0] for n in (3, 11)], ids(4)
    cache = KVCache(model.config, 2, 20, dtype=torch.float64)
    model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7), cache=cache)
    lengths = torch.tensor([3, 11])
    steps = [model(new[:, i : i + 1], positions=(lengths + i)[:, None], cache=cache)[:, 0] for i in range(4)]
    together = torch.stack(steps, 1)
    for row, prompt in enumerate(rows):
        alone = model(torch.cat((prompt, new[row]))[None])[0, -4:]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_equal_documents_alone(name):
    model, lengths = build(**VARIANTS[name]), [5, 1, 11, 7]
    tokens = ids(24, 1)
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    together = model(tokens, positions=positions, documents=documents)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    assert (model(tokens) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_the_future_is_not_seen(name):
    model, tokens = build(dtype=torch.float32, **VARIANTS[name]), ids()
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


QUICK = ("llama", "window alibi", "bert")
FLEX = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in [*VARIANTS, "bert", "roberta"]
]


@pytest.mark.parametrize("name", FLEX)
def test_flex_equals_sdpa(name):
    model = build(dtype=torch.float32, layers=2, **VARIANTS.get(name, {"arch": name}))
    tokens = ids(24)
    documents = torch.tensor([[0] * 9 + [1] * 15, [0] * 20 + [PADDING] * 4])
    real = documents != PADDING
    for given in (None, documents):
        model.backend = "sdpa"
        expected = model(tokens, documents=given)
        model.backend = "flex"
        found = model(tokens, documents=given)
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=2e-5)
    if model.config.traits.kind == "decoder":
        cache = KVCache(model.config, 2, 30)
        pieces = [model(tokens[:, :10], cache=cache), model(tokens[:, 10:17], cache=cache)]
        pieces += [model(tokens[:, 17:18], cache=cache)]
        model.backend = "sdpa"
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens[:, :18]), rtol=0, atol=2e-5)


def naive(model: Transformer, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """Logits of a one-layer LLaMA by the formula, one query at a time over the keys it may see."""
    block, config = model.blocks[0], model.config
    x = model.embedding(tokens)
    q, k, v = block.attention.project(block.attention_norm(x))
    q, k = model.attention_context(tokens, None, None, None).rotated(q, k, 0)
    rows = []
    for i in range(tokens.shape[1]):
        seen = range(max(0, i - window + 1) if window else 0, i + 1)
        heads = []
        for head in range(config.heads):
            group = head // (config.heads // config.kv_heads)
            scores = torch.stack([(q[:, i, head] * k[:, j, group]).sum(-1) for j in seen], -1) * config.head_dim**-0.5
            weights = scores.softmax(-1)
            heads.append(sum(weights[:, n, None] * v[:, j, group] for n, j in enumerate(seen)))
        rows.append(torch.cat(heads, -1))
    x = x + block.attention.out(torch.stack(rows, 1))
    x = x + block.ffn(block.ffn_norm(x))
    return model.head(model.norm(x))


@pytest.mark.parametrize("window", [0, 1, 4, 200])
def test_a_window_is_what_its_words_say(window):
    model = build(layers=1, kv_heads=2, window=window)
    tokens = ids(90)
    torch.testing.assert_close(model(tokens), naive(model, tokens, window), rtol=0, atol=1e-10)
    if window == 4:
        assert (model(tokens) - naive(model, tokens, 5)).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_windows_longer_than_a_piece_equal_the_mask(arch):
    """Pieces of a window are joined without a seam, in a decoder and in an encoder, with biases and without."""
    for positions in ("none", "alibi"):
        model = build(arch, positions=positions, window=70, context=400, layers=2)
        tokens = ids(300)
        context = model.attention_context(tokens, None, None, None)
        mask = context.mask(70, 300, tokens.device)
        index = torch.arange(300)
        behind = index[:, None] - index
        expected = (behind.abs() < 70) & ((behind >= 0) if arch == "llama" else True)
        assert torch.equal(mask[0, 0], expected)
        found = model.hidden(tokens)
        context.slots = None
        # The same, with the mask over all keys at once.
        whole = model.attention_context(tokens, None, torch.zeros_like(tokens), None)
        whole.prefix = torch.zeros_like(tokens, dtype=torch.bool)
        torch.testing.assert_close(found, model.hidden(tokens, context=whole), rtol=0, atol=1e-10)


def test_a_band_is_seen_by_perturbation():
    """GPT-3's alternation: a token beyond the band reaches the end through dense layers alone."""
    tokens = ids(30, 1)
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 50

    def reached(**changes) -> bool:
        model = build("gpt3", positions="none", **changes)
        return not torch.equal(model(tokens)[0, -1], model(changed)[0, -1])

    assert reached(layers=2, window=4, pattern="LS")
    assert not reached(layers=2, window=4, pattern="S")
    assert reached(layers=2, window=30, pattern="S")


def test_encoders_look_both_ways_and_not_at_padding():
    model, tokens = build("bert"), ids(20)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 50
    assert (model(tokens)[:, 3] - model(changed)[:, 3]).abs().max() > 1e-4
    documents = torch.zeros_like(tokens)
    documents[:, 15:] = PADDING
    real = model(tokens, documents=documents)[:, :15]
    torch.testing.assert_close(real, model(changed, documents=documents)[:, :15], rtol=0, atol=0)
    torch.testing.assert_close(real, model(tokens[:, :15]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("positions", ["alibi", "none", "rope", "t5"])
def test_shifting_a_sequence_changes_nothing_where_positions_are_relative(positions):
    """Keys before it are hidden as another document; learned positions are the control."""
    for name, same in ((positions, True), ("learned", False)):
        model = build("llama" if name == "rope" else "gpt2", positions=name)
        tokens = ids(20, 1)
        documents = torch.tensor([[0] * 6 + [1] * 14])
        shifted = model(tokens, documents=documents)[:, 6:]
        alone = model(tokens[:, 6:])
        close = (shifted - alone).abs().max() < 1e-5  # rotary angles are float32
        assert bool(close) is same


def test_without_positions_order_is_seen_by_nothing():
    """An encoder without positions gives the permuted outputs of permuted inputs; with them it does not."""
    tokens, order = ids(12, 1), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for positions, same in (("none", True), ("sinusoidal", False), ("learned", False), ("alibi", False), ("t5", False)):
        model = build("bert", positions=positions)
        close = torch.allclose(model(tokens[:, order]), model(tokens)[:, order], rtol=0, atol=1e-9)
        assert close is same, positions


def test_transformer_xl_is_the_naive_double_loop():
    """(q + u) k + (q + v) W_R r over d, written out; a shift the other way is another function."""
    model = build("gopher", layers=1)
    config, attention = model.config, model.blocks[0].attention
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    q, k, v = attention.project(x)
    context = model.attention_context(ids(7), None, None, None)

    def by_hand(sign: int) -> torch.Tensor:
        out = torch.zeros(2, 7, 4, 8, dtype=torch.float64)
        for b, i, h in itertools.product(range(2), range(7), range(4)):
            scores = []
            for j in range(i + 1):
                r = sinusoid(torch.tensor(sign * (i - j)), 32).double()
                key = attention.distance(r).unflatten(-1, (4, 8))[h]
                content = (q[b, i, h] + attention.content_bias[h]) @ k[b, j, h]
                scores.append((content + (q[b, i, h] + attention.distance_bias[h]) @ key) / math.sqrt(8))
            weights = torch.stack(scores).softmax(0)
            out[b, i, h] = sum(weights[j] * v[b, j, h] for j in range(i + 1))
        return attention.out(out.flatten(2))

    torch.testing.assert_close(attention(x, context), by_hand(1), rtol=0, atol=1e-6)  # sinusoids are float32
    assert (attention(x, context) - by_hand(-1)).abs().max() > 1e-3
    assert config.traits.positions == "xl"


def test_transformer_xl_is_xlnets():
    """The same weights in transformers' XLNet, whose sinusoids stand sines first."""
    model = build("gopher", torch.float32, layers=1)
    ours = model.blocks[0].attention
    with torch.no_grad():
        for linear in (ours.q, ours.k, ours.v, ours.out):
            linear.bias.zero_()
    config = XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=64, dropout=0.0)
    theirs = XLNetRelativeAttention(config).eval()
    with torch.no_grad():
        for name, linear in (("q", ours.q), ("k", ours.k), ("v", ours.v), ("r", ours.distance)):
            getattr(theirs, name).copy_(linear.weight.T.reshape(32, 4, 8))
        theirs.o.copy_(ours.out.weight.reshape(32, 4, 8))
        theirs.r_w_bias.copy_(ours.content_bias)
        theirs.r_r_bias.copy_(ours.distance_bias)
    x = torch.randn(2, 9, 32)
    # XLNet wants distances from T to -T; ours behind the query are positive ones.
    r = sinusoid(torch.arange(9, -9, -1), 32)[:, None].expand(-1, 2, -1)
    q, k, v, rel = (
        torch.einsum("ibh,hnd->ibnd", a, w)
        for a, w in (
            (x.transpose(0, 1), theirs.q),
            (x.transpose(0, 1), theirs.k),
            (x.transpose(0, 1), theirs.v),
            (r, theirs.r),
        )
    )
    future = torch.ones(9, 9).triu(1)[:, :, None, None]
    vector = theirs.rel_attn_core(q, k, v, rel, attn_mask=future)
    expected = torch.einsum("ibnd,hnd->ibh", vector, theirs.o).transpose(0, 1)
    found = ours(x, model.attention_context(ids(9), None, None, None))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_prefix_is_seen_whole_and_what_follows_is_not():
    model, tokens = build(), ids(16, 1)
    prefix = torch.zeros(1, 16, dtype=torch.bool)
    prefix[:, :6] = True
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 50
    assert (model(tokens, prefix=prefix)[0, 0] - model(changed, prefix=prefix)[0, 0]).abs().max() > 1e-4
    assert torch.equal(model(tokens)[0, 0], model(changed)[0, 0])
    later = tokens.clone()
    later[0, 9] = (later[0, 9] + 1) % 50
    assert torch.equal(model(tokens, prefix=prefix)[0, :9], model(later, prefix=prefix)[0, :9])


def test_packed_pairs_see_their_own_source():
    model, lengths = build("t5"), [(5, 7), (8, 4)]
    source, target = ids(13, 1), ids(11, 1)
    documents = [torch.cat([torch.full((n[side],), i) for i, n in enumerate(lengths)])[None] for side in (0, 1)]
    together = model(target, documents=documents[1], memory=model.remember(source, documents[0]))
    alone = [
        model(t, memory=model.remember(s))
        for s, t in zip(source.split([5, 8], 1), target.split([7, 4], 1), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["sdpa", "flex"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_query_that_sees_nothing_gets_zeros(name, softcap):
    """The project's one answer for fully masked rows: a source of padding adds nothing."""
    model = build("t5", torch.float32, layers=1, attention_softcap=softcap)
    model.backend = name
    nothing = torch.full((2, 6), PADDING)
    states = model.encode(ids(6))
    context = model.attention_context(ids(4), None, None, None, memory=model.memory(states, nothing))
    cross = model.blocks[0].cross
    assert torch.equal(cross(torch.randn(2, 4, 32), context), torch.zeros(2, 4, 32))


def test_what_does_not_fit_together_is_refused():
    model = build("t5")
    with pytest.raises(UsageError, match="needs the memory of its encoder"):
        model(ids())
    with pytest.raises(UsageError, match="other models have none"):
        build()(ids(), memory=model.remember(ids()))
    dropping = build(dropout=0.1).train()
    dropping.backend = "flex"
    with pytest.raises(UsageError, match="has no dropout"):
        dropping(ids())


def test_dropout_acts_in_training_alone():
    model = build(dropout=0.2)
    assert torch.equal(model(ids()), model(ids()))
    model.train()
    assert not torch.equal(model(ids()), model(ids()))
    still = build().train()
    assert torch.equal(still(ids()), still(ids()))


def test_biases_and_weights_of_every_kind_get_gradients():
    for arch in TRAITS:
        model = build(arch).requires_grad_(True)
        memory = model.remember(ids()) if model.config.traits.kind == "encoder-decoder" else None
        model(ids(), memory=memory).square().mean().backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        # Softmax does not change when all its inputs move, so biases of keys have no effect.
        assert [name for name in silent if not name.endswith("k.bias")] == [], arch
