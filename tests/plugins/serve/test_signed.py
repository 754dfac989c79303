"""`serve` with `require_signed_by`: what is not signed, or is not what was signed, is never opened."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llmctl import Artifact, InputError
from llmctl.registry import Registry
from llmctl.store import Store
from llmctl.store.copying import copy_signatures, materialise
from llmctl.store.hashing import plain_files
from llmctl.store.signing import sign
from llmctl.testing import run_stage
from llmctl.text.tokenizer import Tokenizer
from llmctl_serve import SERVE
from llmctl_serve.params import ServeParams


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Keys of team and mallory, and a list that knows both."""
    for name in ("team", "mallory"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    lines = [f"{name}@x.org {(tmp_path / f'{name}.pub').read_text()}" for name in ("team", "mallory")]
    (tmp_path / "allowed").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def model(tmp_path, model_dir, opens, scripted, monkeypatch) -> Artifact:
    """A model in a store, whose opening would succeed."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("LLMCTL_STORE", raising=False)
    store = Store(tmp_path / "store")
    store.create()
    made = store.commit(model_dir, "files", plain_files(model_dir), metadata={}, provenance={})
    opens({path: scripted(Tokenizer.load(made.path), default="yes") for path in (made.path, tmp_path / "copy")})
    return made


def serve(tmp_path, keys, model, **params):
    given = {"port": 0, "mode": "smoke", "smoke_questions": ["?"], "require_signed_by": "team@x.org"}
    return run_stage(
        SERVE, tmp_path / "out", {**given, "allowed_signers": str(keys / "allowed"), **params}, model=model
    )


def test_a_signed_model_is_served(tmp_path, keys, model):
    sign(model.id, Store(tmp_path / "store").signatures(model.id), keys / "team")
    assert serve(tmp_path, keys, model).metrics["smoke.answered"] == 1


def test_so_is_a_signed_copy(tmp_path, keys, model):
    store = Store(tmp_path / "store")
    sign(model.id, store.signatures(model.id), keys / "team")
    materialise(model, tmp_path / "copy")
    copy = Artifact(tmp_path / "copy", "files", model.id)
    with pytest.raises(InputError, match="it is not signed"):
        serve(tmp_path, keys, copy)
    copy_signatures(store.signatures(model.id), tmp_path / "copy")
    assert serve(tmp_path, keys, copy).metrics["smoke.answered"] == 1


def test_an_unsigned_model_is_served_where_nobody_asks(tmp_path, keys, model):
    assert serve(tmp_path, keys, model, require_signed_by=None, allowed_signers=None).metrics["smoke.answered"] == 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unsigned", "has no good signature of team@x.org: it is not signed"),
        ("other", "it is signed by mallory@x.org, not by team@x.org"),
        ("tampered", "is damaged: .* what was signed is something else"),
        ("manifest", "has no valid llmctl.json"),
        ("list", "there is no list of allowed signers"),
    ],
)
def test_everything_else_is_refused_before_it_is_opened(how, message, tmp_path, keys, model, monkeypatch):
    def opened(*args, **kwargs):
        raise AssertionError("it was opened")

    monkeypatch.setattr(Registry, "open_generator", opened)
    if how != "unsigned":
        sign(model.id, Store(tmp_path / "store").signatures(model.id), keys / ("mallory" if how == "other" else "team"))
    if how == "tampered":
        path = model / "tokenizer.json"
        path.chmod(0o644)
        path.write_text(path.read_text().replace("{", " ", 1))
    if how == "manifest":
        (model / "llmctl.json").unlink()
    allowed = {"allowed_signers": str(tmp_path / "none")} if how == "list" else {}
    with pytest.raises(InputError, match=message) as error:
        serve(tmp_path, keys, model, **allowed)
    assert error.value.exit_code == 5


def test_a_list_without_a_signer_is_a_mistake():
    with pytest.raises(ValueError, match="belongs to require_signed_by"):
        ServeParams(allowed_signers="x")
