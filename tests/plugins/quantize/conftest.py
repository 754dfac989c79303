"""A model that has learned one sentence, its bundle, and token shards of that sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmctl import Artifact
from llmctl.testing import run_stage
from llmctl_export_onnx import EXPORT_ONNX

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "
SPECIALS = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_tokenizer(directory: Path) -> None:
    """One token per byte after the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {t: i for i, t in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({**names, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (directory / "special_tokens_map.json").write_text(json.dumps(names))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model that has learned TEXT, so that rounding its weights costs something."""
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer
    from llmctl.text.tokenizer import Tokenizer

    tokenizer_dir, directory = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("hf")
    write_tokenizer(tokenizer_dir)
    ids = torch.tensor(Tokenizer.load(tokenizer_dir).encode(TEXT * 4))
    torch.manual_seed(0)
    shape = {"vocab_size": 262, "dim": 96, "layers": 2, "heads": 4, "kv_heads": 2, "ff_dim": 160, "context": 96}
    model = Transformer(ModelConfig(arch="llama", **shape, bos_id=0, eos_id=1, pad_id=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        starts = torch.arange(8) * 11 + step
        batch = torch.stack([ids[s : s + 65] for s in starts.tolist()])
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2.0
    save_model(model.eval(), directory, tokenizer_dir)
    return Artifact(directory, "model.hf")


@pytest.fixture(scope="session")
def bundle(trained: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    params = {"parity_prompts": 2, "threads": 1}
    return run_stage(EXPORT_ONNX, tmp_path_factory.mktemp("onnx"), params, model=trained).outputs["model"]


@pytest.fixture(scope="session")
def tokens(trained: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from llmctl.text.shards import ShardWriter
    from llmctl.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(trained.path)
    path = tmp_path_factory.mktemp("tokens")
    with ShardWriter(path, vocab_size=262, tokenizer=tokenizer.digest, splits=("train", "validation")) as writer:
        for split in ("train", "validation"):
            writer.add(split, tokenizer.encode_document(TEXT * 3), len(TEXT) * 3)
    return Artifact(path, "dataset.tokens")
