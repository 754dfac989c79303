"""`hf://` wherever an input is given: in specs, on the command line, in the lock, in the lineage."""

import json

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmctl.cli import root
from llmctl.errors import LlmctlError
from llmctl.registry import get_registry
from llmctl.spec.diagnostics import SpecError
from llmctl.spec.pipeline import load_pipeline

NAME = "acme/tiny"
SPEC = """\
llmctl: 1
name: ours
sources:
  corpus: ./notes
  base: {uri: "hf://acme/tiny", type: tokenizer}
stages:
  data: {uses: data, inputs: {files: sources.corpus}, with: {emit: [text], validation_share: 0.0}}
  tokens: {uses: tokenize, inputs: {text: data, tokenizer: sources.base}}
"""


@pytest.fixture
def tokenizer_json():
    made = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made.to_str()


@pytest.fixture
def work(hub, home, model, tokenizer_json):
    """A spec that takes its tokenizer from the hub."""
    place = home / "work"
    (place / "notes").mkdir()
    (place / "notes/one.md").write_text("# One\n\nA short text.\n")
    (place / "ours.yaml").write_text(SPEC)
    hub.commit = hub.add(NAME, {**model, "tokenizer.json": tokenizer_json, "spiece.model": b"x"})
    return place


def call(*args):
    result = CliRunner().invoke(root, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit | LlmctlError):
        raise result.exception
    return result


def test_a_stage_reads_it_and_the_lineage_names_the_commit(work, hub):
    done = call("run", "ours.yaml", "--to", "tokens")
    assert done.exit_code == 0, done.stderr
    shown = call("lineage", "ours/tokens.tokens").stdout
    assert f"hf://{NAME}@{hub.commit}  tokenizer  from outside the store" in shown
    hub.repositories[NAME].commit({**hub.repositories[NAME].commits[hub.commit], "README.md": "another"})
    plan = json.loads(call("plan", "ours.yaml", "--to", "tokens", "--format", "json").stdout)
    assert [row["action"] for row in plan] == ["cached", "cached"]  # another commit with the same tokenizer
    moved = hub.repositories[NAME].commits[hub.commit] | {"vocab.json": "{}"}
    hub.repositories[NAME].commit(moved)
    why = call("why", "ours.yaml", "tokens").stdout
    assert "inputs.tokenizer (sources.base)" in why and "new vocab.json" in why


def test_check_asks_no_hub_and_a_lock_holds_the_commit(work, hub):
    assert call("check", "ours.yaml").exit_code == 0 and hub.requests == []
    assert call("run", "ours.yaml", "--to", "data").exit_code == 0
    assert hub.requests == []  # what is not read is not fetched
    assert call("lock", "ours.yaml").exit_code == 0
    lines = {line["name"]: line for line in map(json.loads, (work / "sources.lock.jsonl").read_text().splitlines())}
    assert lines["sources.base"]["revision"] == hub.commit and lines["sources.base"]["type"] == "tokenizer"
    assert "revision" not in lines["sources.corpus"]
    assert call("lock", "ours.yaml", "--check").exit_code == 0
    new = hub.repositories[NAME].commit({**hub.repositories[NAME].commits[hub.commit], "README.md": "another"})
    done = call("lock", "ours.yaml", "--check")
    assert done.exception.exit_code == 5
    assert f"source `sources.base`: revision {hub.commit} → {new}" in done.exception.message


def test_a_digest_in_the_spec_is_held_to(work, hub):
    call("lock", "ours.yaml")
    lines = {line["name"]: line for line in map(json.loads, (work / "sources.lock.jsonl").read_text().splitlines())}
    digest = lines["sources.base"]["digest"]
    for identity in ("sha256", "pinned"):
        text = SPEC.replace("type: tokenizer}", f"type: tokenizer, identity: {identity}, digest: '{digest}'}}")
        (work / "ours.yaml").write_text(text)
        assert call("lock", "ours.yaml").exit_code == 0
    (work / "ours.yaml").write_text(SPEC.replace("type: tokenizer}", f"type: tokenizer, digest: 'sha256:{'0' * 64}'}}"))
    done = call("lock", "ours.yaml")
    assert done.exception.exit_code == 5 and "`sources.base` has changed" in done.exception.message


def test_on_the_command_line(work, hub, capfd):
    done = call("data", "--files", "notes", "--set", "emit=[text]", "--validation-share", 0, "--format", "id")
    assert done.exit_code == 0, done.stderr
    text = capfd.readouterr().out.split()[0]  # references are written to the descriptor
    done = call("tokenize", "--text", text, "--tokenizer", f"hf://{NAME}@main")
    assert done.exit_code == 0, done.stderr
    shown = call("show", f"hf://{NAME}").stdout
    assert "type  model.hf" in shown and "model.safetensors" in shown
    done = call("show", "hf://acme/none")
    assert done.exception.exit_code == 5 and "there is no model acme/none" in done.exception.message
    done = call("show", "hf://acme/tiny/x")
    assert done.exception.exit_code == 5 and done.exception.hint == "hf://ORG/NAME@REVISION"


def test_an_error_says_where_the_address_stands(work, hub):
    (work / "ours.yaml").write_text(SPEC.replace("hf://acme/tiny", "hf://acme/tiny@v9"))
    done = call("lock", "ours.yaml")
    assert done.exception.message == "acme/tiny has no revision `v9` (ours.yaml:5:15)"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf://datasets/a/b", "E104 ours.yaml:5:15 `hf://datasets/` is not supported yet by this version of llmctl"),
        ("hf://a/b/c", "E102 ours.yaml:5:15 `hf://a/b/c` is no address of a model [hf://ORG/NAME@REVISION]"),
        ("s3://a/b", "E104 ours.yaml:5:15 `s3://` is not supported yet by this version of llmctl [use a path]"),
    ],
)
def test_a_bad_address_is_a_mistake_of_the_spec(work, uri, message):
    (work / "ours.yaml").write_text(SPEC.replace("hf://acme/tiny", uri))
    with pytest.raises(SpecError) as error:
        load_pipeline("ours.yaml", (), (), registry=get_registry())
    found = error.value.diagnostics[0]
    hint = f" [{found.hint}]" if found.hint else ""
    assert f"{found.code} {found.mark} {found.message}{hint}" == message


def test_a_source_on_the_hub_is_a_model_unless_it_says_otherwise(work):
    (work / "ours.yaml").write_text(SPEC.replace('{uri: "hf://acme/tiny", type: tokenizer}', "hf://acme/tiny@main"))
    with pytest.raises(SpecError, match="wants tokenizer, `sources.base` is model.hf"):
        load_pipeline("ours.yaml", (), (), registry=get_registry())
