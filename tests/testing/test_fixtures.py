"""The fixtures and tiny artifacts that plugin authors get."""

import sys

import pytest

from llmctl import UsageError
from llmctl.errors import InputError, LlmctlError, MachineError
from llmctl.store import types
from llmctl.store.hashing import hash_file, plain_files
from llmctl.testing.artifacts import MAKERS, make
from llmctl.testing.baseline import PluginFile
from llmctl.text.datasets import read_rows

LIGHT = [type for type in MAKERS if type != "model.hf"]


@pytest.mark.parametrize("type", LIGHT)
def test_tiny_artifacts_are_valid_and_the_same_every_time(type, tmp_path):
    one, two = make(type, tmp_path / "one"), make(type, tmp_path / "two")
    names = plain_files(one.path)
    types.check_commit(type, one.path, names)
    assert [hash_file(one / name) for name in names] == [hash_file(two / name) for name in plain_files(two.path)]
    assert types.guess(one.path) == type


def test_the_tiny_model_answers(tmp_path):
    pytest.importorskip("torch")
    model = make("model.hf", tmp_path / "model")
    assert model.metadata["parameters"] < 50_000
    types.check_commit("model.hf", model.path, plain_files(model.path))
    from llmctl.registry import get_registry

    assert len(get_registry().open_generator(model, device="cpu").generate([[0, 70, 71]])[0]) > 0


def test_without_torch_the_model_names_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MachineError, match="a tiny model.hf needs the module `torch`") as found:
        make("model.hf", tmp_path / "model")
    assert found.value.hint == "pip install 'llmctl[train]'"


def test_a_type_that_cannot_be_made(tmp_path):
    with pytest.raises(UsageError, match="no tiny artifact of the type `model.onnx`"):
        make("model.onnx", tmp_path / "x")


def test_light_artifacts_need_no_torch(llmctl_env):
    import subprocess

    code = f"""
import sys, tempfile
from pathlib import Path
from llmctl.testing.artifacts import make
for type in {LIGHT!r}:
    make(type, Path(tempfile.mkdtemp()) / "x")
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=llmctl_env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_documents_and_questions_belong_together(tiny):
    documents = {row["id"] for row in read_rows(tiny("dataset.text"), "validation")}
    assert {row["document"] for row in read_rows(tiny("dataset.chat"), "validation")} == documents


SPEC = """
llmctl: 1
name: test
sources: {texts: {uri: PATH, type: dataset.text}}
stages:
  tokens: {uses: tokenize, inputs: {text: sources.texts}, with: {vocab_size: 300}}
"""


def test_run_spec_runs_by_the_real_runner(run_spec, store, tiny_text):
    text = SPEC.replace("PATH", str(tiny_text.path))
    result = run_spec(text)
    assert result.stages["tokens"].status == "done"
    artifact = result.stages["tokens"].outputs["tokens"]
    assert store.get(artifact.id).path == artifact.path
    assert run_spec(text).stages["tokens"].status == "cached"
    other = run_spec(text, "tokens.min_frequency=3", refresh=True)
    assert other.stages["tokens"].status == "done"
    with pytest.raises(LlmctlError, match="the text allows a vocabulary of"):
        run_spec(text, "tokens.vocab_size=100000")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no valid JSON"),
        ("[]", "does not begin with"),
        ('{"llmctl-plugin": 2}', "does not begin with"),
        ('{"llmctl-plugin": 1, "example": {}}', "unknown key `example`"),
        ('{"llmctl-plugin": 1, "examples": []}', "`examples` is no object"),
        ('{"llmctl-plugin": 1, "examples": {"a": [{"with": {}}]}}', "examples.a is no list of"),
    ],
)
def test_a_wrong_file_is_an_error_of_one_line(text, message, tmp_path):
    path = tmp_path / "llmctl-plugin.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        PluginFile.read(path)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["no-such-dist"], 2, "no plugin of the distribution `no-such-dist` is installed"),
        (["llmctll"], 2, "did you mean `llmctl`?"),
        ([], 2, "no plugin but llmctl's own is installed"),
        (["llmctl", "--stage", "tokenise"], 2, "did you mean `tokenize`?"),
        (["llmctl", "--file", "nothing.json"], 5, "nothing.json cannot be read: No such file"),
        (["llmctl", "--only", "speed"], 2, "invalid value for '--only'"),
        (["llmctl", "--kills", "0"], 2, "invalid value for '--kills'"),
    ],
)
def test_mistakes_of_plugins_test(args, code, message, llmctl):
    done = llmctl("plugins", "test", *args)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_examples_that_cannot_be_made_are_failures(llmctl, tmp_path):
    done = llmctl("plugins", "test", "llmctl", "--stage", "quantize", "--only", "declaration")
    assert done.returncode in (0, 3)
    path = tmp_path / "work/x.json"
    for inputs, reason in (
        ('{"text": "nowhere"}', "nowhere does not exist"),
        ('{"txt": "dataset.text"}', "stage `tokenize` has no input `txt` (it has: text, tokenizer)"),
    ):
        path.write_text(
            f'{{"llmctl-plugin": 1, "distribution": "llmctl", "examples": {{"tokenize": [{{"inputs": {inputs}}}]}}}}'
        )
        done = llmctl("plugins", "test", "llmctl", "--stage", "tokenize", "--file", "x.json")
        assert done.returncode == 3
        assert "FAILED  tokenize  examples     " in done.stdout
        assert reason in done.stdout


def test_record_guards_the_file_of_another_distribution(install, llmctl, tmp_path):
    (tmp_path / "work/llmctl-plugin.json").write_text('{"llmctl-plugin": 1, "distribution": "other"}')
    done = llmctl("plugins", "test", "--record", "llmctl")
    assert done.returncode == 2
    assert "is that of `other`, not of `llmctl`" in done.stderr


def test_a_broken_plugin_is_a_failed_check(install, llmctl):
    install("acme-broken", {"acme": "acme_broken"}, {"acme_broken.py": "1/0"})
    done = llmctl("plugins", "test")
    assert done.returncode == 3
    assert "FAILED  acme  load         the plugin `acme_broken`" in done.stdout
