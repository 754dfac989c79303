"""`llmctl init`: for every goal a spec that passes `check`, whose smoke profile really runs; mistakes are told."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmctl.errors import InputError, UsageError
from llmctl.registry import get_registry
from llmctl.spec.pipeline import load_pipeline
from llmctl.starter import commands, material
from llmctl.starter.goals import GOALS, TEMPLATES, find_data, find_goal, find_model, render

QUESTION = {"role": "user", "content": "What is 2 plus 2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_texts(folder, count=6):
    """Real prose, in files of a size that splits can be made of."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True)
    for name, text in [(name, text) for name, text in sorted(topics.items()) if len(text) > 3000][:count]:
        (folder / f"{name}.md").write_text(f"# {name}\n\n{text}")
    return folder


def conversations(count=40):
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} plus {number}?"},
                {"role": "assistant", "content": f"It is {2 * number}."},
            ]
        }
        for number in range(count)
    ]


def preferences(count=40):
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {number} plus {number}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {2 * number}."}],
            "rejected": [{"role": "assistant", "content": f"It is {2 * number + 1}."}],
        }
        for number in range(count)
    ]


def write_model(path, model_type="llama"):
    """The names and headers of a model, enough for everything but running it."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": ["X"]}))
    (path / "tokenizer.json").write_text('{"model": {}}')
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return path


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    write_texts(folder / "texts")
    write_rows(folder / "chat.jsonl", conversations())
    write_rows(folder / "split/train.jsonl", conversations())
    write_rows(folder / "split/validation.jsonl", conversations(8))
    write_rows(folder / "pairs.jsonl", preferences())
    write_rows(folder / "plain.jsonl", [{"text": "some words"}])
    write_rows(folder / "odd.jsonl", [{"instruction": "a", "output": "b"}])
    write_model(folder / "base")
    (folder / "shards").mkdir()
    meta = {"dtype": "uint16", "vocab_size": 9, "tokenizer": "x", "splits": {"train": {"tokens": 1, "documents": 1}}}
    (folder / "shards/meta.json").write_text(json.dumps(meta))
    (folder / "shards/train-00000.bin").write_bytes(bytes(2))
    (folder / "shards/train-00000.idx").write_bytes(bytes(16))
    return folder


GIVEN = [
    ("pretrain", {}),
    ("pretrain", {"data": "texts"}),
    ("pretrain", {"data": "texts/*.md"}),
    ("pretrain", {"data": "plain.jsonl"}),
    ("fine-tune", {}),
    ("fine-tune", {"data": "chat.jsonl", "model": "base"}),
    ("fine-tune", {"data": "split", "model": "base"}),
    ("compress", {}),
    ("compress", {"data": "texts", "model": "base"}),
    ("compress", {"data": "chat.jsonl", "model": "base"}),
    ("compress", {"data": "split", "model": "base"}),
    ("rag", {}),
    ("rag", {"data": "texts"}),
    ("rag", {"data": "texts", "model": "base"}),
    ("evaluate", {}),
    ("evaluate", {"data": "texts", "model": "base"}),
    ("evaluate", {"data": "chat.jsonl", "model": "base"}),
    ("evaluate", {"data": "split", "model": "base"}),
    ("evaluate", {"data": "pairs.jsonl", "model": "base"}),
    ("evaluate", {"data": "shards", "model": "base"}),
]


@pytest.mark.parametrize(("goal", "given"), GIVEN, ids=[f"{goal} {' '.join(given.values())}" for goal, given in GIVEN])
def test_the_spec_is_valid_with_each_of_its_profiles(goal, given, work, monkeypatch):
    monkeypatch.chdir(work)
    data = find_data(GOALS[goal], given["data"]) if "data" in given else None
    model = find_model(GOALS[goal], given["model"]) if "model" in given else None
    plan = render(GOALS[goal], "mine", Path(), data, model)
    Path("mine.yaml").write_text(plan.text)
    pipeline = load_pipeline("mine.yaml", registry=get_registry())
    assert pipeline.name == "mine"
    profiles = re.findall(r"^  ([\w-]+):$", plan.text.partition("\nprofiles:\n")[2], re.MULTILINE)
    assert "smoke" in profiles
    for profile in profiles:
        load_pipeline("mine.yaml", [profile], registry=get_registry())
    assert any(spec.gates for spec in pipeline.stages.values())
    assert bool(plan.missing) == (not given and not GOALS[goal].corpus)
    for source in pipeline.sources.values():  # what was given is what the spec reads
        assert plan.missing or list(Path().glob(source.uri.removeprefix("./"))), source
    comments = sum("#" in line for line in plan.text.splitlines())
    assert comments >= 6, "a spec to learn from says why"
    assert all(len(line) <= 130 for line in plan.text.splitlines())


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("name", ["2024", "true", "1e5", "null", "0x1F", "mine"])
def test_a_name_is_text_whatever_it_looks_like(goal, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = render(GOALS[goal], name, Path(), None, None)
    (tmp_path / "s.yaml").write_text(plan.text)
    pipeline = load_pipeline("s.yaml", registry=get_registry())
    assert pipeline.name == name
    assert f"\nname: {name}\n" in plan.text or name != "mine", "a plain name stays plain"
    assert {spec.output.name for spec in pipeline.stages.values() if spec.output} <= {name}


def test_a_name_that_no_file_can_have_is_refused():
    assert commands._checked("a" * 200)
    with pytest.raises(UsageError, match="a name of 5000 characters is too long"):
        commands._checked("1" * 5000)


def test_held_out_conversations_are_measured_on_where_there_are_any(work, monkeypatch):
    monkeypatch.chdir(work)
    for path, split in (("chat.jsonl", "train"), ("split", "validation")):
        plan = render(
            GOALS["fine-tune"], "x", Path(), find_data(GOALS["fine-tune"], path), find_model(GOALS["fine-tune"], "base")
        )
        Path("x.yaml").write_text(plan.text)
        assert load_pipeline("x.yaml", registry=get_registry()).stages["eval-sft"].params.split == split


def test_every_goal_has_its_template_and_names_that_others_have():
    assert {path.name for path in TEMPLATES.iterdir()} == {f"{name}.yaml.jinja" for name in GOALS}
    readers = pytest.importorskip("llmctl_data.readers")
    assert set(material.READABLE) == set(readers.SUPPORTED)
    from llmctl.nn.config import TRAITS
    from llmctl.nn.families import FAMILIES

    encoders = {family.model_type for arch, family in FAMILIES.items() if TRAITS[arch].kind == "encoder"}
    assert set(material.ENCODERS) == encoders


# -- really run -------------------------------------------------------------------------------------------------------


class Program:
    def __init__(self, work):
        self.work = work
        dropped = ("LLMCTL_", "NO_COLOR", "CLICOLOR", "FORCE_COLOR", "CI", "TERM", "COLUMNS", "PYTHONPATH")
        env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        self.env = {**env, "OMP_NUM_THREADS": "1"}

    def __call__(self, *args, timeout=250):
        program = Path(sys.executable).with_name("llmctl")
        done = subprocess.run(
            [program, *args],
            cwd=self.work,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def follow(self, shown):
        """Run the first two of the printed commands, as they are printed."""
        lines = [line.strip() for line in shown.partition("next:\n")[2].splitlines()]
        assert [re.search(r" (check|run) ", line)[1] for line in lines] == ["check", "run", "run"]
        assert lines[1] == f"{lines[2]} --profile smoke"
        for line in lines[:2]:
            done = subprocess.run(
                ["bash", "-c", line], cwd=self.work, env=self.env, capture_output=True, text=True, timeout=250
            )
            assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A directory with texts, rows, and the model of the goal `pretrain`'s own smoke run in `base`."""
    work = tmp_path_factory.mktemp("init") / "meine Texte ü"
    work.mkdir()
    program = Program(work)
    write_texts(work / "texts")
    write_rows(work / "chat.jsonl", conversations())
    write_rows(work / "pairs.jsonl", preferences())
    program.shown = program.follow(program("init", "pretrain", "--data", "texts", "--name", "first"))
    program("get", "first/train.model", "base")
    return program


@pytest.mark.slow
def test_pretrain_runs_to_an_exported_model(program):
    assert (program.work / "exports/first-smoke/model.onnx").is_file()
    assert "gates:" in program.shown


@pytest.mark.slow
def test_rag_runs_on_a_folder(program):
    shown = program.follow(program("init", "rag", "--data", "texts", "--name", "r1"))
    assert "recall@5" in shown


@pytest.mark.slow
def test_evaluate_runs_on_preferences(program):
    program.follow(program("init", "evaluate", "--model", "base", "--data", "pairs.jsonl", "--name", "e1"))


@pytest.mark.slow
def test_fine_tune_runs_to_an_exported_model(program):
    program.follow(program("init", "fine-tune", "--model", "base", "--data", "chat.jsonl", "--name", "tuned"))
    assert (program.work / "exports/tuned-smoke/model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("data", ["texts", "chat.jsonl"])
def test_compress_runs_to_an_exported_model(program, data):
    name = f"small-{data.partition('.')[0]}"
    shown = program.follow(program("init", "compress", "--model", "base", "--data", data, "--name", name))
    assert (program.work / f"exports/{name}-smoke/model.onnx").is_file()
    assert "eval-original" in shown and "eval-int8" in shown


@pytest.mark.slow
@pytest.mark.parametrize("data", ["texts", "chat.jsonl"])
def test_evaluate_runs(program, data):
    program.follow(program("init", "evaluate", "--model", "base", "--data", data, "--name", f"e-{data[:4]}"))


@pytest.mark.slow
@pytest.mark.parametrize("goal", ["pretrain", "rag"])
def test_pretrain_and_rag_run_on_pythons_own_library(program, goal):
    program.follow(program("init", goal, "--name", f"own-{goal}"))


@pytest.mark.slow
def test_rag_with_a_model_serves(program):
    program("init", "rag", "--data", "texts", "--model", "exports/first-smoke", "--name", "r2")
    program("run", "r2.yaml", "--profile", "smoke", "--to", "serve")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pretrain_in_full_passes_its_gates(program):
    """Not only the smoke profile: the spec as a person runs it."""
    program("init", "pretrain", "--name", "whole")
    assert "gates: 3 of 3 passed" in program("run", "whole.yaml", timeout=1100)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_never_overwritten_unless_asked(llmctl, work):
    (work / "pretrain.yaml").write_text("mine")
    done = llmctl("init", "pretrain")
    assert done.returncode == 5 and "pretrain.yaml exists" in done.stderr and "--force" in done.stderr
    assert (work / "pretrain.yaml").read_text() == "mine"
    assert llmctl("init", "pretrain", "--force").returncode == 0
    assert "llmctl: 1" in (work / "pretrain.yaml").read_text()
    (work / "link.yaml").symlink_to("nowhere")
    assert llmctl("init", "pretrain", "--name", "link").returncode == 5


def test_another_directory_is_made_and_paths_are_seen_from_there(llmctl, work):
    done = llmctl("init", "pretrain", "--directory", "deep/er", "--data", "texts", "--name", "n")
    assert done.returncode == 0 and "wrote deep/er/n.yaml" in done.stdout
    assert "corpus: ../../texts" in (work / "deep/er/n.yaml").read_text()
    assert llmctl("check", "deep/er/n.yaml").returncode == 0
    assert sorted(path.name for path in (work / "deep/er").iterdir()) == [".llmctl", "n.yaml"]
    (work / "file").write_text("")
    assert llmctl("init", "rag", "--directory", "file/x").returncode == 5


def test_paths_with_signs_of_yaml_are_quoted(llmctl, work):
    write_texts(work / "a, b: {c} #d", 2)
    assert llmctl("init", "pretrain", "--data", "a, b: {c} #d").returncode == 0
    assert llmctl("check", "pretrain.yaml").returncode == 0
    (source,) = load_pipeline(work / "pretrain.yaml", registry=get_registry()).sources.values()
    assert (work / source.uri).is_dir()


def test_what_is_missing_is_named(llmctl, work):
    done = llmctl("init", "fine-tune")
    assert "put in place first" in done.stdout and "data/chat.jsonl: conversations" in done.stdout
    assert "models/base: the model" in done.stdout
    assert "put in place" not in llmctl("init", "rag").stdout


def test_the_schema_lies_in_the_nearest_project(tmp_path):
    assert commands.write_schema(tmp_path) == "./.llmctl/pipeline.schema.json"
    schema = json.loads((tmp_path / ".llmctl/pipeline.schema.json").read_text())
    assert schema["title"] == "llmctl pipeline" and "sft.with" in schema["$defs"]
    assert (tmp_path / ".llmctl/.gitignore").read_text() == "*\n"
    (tmp_path / "deep").mkdir()
    assert commands.write_schema(tmp_path / "deep") == "../.llmctl/pipeline.schema.json"
    plan = render(GOALS["rag"], "x", tmp_path, None, None, schema="./.llmctl/pipeline.schema.json")
    assert plan.text.startswith("# yaml-language-server: $schema=./.llmctl/pipeline.schema.json\n")


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_goals_are_listed_and_near_ones_named(llmctl):
    done = llmctl("init")
    assert done.returncode == 2
    assert done.stderr == "error: which goal?\n  hint: goals: pretrain, fine-tune, compress, rag, evaluate\n"
    done = llmctl("init", "fine-tun")
    assert done.returncode == 2 and "did you mean `fine-tune`?" in done.stderr
    with pytest.raises(UsageError, match="no goal `zzz`") as caught:
        find_goal("zzz")
    assert caught.value.hint == "goals: pretrain, fine-tune, compress, rag, evaluate"
    with pytest.raises(UsageError) as caught:
        find_goal("sft")
    assert caught.value.hint == "did you mean `fine-tune`?"


@pytest.mark.parametrize(
    ("goal", "data", "message", "hint"),
    [
        ("fine-tune", "pairs.jsonl", "holds preferences (columns `prompt`, `chosen`, `rejected`)", "rlhf"),
        ("fine-tune", "texts", "holds 6 text files; fine-tune wants conversations", "llmctl data --files texts"),
        ("fine-tune", "plain.jsonl", "holds 1 text file; fine-tune wants conversations", "derive conversations"),
        ("fine-tune", "odd.jsonl", "rows with the columns `instruction`, `output`", "rename them"),
        ("fine-tune", "texty.jsonl", "holds rows whose `messages` is no list of messages", "a message is"),
        ("evaluate", "flat.jsonl", "holds rows whose `prompt` is no list of messages", "a message is"),
        ("pretrain", "chat.jsonl", "holds conversations (column `messages`); pretrain wants texts", None),
        ("pretrain", "base", "holds a model; pretrain wants texts", None),
        ("pretrain", " ", "the path of the data is empty", "give a file"),
        ("pretrain", "zzz", "no such file or directory: zzz", None),
        ("pretrain", "text", "no such file or directory: text", "did you mean `texts`?"),
        ("pretrain", "*.nothing", "nothing matches", "quote a pattern"),
        ("pretrain", "empty", "holds no files", "readable are"),
        ("pretrain", "mixed", "holds 1 files that are no text (.pdf)", "--data 'mixed/**/*.md'"),
        ("pretrain", "link", "link is a link to nothing", "it points at nowhere"),
        ("fine-tune", "broken.jsonl", "cannot be used: broken.jsonl holds no JSON Lines", "formats"),
        ("rag", "bad.parquet", "is no Parquet file", None),
    ],
)  # fmt: skip
def test_data_of_another_kind_says_what_was_found(goal, data, message, hint, work, monkeypatch):
    monkeypatch.chdir(work)
    Path("empty").mkdir()
    Path("mixed").mkdir()
    Path("mixed/a.pdf").write_text("")
    Path("link").symlink_to("nowhere")
    Path("broken.jsonl").write_text("{")
    write_rows(Path("texty.jsonl"), [{"messages": "hello"}])
    write_rows(Path("flat.jsonl"), [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    Path("bad.parquet").write_text("no")
    with pytest.raises(InputError) as caught:
        find_data(GOALS[goal], data)
    assert message in caught.value.message
    assert hint in caught.value.hint if hint else caught.value.hint is None


def test_parquet_rows_are_told_by_their_columns(work, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(work)
    parquet.write_table(arrow.table({"messages": [[QUESTION, ANSWER]]}), "chat.parquet")
    assert find_data(GOALS["fine-tune"], "chat.parquet").kind == "dataset.chat"
    parquet.write_table(arrow.table({"text": ["a"]}), "text.parquet")
    assert find_data(GOALS["rag"], "text.parquet").kind == "files"


def test_what_cannot_be_read_is_said(work, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(material.types, "guess", refuse)
    with pytest.raises(InputError, match=r"cannot read .*texts: Permission denied"):
        find_data(GOALS["pretrain"], str(work / "texts"))
    with pytest.raises(InputError, match=r"cannot read .*base: Permission denied"):
        find_model(GOALS["compress"], str(work / "base"))


def test_models_that_cannot_be_used_are_told_apart(work, monkeypatch):
    monkeypatch.chdir(work)
    write_model(Path("bert"), "bert")
    write_model(Path("mute"))
    Path("mute/tokenizer.json").unlink()
    write_model(Path("pickled"))
    Path("pickled/model.safetensors").rename("pickled/pytorch_model.bin")
    for goal, path, message in (
        ("compress", "bert", "a model of type `bert`, an encoder"),
        ("compress", "mute", "has no tokenizer.json"),
        ("fine-tune", "pickled", "model.safetensors is missing (pytorch_model.bin is not read"),
        ("fine-tune", "texts", "texts holds no config.json and no model.safetensors, model.hf is wanted"),
        ("fine-tune", "chat.jsonl", "chat.jsonl holds conversations"),
        ("fine-tune", "", "the path of the model is empty"),
        ("fine-tune", "bas", "no such file or directory: bas"),
    ):
        with pytest.raises(InputError) as caught:
            find_model(GOALS[goal], path)
        assert message in caught.value.message
    assert find_model(GOALS["evaluate"], "bert").kind == "model.hf", "what is only measured may be of any type"
    with pytest.raises(UsageError, match="pretrain takes no --model"):
        find_model(GOALS["pretrain"], "base")


@pytest.mark.parametrize("name", ["a b", "../x", "-x", ""])
def test_names_that_are_none(name, llmctl):
    done = llmctl("init", "rag", f"--name={name}")
    assert done.returncode == 2 if name else done.returncode == 0  # an empty one is one not given
    assert "is no name" in done.stderr or not name


# -- asking -----------------------------------------------------------------------------------------------------------


def test_on_a_terminal_it_asks_and_checks_every_answer(llmctl_env, work):
    child, master = pty.fork()
    if not child:
        os.chdir(work)
        os.execve(sys.executable, [sys.executable, "-m", "llmctl", "init"], llmctl_env)
    seen = ""

    def expect(pattern):
        nonlocal seen
        end = time.monotonic() + 30
        while not re.search(pattern, seen):
            ready, _, _ = select.select([master], [], [], max(0, end - time.monotonic()))
            assert ready, seen
            try:
                seen += os.read(master, 4096).decode()
            except OSError:
                break
        assert re.search(pattern, seen), seen

    def answer(text, pattern):
        nonlocal seen
        seen = ""
        os.write(master, text.encode() + b"\n")
        expect(pattern)

    try:
        expect(r"1  pretrain(?s:.*)5  evaluate(?s:.*)Number or name \[1\]")
        answer("9", r"no goal `9`(?s:.*)Number or name")
        answer("2", "Your data")
        answer("pairs.jsonl", r"holds preferences(?s:.*)Your data")
        answer("chat.jsonl", r"conversations \(column(?s:.*)Your model")
        answer("", r"Name \[fine-tune\]")
        answer("no good", r"is no name(?s:.*)Name")
        answer("mine", r"wrote mine\.yaml(?s:.*)next:(?s:.*)run mine\.yaml\r\n")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = 0
    finally:
        if child:
            os.kill(child, 9)
            os.waitpid(child, 0)
        os.close(master)
    assert "chat: {uri: ./chat.jsonl, type: dataset.chat}" in (work / "mine.yaml").read_text()
