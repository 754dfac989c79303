"""Vectors of texts and of words in them: pooled apart from neighbours, equal in torch and ONNX, apart by sense."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from llmctl import Artifact, InputError, UsageError
from llmctl.testing import run_stage
from llmctl.text.pooling import write_pooling
from llmctl.text.vectors import load
from llmctl_embed import EMBED

torch = pytest.importorskip("torch")

SENSES = [[f"{kind}{n}" for n in range(30)] for kind in ("river", "money")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bank", *SENSES[0], *SENSES[1]]


def sentences(count, seed):
    """(sense, text): `bank` among five words of one sense."""
    drawn = random.Random(seed)
    found = []
    for number in range(count):
        words = drawn.sample(SENSES[number % 2], 5)
        words.insert(drawn.randrange(6), "bank")
        found.append((number % 2, " ".join(words)))
    drawn.shuffle(found)
    return found


def write_tokenizer(directory):
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Raw

    raw = Raw(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:5]])
    directory.mkdir(parents=True, exist_ok=True)
    raw.save(str(directory / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return directory


def make_model(directory, steps):
    """A small BERT that has guessed hidden words for so many steps."""
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import save_model
    from llmctl.nn.transformer import Transformer

    torch.manual_seed(0)
    config = ModelConfig(
        arch="bert", token_types=2, vocab_size=len(WORDS), dim=32, layers=2, heads=2, context=32, pad_id=0
    )
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = sentences(2000, 1)
    ids = torch.tensor([[2, *(WORDS.index(word) for word in text.split()), 3] for _, text in texts])
    for _ in range(steps):
        batch = ids[torch.randint(0, len(ids), (64,))]
        hidden = torch.rand(batch.shape) < 0.25
        hidden[:, [0, -1]] = False
        states = model.hidden(batch.masked_fill(hidden, 4), documents=torch.zeros_like(batch))
        loss = torch.nn.functional.cross_entropy(model.head(states[hidden]), batch[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(model, directory, write_tokenizer(directory.with_name("tokenizer")))
    return Artifact(directory, "model.hf")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("fresh") / "model", 0)


def texts_in(path, rows):
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in rows))
    return Artifact(path, "dataset.text")


def encoded(tmp_path, model, rows, **params):
    text = texts_in(tmp_path / "rows.jsonl", rows)
    result = run_stage(EMBED, tmp_path / "out", {"method": "encode", **params}, text=text, model=model)
    return load(result.outputs["vectors"].path), result


def by_sense(vectors, senses):
    nearest = vectors.neighbours(vectors.matrix, 1, [[row] for row in range(len(senses))])
    return float(np.mean([senses[found[0][0]] == sense for found, sense in zip(nearest, senses, strict=True)]))


@pytest.mark.slow
def test_neighbours_of_a_word_in_its_text_have_its_sense_and_static_vectors_do_not(tmp_path):
    """Trained to guess words; the same word's vector of word2vec is one for all texts."""
    model = make_model(tmp_path / "model", 400)
    found = sentences(200, 2)
    rows = [(str(n), text) for n, (_, text) in enumerate(found)]
    vectors, _ = encoded(tmp_path, model, rows, word="bank")
    assert by_sense(vectors, [sense for sense, _ in found]) >= 0.95

    params = {"min_count": 1, "vector_size": 16, "epochs": 3}
    text = texts_in(tmp_path / "rows.jsonl", rows)
    static = load(run_stage(EMBED, tmp_path / "static", params, text=text).outputs["vectors"].path)
    same = np.repeat(static.matrix[[static.row("bank")]], len(found), axis=0)
    assert 0.4 < by_sense(type(static)(vectors.names, same), [sense for sense, _ in found]) < 0.6


ROWS = [("a", "bank river1"), ("b", " ".join(["money3"] * 20)), ("c", "river2 bank money1"), ("d", "money4")]


def test_a_text_alone_has_the_vector_that_it_has_among_longer_ones(fresh, tmp_path):
    together, _ = encoded(tmp_path, fresh, ROWS)
    assert list(together.names) == ["a", "b", "c", "d"]
    for number, row in enumerate(ROWS):
        alone, _ = encoded(tmp_path / row[0] if (tmp_path / row[0]).mkdir() is None else tmp_path, fresh, [row])
        assert np.abs(alone.matrix[0] - together.matrix[number]).max() < 1e-6
    assert np.allclose(np.linalg.norm(together.matrix, axis=1), 1, atol=1e-6)


def test_vectors_are_the_states_pooled_as_asked(fresh, tmp_path):
    from transformers import BertModel

    model = BertModel.from_pretrained(str(fresh.path), add_pooling_layer=False).eval()
    ids = [2, *(WORDS.index(word) for word in ROWS[2][1].split()), 3]
    with torch.no_grad():
        states = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    wanted = {("mean", ""): states.mean(0), ("cls", ""): states[0], ("mean", "bank"): states[2]}
    for (pooling, word), expected in wanted.items():
        folder = tmp_path / f"{pooling}{word}"
        folder.mkdir()
        found, _ = encoded(folder, fresh, [ROWS[2]], pooling=pooling, word=word, normalise=False)
        assert np.abs(found.matrix[0] - expected).max() < 1e-5


def test_the_model_says_how_it_is_pooled(fresh, tmp_path):
    import shutil

    said = shutil.copytree(fresh.path, tmp_path / "said")
    write_pooling(said, "cls", 32, 32, normalise=False)
    by_itself, _ = encoded(tmp_path, Artifact(said, "model.hf"), ROWS)
    asked, _ = encoded(tmp_path, fresh, ROWS, pooling="cls", normalise=False)
    assert np.array_equal(by_itself.matrix, asked.matrix)
    assert by_itself.info["pooling"] == "cls"


def test_onnx_says_what_torch_says(fresh, tmp_path):
    pytest.importorskip("onnx")
    from llmctl.nn.config import ModelConfig
    from llmctl.nn.hf import load_model, save_model
    from llmctl.nn.transformer import Transformer
    from llmctl_export_onnx import EXPORT_ONNX

    whole = load_model(fresh.path, torch.device("cpu"))
    values = {
        "arch": "bert",
        "token_types": 2,
        "vocab_size": len(WORDS),
        "dim": 32,
        "layers": 2,
        "heads": 2,
        "context": 32,
        "pad_id": 0,
    }
    bare = Transformer(ModelConfig(**values, head="features"))
    bare.load_state_dict(whole.state_dict(), strict=False)
    save_model(bare, tmp_path / "bare", fresh.path)
    hf = Artifact(tmp_path / "bare", "model.hf")
    exported = run_stage(EXPORT_ONNX, tmp_path / "onnx", {"parity_prompts": 2, "threads": 1}, model=hf)
    for params in ({}, {"word": "bank", "normalise": False}):
        by_torch, _ = encoded(tmp_path, hf, ROWS, **params)
        by_onnx, _ = encoded(tmp_path, exported.outputs["model"], ROWS, **params)
        assert by_torch.names == by_onnx.names
        assert np.abs(by_torch.matrix - by_onnx.matrix).max() < 1e-5


def test_what_is_left_out_is_counted(fresh, tmp_path):
    rows = [*ROWS, ("long", "bank " * 40)]
    vectors, result = encoded(tmp_path, fresh, rows, word="bank")
    assert list(vectors.names) == ["a", "c"]
    assert (result.metrics["too_long"], result.metrics["without_word"]) == (1, 2)
    assert vectors.rows[0]["text"] == "bank river1"
    with pytest.raises(InputError, match="no text holds the word 'nowhere'"):
        encoded(tmp_path, fresh, ROWS, word="nowhere")
    with pytest.raises(InputError, match="no text fits the model"):
        encoded(tmp_path, fresh, rows[-1:])
    upper = [("e", "Bank river1")]
    assert encoded(tmp_path, fresh, upper, word="bank")[0].names == ["e"]
    with pytest.raises(InputError):
        encoded(tmp_path, fresh, upper, word="bank", lowercase=False)


def test_word2vec_takes_no_model(fresh, tmp_path):
    with pytest.raises(UsageError, match="takes no model"):
        encoded(tmp_path, fresh, ROWS, method="word2vec")
