"""A small LLaMA that was really trained, on sentences whose next token depends on the last one and on an early one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

VOCABULARY, CONTEXT, EOS = 97, 128, 1
KEYS, FIRST = 4, 7
"""Tokens 3 to 6 say by which of four permutations each of the tokens from 7 on is followed."""
_FOLLOWING = np.array([np.random.default_rng(key).permutation(VOCABULARY - FIRST) for key in range(KEYS)])


def sentence(random: np.random.Generator, length: int) -> list[int]:
    """A key, then what follows by it; one token in ten is random, one in thirty another key, some end with EOS."""
    key = int(random.integers(KEYS))
    tokens = [3 + key, int(random.integers(FIRST, VOCABULARY))]
    while len(tokens) < length:
        draw = random.random()
        if draw < 0.03:
            key = int(random.integers(KEYS))
            tokens += [3 + key, int(random.integers(FIRST, VOCABULARY))]
        elif draw < 0.13:
            tokens.append(int(random.integers(FIRST, VOCABULARY)))
        elif draw < 0.15:
            tokens.append(EOS)
            tokens += [3 + key, int(random.integers(FIRST, VOCABULARY))]
        else:
            tokens.append(FIRST + int(_FOLLOWING[key, tokens[-1] - FIRST]))
    return tokens[:length]


def train(path: Path, steps: int = 200) -> Path:
    """Write the directory of the model, in transformers' format, to `path`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine take minutes for seconds
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    random = np.random.default_rng(0)
    for _ in range(steps):
        batch = torch.tensor([sentence(random, 48) for _ in range(16)])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.eval().save_pretrained(path)
    return path
