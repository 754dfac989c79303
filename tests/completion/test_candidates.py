"""What is offered where, asked through the protocol of the scripts; what it costs; what goes wrong quietly."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys

import click
import pytest

from llmctl.command_table import CORE
from llmctl.completion import candidates, commands
from llmctl.completion.protocol import answer, split
from llmctl.errors import InputError, UsageError
from llmctl.spec.diagnostics import SpecError

MATRIX = """
llmctl: 1
name: small
vars: {seed: 1}
stages:
  data: {uses: data, with: {reader: python-stdlib}}
  tokenize: {uses: tokenize, inputs: {text: data}}
"""

READERS = ("auto", "python-stdlib", "toy-translation", "toy-summary", "toy-sentiment")


@pytest.fixture
def offered(llmctl):
    """The candidates for a line, as fish would get them."""

    def ask(line, **env):
        done = llmctl(env={"_LLMCTL_COMPLETE": "fish_complete", "_LLMCTL_LINE": line, **env})
        assert (done.returncode, done.stderr) == (0, "")
        rows = [row.split("\t") for row in done.stdout.splitlines()]
        return [row[1] if row[0] == "plain" else f"<{row[0]}>" for row in rows]

    return ask


def test_names_of_commands_and_stages(offered):
    every = offered("llmctl ")
    assert every[0] == CORE[0].name and {"init", "doctor", "sft", "chat"} <= set(every)
    assert "stage" not in every, "an internal command"
    assert offered("llmctl --v") == ["--version"]


PLUGIN = {
    "acme/__init__.py": """
        from llmctl import Command, In, Out, Stage, hookimpl

        @hookimpl
        def register_stages():
            return [Stage(name="acme-stage", help="A stage.", inputs={"text": In("dataset.text")},
                          outputs={"metrics": Out("metrics")}, params="acme.params:P", run="acme.run:run")]

        @hookimpl
        def register_commands():
            return [Command(name="acme-cmd", help="A command.", target="acme.cmd:cmd")]
    """,
    "acme/params.py": """
        print("a print at import")
        from typing import Literal
        from llmctl import Field, Params

        class P(Params):
            colour: Literal["red", "blue"] = Field("red", description="which")
    """,
    "acme/cmd.py": """
        import click

        @click.command()
        @click.argument("spec")
        @click.option("--loud", is_flag=True)
        def cmd(spec, loud):
            pass
    """,
    "acme/run.py": "",
}


def test_stages_and_commands_of_plugins(offered, install):
    install("acme", {"acme": "acme"}, PLUGIN)
    assert offered("llmctl acme") == ["acme-stage", "acme-cmd"]
    assert offered("llmctl acme-stage --col") == ["--colour"]
    assert offered("llmctl acme-stage --colour b") == ["blue"]
    assert offered("llmctl acme-stage --set colour=") == ["colour=red", "colour=blue"]
    assert offered("llmctl acme-cmd --l") == ["--loud"]
    assert offered("llmctl acme-cmd qui") == [], "what a third party's `spec` is, we do not know"


def test_a_broken_plugin_hurts_nobody(offered, install):
    install("acme", {"acme": "acme"}, {"acme/__init__.py": "raise SystemExit('boom')"})
    assert "sft" in offered("llmctl s")
    assert offered("llmctl acme ") == []


def test_a_plugin_whose_params_fail_offers_nothing(offered, install):
    install("acme", {"acme": "acme"}, {**PLUGIN, "acme/params.py": "import sys; sys.exit('boom')"})
    assert offered("llmctl acme-stage --") == []


@pytest.fixture
def stored(llmctl, tmp_path):
    refs = tmp_path / "work/.llmctl/store/refs/quick"
    refs.mkdir(parents=True)
    for name, kind in (("train.model", "model.hf"), ("int8.model", "model.onnx"), ("train.model@best", "model.hf")):
        (refs / f"{name}.json").write_text(json.dumps({"id": "sha256:" + "ab" * 32, "type": kind}))
    (tmp_path / "work/.llmctl/store/artifacts/sha256/ab" / ("ab" * 32)).mkdir(parents=True)


@pytest.mark.parametrize("command", ["show", "get", "lineage", "chat"])
def test_artifacts_of_the_store(offered, stored, command):
    assert set(offered(f"llmctl {command} q")) == {"quick/train.model", "quick/int8.model", "quick/train.model@best"}
    assert offered(f"llmctl {command} sha256:a") == ["sha256:" + "ab" * 32]
    assert offered(f"llmctl {command} ./") == ["<file>"]


def test_ports_take_artifacts_of_their_types(offered, stored):
    assert offered("llmctl quantize --model q") == ["quick/int8.model"]
    assert set(offered("llmctl serve --model q")) == {"quick/train.model", "quick/int8.model", "quick/train.model@best"}
    assert offered("llmctl quantize --input model=q") == ["model=quick/int8.model"]
    assert offered("llmctl quantize -i ") == ["<nospace>", "model=", "data="]
    assert offered("llmctl sft --data q") == ["<file>"]


def test_values_for_set(offered, tmp_path):
    (tmp_path / "work/small.yaml").write_text(MATRIX)
    ask = "llmctl plan small.yaml --set "
    assert offered(ask) == ["<nospace>", "data.", "tokenize.", "vars."]
    assert offered(ask + "vars.") == ["<nospace>", "vars.seed="]
    assert offered(ask + "data.questions.fa") == ["<nospace>", "data.questions.facts="]
    assert offered(ask + "data.reader=") == [f"data.reader={name}" for name in READERS]
    assert offered(ask + "data.no_such=") == []


def test_values_for_the_other_forms_of_set(asked, tmp_path):
    (tmp_path / "small.yaml").write_text(MATRIX)
    (tmp_path / "notes.txt").write_text("")
    ask = "llmctl plan small.yaml --set-json "
    assert asked(ask + "data.reader=") == [f'data.reader="{name}"' for name in READERS]
    assert asked(ask + "'data.reader=\"py") == ['data.reader="python-stdlib"']
    assert asked("llmctl data --set-json reader=a") == ['reader="auto"']
    assert asked("llmctl data --set-json questions.ty") == asked("llmctl data --set questions.ty")
    ask = "llmctl plan small.yaml --set-file "
    assert asked(ask + "data.rea") == ["<nospace>", "data.reader="]
    assert asked(ask + "data.reader=no") == ["data.reader=notes.txt"]
    assert asked("llmctl data --set-file reader=no") == ["reader=notes.txt"]
    (tmp_path / "open.yaml").write_text(
        MATRIX.replace("{seed: 1}", "{x: 3}").replace("{text: data}", '"${{ vars.x }}"')
    )
    assert asked('llmctl plan open.yaml --set-json \'vars.x={"text": "data"}\' --to d') == ["data"]
    with pytest.raises(SpecError):
        asked("llmctl plan open.yaml --to d")


# -- every command ----------------------------------------------------------------------------------------------------


def every_command():
    """(the words, the command) of all, those of groups too; their parameters have their candidates."""
    from llmctl.cli import root
    from llmctl.completion.protocol import Offering

    def below(group, words):
        context = click.Context(group)
        for name in root.list_commands(context) if group is offering else group.list_commands(context):
            command = group.get_command(context, name)
            yield f"{words}{name}", command
            if isinstance(command, click.Group):
                yield from below(command, f"{words}{name} ")

    offering = Offering(root)
    return list(below(offering, ""))


def test_every_name_in_the_table_is_that_of_a_parameter():
    found = [(command.name, param.name) for _, command in every_command() for param in command.params]
    known = {name for _, name in found} | {f"{command} {name}" for command, name in found}
    assert set(candidates.BY_NAME) <= known
    assert "from_stages" not in known, "the control"


def test_every_parameter_that_is_a_spec_a_stage_or_an_artifact_has_candidates():
    lacking = []
    for words, command in every_command():
        for param in command.get_params(click.Context(command)):
            called = f"{param.name} {param.metavar or ''}".lower()
            if re.search(r"spec(?!_|ial|ulation)|stage|artifact|\bref\b|port=", called) and "print" not in called:
                lacking += [] if param._custom_shell_complete else [(words, param.name)]
    assert lacking == []


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The candidates for a line as fish would get them, without a process."""
    from llmctl.cli import root

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMCTL_STORE", str(tmp_path / ".llmctl/store"))

    def ask(line):
        rows = [row.split("\t") for row in answer(root, "fish", line)]
        return [row[1] if row[0] == "plain" else f"<{row[0]}>" for row in rows]

    return ask


def test_commands_complete_what_they_take(asked, tmp_path):
    (tmp_path / "small.yaml").write_text(MATRIX)
    refs = tmp_path / ".llmctl/store/refs/quick"
    refs.mkdir(parents=True)
    (refs / "train.model.json").write_text(json.dumps({"id": "sha256:" + "ab" * 32, "type": "model.hf"}))
    for command in ("run", "plan", "check", "render", "lock", "doctor", "why", "push --spec", "store check --spec"):
        assert asked(f"llmctl {command} sm") == ["small.yaml"], command
    for command in ("show", "get", "lineage", "verify", "sign", "push", "pull", "tag", "tag --delete", "why"):
        assert asked(f"llmctl {command} qui")[-1] == "quick/train.model", command
    for words in ("run small.yaml --to", "run small.yaml --until", "plan small.yaml --from", "why small.yaml"):
        assert asked(f"llmctl {words} ") == ["data", "tokenize"], words
    assert asked("llmctl run small.yaml --from=t") == ["--from=tokenize"]
    assert asked("llmctl why small.yaml data --set data.rea") == ["<nospace>", "data.reader="]
    assert asked("llmctl why quick/train.model q") == ["quick/train.model"]
    assert asked("llmctl schema stage tok") == asked("llmctl plugins test --stage tok") == ["tokenize"]
    assert asked("llmctl schema pipeline tok") == []
    assert asked("llmctl plugins ne") == ["new"] and asked("llmctl plugins new --fo") == ["--force"]


def test_instances_of_a_matrix(monkeypatch):
    """As the loader will give them: the base, and each row."""
    from types import SimpleNamespace

    stage = SimpleNamespace(name="sft")
    rows = [SimpleNamespace(id=f"sft[lr={lr}]", base="sft", stage=stage) for lr in ("1e-5", "3e-5")]
    monkeypatch.setattr(candidates, "_pipeline", lambda ctx: SimpleNamespace(stages={row.id: row for row in rows}))
    found = [item.value for item in candidates.stages(None, None, "sft")]
    assert found == ["sft", "sft[lr=1e-5]", "sft[lr=3e-5]"]


def test_bash_gets_the_end_of_an_instance_id():
    from click.shell_completion import CompletionItem

    from llmctl.completion.protocol import _for_bash

    item = CompletionItem("sft[lr=3e-5,seed=1]")
    assert list(_for_bash([item], "sft[lr=3", "3", "")) == [r"3e-5\,seed=1\]".replace(r"\,", ",")]
    assert list(_for_bash([item], "sft", "sft", "")) == [r"sft\[lr=3e-5,seed=1\]"]
    assert list(_for_bash([item], "sft[lr=", "", "")) == [r"3e-5,seed=1\]"]


def test_lines_are_split_as_a_shell_does():
    assert split("llmctl run ") == (["llmctl", "run"], "", "")
    assert split("llmctl run a\\ ") == (["llmctl", "run"], "a ", "")
    assert split("llmctl 'a b") == (["llmctl"], "a b", "'")
    assert split('llmctl "a b" c') == (["llmctl", "a b"], "c", "")
    assert split("") == ([], "", "")


def test_the_variable_that_click_documents_prints_our_script(llmctl):
    assert llmctl(env={"_LLMCTL_COMPLETE": "zsh_source"}).stdout == llmctl("completion", "zsh").stdout


def test_debugging_shows_what_is_hidden_otherwise(llmctl):
    line = {"_LLMCTL_COMPLETE": "fish_complete", "_LLMCTL_LINE": "llmctl run no-such.yaml --to "}
    assert "no such file" in llmctl(env={**line, "LLMCTL_DEBUG": "1"}).stderr


# -- cost -------------------------------------------------------------------------------------------------------------


def cpu(env):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "llmctl"], env=env, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.budget
def test_a_command_name_costs_under_150_ms_of_cpu(llmctl_env, budget):
    env = {**llmctl_env, "_LLMCTL_COMPLETE": "bash_complete", "_LLMCTL_LINE": "llmctl ru"}
    cpu(env)  # writes the byte code
    assert min(cpu(env) for _ in range(5)) < budget(0.150)


HEAVY = ("pydantic", "yaml", "rich", "numpy", "torch", "llmctl.pipeline", "llmctl.store")


@pytest.mark.parametrize(("line", "heavy"), [("llmctl ru", False), ("llmctl ", False), ("llmctl sft --l", True)])
def test_a_command_name_imports_nothing_heavy(llmctl_env, line, heavy):
    code = (
        "import sys, io, contextlib\nfrom llmctl.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n  try: main([])\n  except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    env = {**llmctl_env, "_LLMCTL_COMPLETE": "bash_complete", "_LLMCTL_LINE": line}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert (done.stdout.strip() != "[]") == heavy  # the options of a stage need pydantic: the control


# -- llmctl completion ------------------------------------------------------------------------------------------------


def test_a_shell_must_be_named(llmctl):
    done = llmctl("completion")
    assert done.returncode == 2 and "which shell?" in done.stderr
    assert llmctl("completion", "tcsh").returncode == 2


def test_install_is_idempotent_and_leaves_foreign_files_alone(tmp_path):
    path = tmp_path / "deep/llmctl"
    assert commands.write("bash", path) == f"wrote {path}"
    assert commands.write("bash", path) == f"{path} is up to date"
    path.write_text(path.read_text() + "# an older one\n")
    assert commands.write("bash", path) == f"updated {path}"
    path.write_text("something else")
    with pytest.raises(InputError, match="not made by llmctl"):
        commands.write("bash", path)
    assert path.read_text() == "something else"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no text"):
        commands.write("bash", path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        commands.write("bash", tmp_path / "file/llmctl")


def test_places_follow_the_variables_of_the_shells(tmp_path):
    home = {"HOME": str(tmp_path)}
    assert commands.place("bash", home).path == tmp_path / ".local/share/bash-completion/completions/llmctl"
    own = {**home, "BASH_COMPLETION_USER_DIR": "/b"}
    assert str(commands.place("bash", own).path) == "/b/completions/llmctl"
    assert str(commands.place("fish", {**home, "XDG_CONFIG_HOME": "/c"}).path) == "/c/fish/completions/llmctl.fish"
    assert str(commands.place("zsh", {**home, "XDG_DATA_HOME": "/d"}).path) == "/d/zsh/site-functions/_llmctl"
    assert "~/.bashrc" in commands._for_bash(tmp_path, tmp_path / "absent")[0]
    assert "new shells have it" in commands._for_bash(tmp_path, tmp_path)[0]


def test_the_shell_is_the_parent_else_the_login_shell(monkeypatch):
    monkeypatch.setattr(commands.os, "getppid", lambda: 0)  # /proc/0 does not exist
    monkeypatch.setenv("SHELL", "/usr/bin/zsh")
    assert commands.running_shell() == "zsh"
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    with pytest.raises(UsageError, match="which shell"):
        commands.running_shell()
