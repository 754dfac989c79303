"""Recorded attention: the same output as sdpa for every encoding, window and kind; rows sum to 1; lengths add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmctl.nn import inspected
from llmctl.nn.attention import PADDING, KVCache
from llmctl.nn.config import TRAITS, ModelConfig
from llmctl.nn.inspected import recording
from llmctl.nn.transformer import Transformer

SHAPE = {"vocab_size": 50, "dim": 32, "layers": 3, "heads": 4, "context": 48}
POSITIONS = ("rope", "learned", "sinusoidal", "t5", "xl", "alibi", "none")
PATTERNS = {"L": 0, "S": 5, "LS": 5, "LN": 0}


def tiny(arch: str = "llama", positions: str | None = None, **changes: object) -> Transformer:
    torch.manual_seed(0)
    if positions is not None:
        changes["traits"] = replace(TRAITS[arch], positions=positions)
    model = Transformer(ModelConfig(arch=arch, **{**SHAPE, **changes})).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # fresh blocks do little; a fault in them should show
            if name.endswith(("out.weight", "down.weight")):
                parameter.mul_(20)
    return model


def tokens(length: int = 20) -> Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_output_and_rows(positions, pattern):
    model = tiny(positions=positions, kv_heads=2, pattern=pattern, window=PATTERNS[pattern])
    with torch.no_grad():
        expected = model(tokens())
        with recording(model) as record:
            found = model(tokens())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    maps = record.maps["decoder"].own
    assert len(maps) == 3
    for layer, weights in enumerate(maps):
        assert weights.shape == (2, 4, 20, 20)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 20), rtol=0, atol=1e-6)
        assert weights.triu(1).abs().max() == 0
        if model.config.layer_window(layer):
            assert weights.tril(-5).abs().max() == 0 < weights.diagonal(-4, 2, 3).min()
    assert model.backend == "sdpa"


@pytest.mark.parametrize("arch", ["bert", "roberta", "distilbert", "gemma2", "gemma3", "gpt1", "phi3", "bloom"])
def test_families(arch):
    softcap = {"attention_softcap": 2.0} if arch == "gemma2" else {}
    model = tiny(arch, head_dim=16, **softcap)
    documents = torch.zeros(2, 20, dtype=torch.int64)
    documents[0, 13:] = PADDING
    with torch.no_grad():
        expected = model(tokens(), documents=documents)
        with recording(model) as record:
            found = model(tokens(), documents=documents)
    # Capped scores go through a softmax in float32 in the default backend, whatever the model's dtype.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if softcap else 1e-12)
    ((name, maps),) = record.maps.items()
    assert name == model.config.traits.kind
    torch.testing.assert_close(maps.own[0].sum(-1), torch.ones(2, 4, 20), rtol=0, atol=1e-6)
    assert maps.own[0][0, :, :13, 13:].abs().max() == 0  # nothing real sees padding


def test_the_three_kinds_of_attention_of_an_encoder_decoder():
    model = tiny("t5", encoder_layers=2)
    source, target = tokens(9), tokens(7)
    documents = torch.zeros(2, 9, dtype=torch.int64)
    documents[1, 4:] = PADDING
    with torch.no_grad():
        expected = model(target, memory=model.remember(source, documents))
        with recording(model) as record:
            found = model(target, memory=model.remember(source, documents))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    encoder, decoder = record.maps["encoder"], record.maps["decoder"]
    assert [len(x) for x in (encoder.own, encoder.cross, decoder.own, decoder.cross)] == [2, 0, 3, 3]
    assert decoder.cross[0].shape == (2, 4, 7, 9)
    assert decoder.cross[2][1, :, :, 4:].abs().max() == 0
    assert encoder.own[0][0].triu(1).abs().max() > 0 == decoder.own[0].triu(1).abs().max()
    assert len(record.norms["encoder"].residual) == 3 and len(record.norms["decoder"].cross) == 3


def test_with_a_cache_too():
    model = tiny(kv_heads=2)
    caches = [KVCache(model.config, 2, 20, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(tokens()[:, :12], cache=cache)
        expected = model(tokens()[:, 12:], cache=caches[0])
        with recording(model) as record:
            found = model(tokens()[:, 12:], cache=caches[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert record.maps["decoder"].own[0].shape == (2, 4, 8, 20)


def test_a_source_that_is_all_padding_gives_rows_of_zeros():
    model = tiny("t5")
    padding = torch.full((2, 5), PADDING)
    with torch.no_grad():
        expected = model(tokens(4), memory=model.remember(tokens(5), padding))
        with recording(model) as record:
            found = model(tokens(4), memory=model.remember(tokens(5), padding))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert record.maps["decoder"].cross[0].abs().max() == 0


@pytest.mark.parametrize("arch", ["llama", "gpt1", "gemma2"])
def test_lengths_are_those_of_what_the_blocks_add(arch):
    model = tiny(arch, layers=1)
    with torch.no_grad(), recording(model) as record:
        states = model.hidden(tokens())
    norms, block = record.norms["decoder"], model.blocks[0]
    with torch.no_grad():
        x = model.embed(tokens())
        context = model.attention_context(tokens(), None, None, None)
        attended = block.attended(x, context)
        out = block(x, context)
        torch.testing.assert_close(norms.residual[0], x.norm(dim=-1).float())
        torch.testing.assert_close(norms.residual[1], out.norm(dim=-1).float())
        if arch != "gpt1":  # in a block that norms the sum, the difference is not what was added
            torch.testing.assert_close(norms.attention[0], (attended - x).norm(dim=-1).float())
            torch.testing.assert_close(norms.feed_forward[0], (out - attended).norm(dim=-1).float())
    assert states.shape == (2, 20, 32)


def test_heads_expanded_in_the_wrong_order_would_be_noticed(monkeypatch):
    """The control: another expansion of the key/value heads gives another output."""
    model = tiny(kv_heads=2)
    with torch.no_grad():
        expected = model(tokens())
        monkeypatch.setattr(inspected, "_weighted", lambda w, v: (w @ v.repeat(1, 2, 1, 1)).transpose(1, 2).flatten(2))
        with recording(model):
            assert (model(tokens()) - expected).abs().max() > 1e-2


def test_the_backend_is_put_back_after_an_error():
    model = tiny()
    with pytest.raises(RuntimeError, match="planted"), recording(model):
        raise RuntimeError("planted")
    assert model.backend == "sdpa" and inspected.NAME not in inspected.BACKENDS
    assert not model.blocks[0]._forward_hooks
