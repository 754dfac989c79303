"""Commands and specs shown in the pages and in README.md: all of them parse, cheap ones print what is shown."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from llmctl.cli import root
from llmctl.errors import LlmctlError
from llmctl.registry import get_registry
from llmctl.spec.files import shipped
from llmctl.spec.pipeline import load_pipeline, single_stage

from .conftest import BLOCKS, Block

INSTALLED = "with the plugin"
"""The title of sessions in which the plugin of docs/plugins.md is installed."""
CONSOLE = [block for block in BLOCKS if block.language == "console" and block.title != INSTALLED]
SPECS = [block for block in BLOCKS if block.language == "yaml" and "llmctl: 1" in block.text.splitlines()]
GOOD = [block for block in SPECS if not block.title.startswith("broken")]
CHEAP = ("check", "models", "plan", "plugins", "render")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


def commands(block: Block) -> list[tuple[str, str]]:
    """(command line, output shown) of a console block; a line that ends in a backslash goes on."""
    found: list[tuple[str, str]] = []
    for line in block.text.replace("\\\n", "").splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def words(line: str) -> list[list[str]]:
    """The simple commands of a shell line, redirections and assignments left out; comments end the line."""
    lexer = shlex.shlex(re.sub(r"\b[0-9](?=[<>])", "", line), posix=True, punctuation_chars="|;&<>()")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if word in ("|", ";", "&&", "||", "&", "(", ")"):
            found.append([])
        elif set(word) <= {"<", ">", "&"}:
            skip = True
        elif skip:
            skip = False
        elif found[-1] or not ASSIGNMENT.match(word):
            found[-1].append(word.removeprefix("$"))
    return [command for command in found if command]


def llmctl_commands(line: str) -> list[list[str]]:
    """The arguments of every `llmctl` in a line, also of those inside `X=$(llmctl …)`."""
    line = re.sub(r"\b[A-Z_]+=\$\((.*)\)", r"\1", line)
    return [command[1:] for command in words(line) if Path(command[0]).name == "llmctl"]


LINES = [(block, line) for block in CONSOLE for line, _ in commands(block) if llmctl_commands(line)]


def check_command(arguments: list[str]) -> None:
    """Raise unless the command, its options and their values exist; nothing runs."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    context = click.Context(root, info_name="llmctl")
    if name is None:
        root.make_parser(context).parse_args(list(arguments))
        return
    command = root.get_command(context, name)
    assert command is not None, f"no such command: {name}"
    rest = arguments[arguments.index(name) + 1 :]
    own = click.Context(command, info_name=name, parent=context)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        inner = command.get_command(own, rest[0])
        assert inner is not None, f"no such command: {name} {rest[0]}"
        command, own, rest = inner, click.Context(inner, info_name=rest[0], parent=own), rest[1:]
    given, extra, used = command.make_parser(own).parse_args(list(rest))
    assert not extra, f"unexpected arguments: {extra}"
    values = {param.name: given[param.name] for param in used if param.name in given and rest}
    for param in {param.name: param for param in used}.values():
        if isinstance(values.get(param.name), str | tuple | list):
            param.type_cast_value(own, values[param.name])
    if name in ("run", "plan", "check", "render"):
        for spec in [values["spec"]] if isinstance(values.get("spec"), str) else values.get("specs", ()):
            check_shipped(spec, values)


def check_shipped(spec: str, values: dict) -> None:
    """A shipped spec is really shipped, and takes the profiles and values that are given."""
    if spec.endswith(".yaml") and Path(spec).stem not in shipped():
        return  # a file of the reader's own
    name = Path(spec).stem
    assert name in shipped(), f"{name} is not shipped"
    pipeline = load_pipeline(name, values.get("profiles") or (), values.get("sets") or (), registry=get_registry())
    for stage in [*(values.get("to") or ()), *filter(None, [values.get("until")])]:
        assert stage in pipeline.stages, f"{name} has no stage {stage}"


@pytest.mark.parametrize(("block", "line"), LINES, ids=[f"{block.where} {line[:40]}" for block, line in LINES])
def test_every_command_shown_exists_with_its_options(block, line):
    for arguments in llmctl_commands(line):
        check_command(arguments)


@pytest.mark.parametrize(
    "line",
    [
        "llmctl no-such-stage --lr 1",
        "llmctl sft --no-such-option",
        "llmctl tokenize --text a | llmctl sft --no-such-option",
        "llmctl quantize --bits 5",
        "llmctl plugins nwe demo",
        "llmctl plugins new demo --no-such-option",
        "llmctl plugins test --only nothing",
        "llmctl run no-such-spec",
        "llmctl run quickstart --set sft.no_such=1",
        "llmctl run quickstart --profile nosuch",
        "llmctl run quickstart --to nosuch",
        "X=$(llmctl sft --no-such-option)",
    ],
)
def test_mistakes_in_examples_are_noticed(line):
    found = llmctl_commands(line)
    assert found
    with pytest.raises((AssertionError, click.ClickException, LlmctlError)):
        for arguments in found:
            check_command(arguments)


def test_shell_lines_are_taken_apart():
    line = "A=1 llmctl x --y 'a b' 2>err | llmctl z >out.txt  # why"
    assert words(line) == [["llmctl", "x", "--y", "a b"], ["llmctl", "z"]]
    assert llmctl_commands("X=$(llmctl a --b c)") == [["a", "--b", "c"]]


# -- specs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the paths of the examples exist, and the titled specs and tables of the pages."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.md").write_text("# One\n\nText.\n")
    for block in BLOCKS:
        if block.language in ("yaml", "csv") and block.title:
            (tmp_path / block.title).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", GOOD, ids=lambda block: block.where)
def test_every_whole_spec_is_valid(block, directory):
    path = directory / "spec.yaml"
    path.write_text(block.text)
    pipeline = load_pipeline(path, registry=get_registry())
    assert pipeline.stages
    for profile in re.findall(r"^  (\w+):$", block.text.partition("\nprofiles:\n")[2], re.MULTILINE):
        load_pipeline(path, [profile], registry=get_registry())


def test_whole_specs_are_found_and_a_wrong_one_is_noticed(directory):
    assert len(GOOD) >= 2
    assert any(block.text.count("\nuses:") for block in GOOD), "a single stage too"
    path = directory / "spec.yaml"
    path.write_text(GOOD[0].text.replace("uses: ", "uses: no-"))
    with pytest.raises(LlmctlError):
        load_pipeline(path, registry=get_registry())


def test_the_single_stage_example_is_the_file_of_its_stage(directory):
    for block in GOOD:
        if uses := re.search(r"^uses: (.+)$", block.text, re.MULTILINE):
            (directory / "stage.yaml").write_text(block.text)
            stage = get_registry().stages[uses[1]]
            single_stage(stage, file=directory / "stage.yaml", registry=get_registry())


# -- output -----------------------------------------------------------------------------------------------------------


def cheap(line: str) -> bool:
    """Whether a command may run in a test: it looks at specs and declarations only."""
    found = words(line)
    if len(found) != 1 or found[0][0] != "llmctl":
        return False
    arguments = found[0][1:]
    if arguments[0] == "scaling":
        return "isoflop/train" not in arguments and not any("fit.json" in word for word in arguments)
    return arguments[0] in CHEAP or arguments[-1] in ("--help", "--version") or "--print-spec" in arguments


SHOWN = [(block, line, output) for block in CONSOLE for line, output in commands(block) if output and cheap(line)]


def matches(shown: str, printed: str) -> bool:
    """Whether the output is the one shown, in which a line `...` stands for any lines."""
    parts = [re.escape(part) for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)]
    return re.fullmatch("(?:.*\n)*?".join(parts), printed) is not None


def printed(line: str, directory: Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LLMCTL_", "FORCE_COLOR"))}
    assignments = [word for word in shlex.split(line) if ASSIGNMENT.match(word) and "llmctl" not in word][:1]
    env |= dict(word.split("=", 1) for word in assignments if line.startswith(word))
    done = subprocess.run(
        [sys.executable, "-m", "llmctl", *words(line)[0][1:]],
        cwd=directory,
        env={**env, "COLUMNS": "80", "NO_COLOR": "1", "PYTHONPATH": str(directory / "site")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("block", "line", "output"), SHOWN, ids=[f"{block.where} {line[:40]}" for block, line, _ in SHOWN]
)
def test_cheap_commands_print_what_is_shown(block, line, output, directory):
    found = printed(line, directory)
    assert matches(output.rstrip() + "\n", found.rstrip() + "\n"), found


def test_another_output_is_noticed():
    assert SHOWN
    assert matches("a\n...\nd\n", "a\nb\nc\nd\n")
    assert not matches("a\n...\nd\n", "a\nb\nc\ne\n")
    assert not matches("a\n", "a b\n")


# -- the plugin of docs/plugins.md ------------------------------------------------------------------------------------


def new_plugin(directory: Path) -> Path:
    """The project that the page begins with, installed by pip into `directory/site`, without the network."""
    printed("llmctl plugins new demo", directory)
    project = directory / "llmctl-demo"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--target", directory / "site", project], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return project


def test_the_plugin_of_the_page_is_installed_by_pip_and_runs_like_a_built_in_stage(directory):
    new_plugin(directory)
    assert "demo" in printed("llmctl --help", directory)
    rows = json.loads(printed("llmctl plugins --format json", directory))["plugins"]
    (ours,) = [row for row in rows if row["distribution"] == "llmctl-demo"]
    assert (ours["stages"], ours["failure"]) == (["demo"], None)
    (directory / "text.jsonl").write_text('{"text": "some words again"}\n{"text": "few"}\n')
    assert "demo: done" in printed("llmctl demo --text text.jsonl -o out", directory)
    assert read_text(directory / "out") == "some words again"
    assert "demo: cached" in printed("llmctl demo --text text.jsonl -o out", directory)
    shutil.rmtree(directory / "site" / "llmctl_demo")  # the control: broken, it is named and hurts nobody
    shown = " ".join(printed("llmctl --help", directory).split())
    assert "Unavailable: demo the plugin `llmctl_demo` of llmctl-demo 0.1.0 is broken" in shown


def test_the_files_shown_are_those_of_the_project(directory):
    printed("llmctl plugins new demo", directory)
    shown = [block for block in BLOCKS if block.page == "plugins.md" and block.title.startswith("llmctl_demo/")]
    assert len(shown) == 3
    for block in shown:
        text = (directory / "llmctl-demo" / block.title).read_text()
        assert block.text in text, block.where
        assert block.text.replace("demo", "dmeo") not in text or "demo" not in block.text, "the control"


@pytest.mark.slow
def test_the_sessions_with_the_plugin_print_what_is_shown(directory):
    project = new_plugin(directory)
    sessions = [block for block in BLOCKS if block.title == INSTALLED]
    lines = [(line, output) for block in sessions for line, output in commands(block)]
    assert len(lines) == 3
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LLMCTL_", "FORCE_COLOR"))}
    env |= {"COLUMNS": "80", "NO_COLOR": "1", "PYTHONPATH": str(directory / "site")}
    for line, output in lines:
        shell = f'llmctl() {{ "{sys.executable}" -m llmctl "$@"; }}\n{line}'
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", shell],
            cwd=project,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        found = re.sub(r"sha256:[0-9a-f]{64}", "sha256:...", done.stdout)
        found = re.sub(r"killed \d times", "killed ...", found)
        counts = r"\d+ plugins, \d+ stages"  # as many as are installed
        shown, found = (re.sub(counts, "N plugins, N stages", text.rstrip() + "\n") for text in (output, found))
        assert matches(shown, found), found


def read_text(directory: Path) -> str:
    from llmctl.text.datasets import read_rows

    return " ".join(row["text"] for row in read_rows(directory, "train"))
