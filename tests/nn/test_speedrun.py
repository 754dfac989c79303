"""`speedrun` against a plain loop over positions, heads and layers, written from nanochat's description.

transformers has no class for it. Each option is switched on and off alone: it must count, and its absence must show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmctl.errors import UsageError
from llmctl.nn.config import TRAITS, ModelConfig
from llmctl.nn.counts import count
from llmctl.nn.families import in_transformers
from llmctl.nn.hf import load_model, save_model
from llmctl.nn.presets import preset
from llmctl.nn.transformer import Transformer
from llmctl.train.batches import Batch

SHAPE = {
    "vocab_size": 40, "dim": 32, "layers": 3, "heads": 4, "kv_heads": 2, "context": 16, "rope_theta": 500.0,
    "qk_gain": 1.2, "logit_softcap": 2.0, "value_pattern": "V-", "tie_embeddings": False,
}  # fmt: skip
BASE = replace(TRAITS["speedrun"], smear=True)


def build(**changes) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(arch="speedrun", **{"traits": BASE, **SHAPE, **changes})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh outputs are 0, and would hide everything
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def unit(x: Tensor) -> Tensor:
    return x / math.sqrt(float(x.square().mean()) + 1e-5)


def turned(x: Tensor, position: int, base: float) -> Tensor:
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * base ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def naive(model: Transformer, tokens: list[int]) -> Tensor:
    """Logits `(T, V)`, position by position."""
    w, c = dict(model.named_parameters()), model.config
    rotary, group, d = c.pattern == "L", c.heads // c.kv_heads, c.head_dim
    alone = [unit(w["embedding.weight"][t]) for t in tokens]
    start = alone[:1]
    for before, x in zip(alone, alone[1:], strict=False):
        gate = 1 / (1 + math.exp(-float(w["smear_gate.weight"][0] @ x[:24])))
        start.append(x + float(w["smear"]) * gate * before)
    states, middle = [x.clone() for x in start], []
    for layer in range(c.layers):
        name = f"blocks.{layer}."
        states = [w[name + "keep"] * x + w[name + "again"] * x0 for x, x0 in zip(states, start, strict=True)]
        normed = [unit(x) for x in states]
        keys, values = [], []
        for place, (token, x) in enumerate(zip(tokens, normed, strict=True)):
            k = (w[name + "attention.k.weight"] @ x).reshape(-1, d)
            v = (w[name + "attention.v.weight"] @ x).reshape(-1, d).clone()
            if c.value_pattern and layer % 2 == 0:
                own = w[name + "attention.value_embedding.weight"][token].reshape(-1, d)
                for head in range(c.kv_heads):
                    gate = 3 / (1 + math.exp(-float(w[name + "attention.value_gate.weight"][head] @ x[:12])))
                    v[head] += gate * own[head]
            keys.append([turned(unit(head), place if rotary else 0, c.rope_theta) * 1.2 for head in k])
            values.append(v)
        for place, x in enumerate(normed):
            q = (w[name + "attention.q.weight"] @ x).reshape(-1, d)
            out = []
            for head in range(c.heads):
                query = turned(unit(q[head]), place if rotary else 0, c.rope_theta) * 1.2
                scores = torch.stack([query @ keys[j][head // group] / math.sqrt(d) for j in range(place + 1)])
                out.append(sum(p * values[j][head // group] for j, p in enumerate(scores.softmax(0))))
            states[place] = states[place] + w[name + "attention.out.weight"] @ torch.cat(out)
            inner = (w[name + "ffn.up.weight"] @ unit(states[place])).clamp(min=0) ** 2
            states[place] = states[place] + w[name + "ffn.down.weight"] @ inner
        if layer == c.layers // 2:
            middle = [x.clone() for x in states]
    last = [unit(x - w["backout"] * m) for x, m in zip(states, middle, strict=True)]
    return torch.stack([2.0 * torch.tanh(w["unembedding.weight"] @ x / 2.0) for x in last])


@pytest.mark.parametrize(("pattern", "tolerance"), [("N", 1e-10), ("L", 1e-5)])
def test_logits_are_those_of_the_plain_loop(pattern: str, tolerance: float) -> None:
    model, tokens = build(pattern=pattern), [3, 17, 17, 0, 39, 8, 21]
    found = model(torch.tensor([tokens]))[0]
    # The model's angles are float32; without positions all is float64.
    torch.testing.assert_close(found, naive(model, tokens), rtol=0, atol=tolerance)


def muted(**changes) -> Callable[[], Transformer]:
    """The same weights in a model without one of the options."""

    def make() -> Transformer:
        whole, part = build(), build(**changes)
        kept = whole.state_dict()
        part.load_state_dict({name: kept[name] for name in part.state_dict()})
        return part

    return make


WITHOUT = {
    "value embeddings": muted(value_pattern=""),
    "gain": muted(qk_gain=1.0),
    "softcap": muted(logit_softcap=0.0),
    "weights of the stream": muted(traits=replace(BASE, stream_weights=False)),
    "backout": muted(traits=replace(BASE, backout=False)),
    "smear": muted(traits=replace(BASE, smear=False)),
    "norm of queries": muted(traits=replace(BASE, qk_norm=False), qk_gain=1.0),
    "norm of embeddings": muted(traits=replace(BASE, embedding_norm=False)),
    "squared relu": muted(traits=replace(BASE, activation="relu")),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_every_option_shows_and_is_counted(name: str) -> None:
    model, tokens = WITHOUT[name](), [3, 17, 17, 0, 39, 8, 21]
    assert (model(torch.tensor([tokens]))[0] - naive(build(), tokens)).abs().max() > 1e-3
    assert count(model.config).total == sum(parameter.numel() for parameter in model.parameters())


def test_a_saved_model_comes_back_and_is_no_model_of_transformers(tmp_path) -> None:
    model = build().float()
    save_model(model, tmp_path)
    again = load_model(tmp_path).eval()
    tokens = torch.tensor([[3, 17, 0, 39]])
    assert again.config == model.config
    assert torch.equal(again(tokens), model(tokens))
    assert not in_transformers(model.config)
    assert not in_transformers(preset("qwen3", overrides={"qk_gain": 1.2}))
    assert not in_transformers(preset("llama", overrides={"value_pattern": "V-"}))
    assert in_transformers(preset("llama", overrides={"value_pattern": "--", "stream_weights": False}))


def test_fresh_blocks_are_the_identity_and_all_tokens_alike() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(arch="speedrun", **SHAPE))
    for block in model.blocks:
        assert not block.attention.out.weight.any()
        assert not block.ffn.down.weight.any()
    probabilities = model(torch.tensor([[3, 17, 0, 39]])).softmax(-1)
    assert (probabilities - 1 / 40).abs().max() < 1e-3
    assert [block.keep.item() for block in model.blocks] == pytest.approx([1.15, 1.1, 1.05])
    assert [block.again.item() for block in model.blocks] == pytest.approx([0.2, 0.125, 0.05])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "llama", "qk_gain": 1.2}, "1 where queries and keys are not normed"),
        ({"arch": "qwen3", "qk_gain": 0.0}, "must be positive"),
        ({"arch": "llama", "value_pattern": "VX"}, "other letters than V and -"),
        ({"arch": "bert", "value_pattern": "V"}, "value_pattern is for decoders"),
        ({"arch": "bert", "traits": replace(TRAITS["bert"], backout=True)}, "backout is for decoders"),
        ({"arch": "bert", "traits": replace(TRAITS["bert"], smear=True)}, "smear is for decoders"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelConfig(**{"vocab_size": 40, "dim": 32, "layers": 2, "heads": 4, **changes})


def test_a_layer_taken_out_leaves_the_others_their_values(tmp_path) -> None:
    from llmctl_prune.importance import block_influence
    from llmctl_prune.surgery import remove_layer

    model = build(layers=4, value_pattern="-V").float()
    tokens = torch.tensor([[3, 17, 0, 39]])
    batch = Batch(tokens=tokens, picks=torch.arange(4), targets=tokens[0], size=4)
    assert all(0 < share < 2 for share in block_influence(model, [batch]))
    kept = [block for number, block in enumerate(model.blocks) if number != 1]
    remove_layer(model, 1)
    assert model.config.value_pattern == "--V"
    assert list(model.blocks) == kept
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).eval()(tokens), model(tokens))
