"""Logits and gradients against transformers, both directions, with controls that must fail."""

from __future__ import annotations

import pytest
import torch
import transformers

from llmctl.nn.hf import load_model, save_model

from .conftest import CONTEXT, FAMILIES, VOCAB, random_hf


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", FAMILIES)
def test_theirs_to_ours(name, hf_directory, tokens):
    theirs, ours = random_hf(name), load_model(hf_directory(name))
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.5  # or the tolerance would say nothing
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert ours.config.parameters() == theirs.num_parameters()


@pytest.mark.parametrize("name", FAMILIES)
def test_ours_to_theirs(name, hf_directory, tokens, tmp_path):
    ours = load_model(hf_directory(name))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # no longer the weights that transformers wrote
    save_model(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=0, atol=1e-5)
    assert type(theirs.config).__name__ == type(random_hf(name).config).__name__


@pytest.mark.parametrize("name", FAMILIES)
def test_one_weight_off_by_a_percent_breaks_parity(name, hf_directory, tokens):
    theirs, ours = random_hf(name), load_model(hf_directory(name))
    with torch.no_grad():
        ours.blocks[1].ffn.down.weight[:, 3] *= 1.01
        assert (ours(tokens) - theirs(tokens).logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gpt2"])
def test_float64_and_the_small_print(name, hf_directory, tokens):
    """1e-9 tells the tanh GELU from the exact one and one norm epsilon from another."""
    theirs, ours = random_hf(name).double(), load_model(hf_directory(name), dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(tokens).logits
        # transformers normalises in float32 whatever the model's dtype: RMSNorm parity ends there.
        tolerance = 1e-9 if name == "gpt2" else 1e-5
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=tolerance)
        for module in ours.modules():
            if hasattr(module, "eps"):
                module.eps = 2e-4
        assert (ours(tokens) - expected).abs().max() > 10 * tolerance


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gpt2"])
def test_left_padding_there_is_documents_and_positions_here(name, hf_directory, tokens):
    theirs, ours = random_hf(name), load_model(hf_directory(name))
    mask = torch.ones_like(tokens)
    mask[0, :11] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask, position_ids=positions).logits
        logits = ours(tokens, positions=positions, documents=mask)
        torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)
        assert (ours(tokens)[0, 11:] - expected[0, 11:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama-untied", "qwen3", "gpt2"])
def test_gradients_equal(name, hf_directory, tokens):
    theirs, ours = random_hf(name), load_model(hf_directory(name))
    for logits in (theirs(tokens).logits, ours(tokens)):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    from llmctl.nn.hf import from_hf_tensors

    expected = from_hf_tensors(ours, {n: p.grad for n, p in theirs.named_parameters()}, "gradients")
    for parameter_name, parameter in ours.named_parameters():
        scale = expected[parameter_name].abs().max()
        # 1e-7: softmax does not see a shift of all keys, so the gradient of a key bias is 0 but for rounding.
        assert (parameter.grad - expected[parameter_name]).abs().max() <= 1e-4 * scale + 1e-7, parameter_name


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_up_to_the_last_position_of_the_context(name, hf_directory):
    tokens = torch.randint(0, VOCAB, (1, CONTEXT), generator=torch.Generator().manual_seed(6))
    theirs, ours = random_hf(name), load_model(hf_directory(name))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
