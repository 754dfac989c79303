"""Every family of decoders generates as in transformers: greedy, a beam search and draws, past windows and contexts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from llmctl.errors import UsageError
from llmctl.generator import Sampling
from llmctl.nn.hf import load_model
from llmctl.train.generate import make_generator, open_model

VOCAB, EOS, NEW = 23, 2, 12
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
HEADS = {**SHAPE, "head_dim": 8}
DYNAMIC = {
    "num_hidden_layers": 1,
    "max_position_embeddings": 8,
    "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
}
WINDOW = {"sliding_window": 5}  # the answers reach far beyond it
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt1": ("OpenAIGPT", GPT),
    "gpt2": ("GPT2", GPT),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "llama": ("Llama", SHAPE),
    # One layer: in a second one, whatever is cached was computed with the frequencies of its time.
    "llama-dynamic": ("Llama", {**SHAPE, **DYNAMIC}),
    "mistral": ("Mistral", {**HEADS, **WINDOW}),
    "qwen2": ("Qwen2", SHAPE),
    "qwen3": ("Qwen3", HEADS),
    "gemma2": ("Gemma2", {**HEADS, **WINDOW}),
    "gemma3": ("Gemma3", {**HEADS, **WINDOW}),
    "phi3": ("Phi3", {**SHAPE, **WINDOW}),
    "smollm3": ("SmolLM3", SHAPE),
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    torch.manual_seed(5)
    return [torch.randint(3, VOCAB, (size,)).tolist() for size in (1, 9)]


def make(family: str) -> Any:
    name, options = FAMILIES[family]
    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    ids = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**options, **ids, attn_implementation="eager")
    head = "OpenAIGPTLMHeadModel" if name == "OpenAIGPT" else "GPT2LMHeadModel" if name == "GPT2" else ""
    return getattr(transformers, head or f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_generates_as_transformers(family: str, prompts, tmp_path) -> None:
    theirs = make(family)
    theirs.save_pretrained(tmp_path)
    ours = open_model(tmp_path, "cpu")
    # transformers' cache keeps keys as they were rotated for a shorter sequence, and its model the frequencies of the
    # longest one so far: its numbers are right without the cache, in a fresh copy.
    dynamic = family == "llama-dynamic"
    greedy, expected = Sampling(max_new_tokens=NEW), []
    for seed, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])

        def said(*, prompt=prompt, ids=ids, **options: Any) -> list[int]:
            model = copy.deepcopy(theirs) if dynamic else theirs
            options |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "use_cache": not dynamic}
            row = model.generate(ids, **options)[0]
            row = row[len(prompt) :].tolist()
            return row[: row.index(EOS)] if EOS in row else row

        expected.append(said(do_sample=False))
        assert list(ours.stream(prompt, greedy)) == expected[-1]
        beams = Sampling(max_new_tokens=NEW, beams=3, early_stopping=True)
        assert ours.candidates(prompt, beams)[0].ids == said(do_sample=False, num_beams=3, early_stopping=True)
        torch.manual_seed(seed)
        drawn = said(do_sample=True, temperature=0.8, top_k=9, top_p=0.9)
        draw = Sampling(max_new_tokens=NEW, temperature=0.8, top_k=9, top_p=0.9, seed=seed)
        assert list(ours.stream(prompt, draw)) == drawn
    assert ours.generate(prompts, greedy) == expected
    assert len(set(map(tuple, expected))) > 1


def test_an_encoder_generates_nothing(tmp_path) -> None:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    model = make_generator(load_model(tmp_path))
    for call in (
        lambda: open_model(tmp_path, "cpu"),  # a server would begin and refuse every request
        lambda: model.stream([5]),
        lambda: model.generate([[5]]),
        lambda: model.logprobs([5, 6]),  # an encoder sees what it is asked about
    ):
        with pytest.raises(UsageError, match="this bert model has the head mlm: it generates no text"):
            call()
