"""Text as tokens and conversations, and small models that have learned it for a few seconds."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch = pytest.importorskip("torch")

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from llmctl.nn.config import ModelConfig  # noqa: E402
from llmctl.nn.hf import save_model  # noqa: E402
from llmctl.nn.transformer import Transformer  # noqa: E402
from llmctl.stage import Artifact  # noqa: E402
from llmctl.text import tokenizer as text_tokenizer  # noqa: E402
from llmctl.text.datasets import DatasetWriter  # noqa: E402
from llmctl.text.shards import ShardWriter  # noqa: E402

SPECIAL = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB = 256 + len(SPECIAL)
CONTEXT = 64
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def documents() -> list[str]:
    text = Path(textwrap.__file__).read_text() + Path(json.decoder.__file__).read_text()
    return [text[i : i + 300] for i in range(0, len(text), 300)]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """Bytes as tokens, with the project's special tokens and chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + letters)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps(names))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def tokens(tokenizer_dir, tmp_path_factory) -> Artifact:
    tokenizer = text_tokenizer.Tokenizer.load(tokenizer_dir)
    directory = tmp_path_factory.mktemp("tokens")
    with ShardWriter(directory, vocab_size=VOCAB, tokenizer=tokenizer.digest) as writer:
        for number, text in enumerate(documents()):
            split = "validation" if number % 5 == 0 else "train"
            writer.add(split, tokenizer.encode_document(text), len(text.encode()))
    return Artifact(directory, "dataset.tokens")


@pytest.fixture(scope="session")
def chat(tmp_path_factory) -> Artifact:
    directory = tmp_path_factory.mktemp("chat")
    with DatasetWriter(directory, "dataset.chat") as writer:
        for number, text in enumerate(documents()):
            messages = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": text[:50]}]
            row = {"id": str(number), "messages": messages}
            writer.add("validation" if number % 5 == 0 else "train", row)
    return Artifact(directory, "dataset.chat")


@pytest.fixture(scope="session")
def trained(tokens, tokenizer_dir, tmp_path_factory):
    """Models that have learned the text for a few seconds; `trained("gpt2")` is its artifact."""
    done: dict[tuple[str, int, int], Artifact] = {}
    ids = np.fromfile(tokens.path / "train-00000.bin", dtype="<u2").astype(np.int64)

    def get(arch: str, kv_heads: int = 2, heads: int = 4) -> Artifact:
        kv_heads = 4 if arch == "gpt2" else kv_heads
        if (arch, kv_heads, heads) in done:
            return done[arch, kv_heads, heads]
        torch.manual_seed(0)
        shape = {"vocab_size": VOCAB, "dim": 64, "layers": 3, "heads": heads, "ff_dim": 160, "context": CONTEXT}
        model = Transformer(ModelConfig(arch=arch, kv_heads=kv_heads, **shape, bos_id=0, eos_id=1, pad_id=2))
        hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim == 1 or all(p is not q for q in hidden)]
        # Muon, because after so few steps of AdamW the MLP hardly matters.
        optimizers = [torch.optim.Muon(hidden, lr=0.02, weight_decay=0), torch.optim.AdamW(rest, lr=3e-3)]
        rng = np.random.default_rng(0)
        steps = 200
        for step in range(steps):
            for optimizer, rate in zip(optimizers, (0.02, 3e-3), strict=True):
                optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10, (steps - step) / (steps / 2))
            rows = np.stack([ids[s : s + CONTEXT + 1] for s in rng.integers(0, len(ids) - CONTEXT - 1, 16)])
            batch = torch.from_numpy(rows)
            loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        directory = tmp_path_factory.mktemp(arch)
        save_model(model, directory, tokenizer_dir)
        done[arch, kv_heads, heads] = Artifact(directory, "model.hf")
        return done[arch, kv_heads, heads]

    return get


def sequences(model: Transformer, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, model.config.vocab_size, (count, 30), generator=generator)


@pytest.fixture
def fresh(tokenizer_dir, tmp_path):
    """Small models with random weights large enough that every part shows in the logits."""

    def make(arch: str, **changes) -> Artifact:
        shape = {"vocab_size": VOCAB, "dim": 32, "layers": 2, "heads": 8, "kv_heads": 4, "head_dim": 8, "ff_dim": 48}
        ids = {"bos_id": 0, "eos_id": 1, "pad_id": 2}
        config = ModelConfig(arch=arch, **{"context": CONTEXT, **shape, **ids, **changes})
        directory = tmp_path / f"fresh-{arch}-{len(list(tmp_path.iterdir()))}"
        save_model(loud(Transformer(config)), directory, tokenizer_dir)
        return Artifact(directory, "model.hf")

    return make


def loud(model: Transformer) -> Transformer:
    """The model with all weights of blocks and head drawn anew: no output matrix is near 0, no gain is 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            wide = parameter.ndim == 2
            parameter.normal_(0.0 if wide else 1.0, parameter.shape[1] ** -0.5 if wide else 0.1)
        if model.unembedding is not None:
            model.unembedding.weight.normal_(0, 0.2)
    return model
