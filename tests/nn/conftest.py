"""Random-init transformers models, with weights large enough that a wrong formula shows in the logits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 97
CONTEXT = 64
COMMON = {"vocab_size": VOCAB, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = {
    **COMMON,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}


def _llama(**changes):
    return transformers.LlamaConfig(**{**LLAMA, **changes})


CONFIGS: dict[str, Callable[[], object]] = {
    "llama-gqa": lambda: _llama(tie_word_embeddings=True),
    "llama-untied": lambda: _llama(tie_word_embeddings=False, rope_theta=500.0, rms_norm_eps=1e-5),
    "llama-mha": lambda: _llama(num_key_value_heads=4, tie_word_embeddings=False),
    "llama-mqa-wide": lambda: _llama(num_key_value_heads=1, head_dim=20, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**{**LLAMA, "head_dim": 20}),
    "gpt2": lambda: transformers.GPT2Config(**COMMON, n_embd=48, n_layer=3, n_head=4, n_positions=CONTEXT),
    "gpt2-untied-narrow": lambda: transformers.GPT2Config(
        **COMMON, n_embd=48, n_layer=2, n_head=3, n_inner=80, n_positions=CONTEXT, tie_word_embeddings=False
    ),
}
FAMILIES = sorted(CONFIGS)


def random_hf(name: str, seed: int = 0):
    """A transformers model in evaluation mode; norms and biases are random too, or a swapped pair would pass."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory) -> Callable[[str], Path]:
    """`save_pretrained` of `random_hf(name)`, written once."""
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            random_hf(name).save_pretrained(done[name])
        return done[name]

    return get
