"""How errors are told to programs, whatever else is wrong with the command line."""

from __future__ import annotations

import json

import pytest

from llmctl.error_output import json_lines, typed, wants_json
from llmctl.errors import InputError


@pytest.mark.parametrize(
    ("args", "variable", "found"),
    [
        ([], "", ""),
        (["--log-format", "json"], "", "json"),
        (["--log-format=json", "--no-such-option"], "", "json"),
        ([], "json", "json"),
        (["--log-format", "text"], "json", "text"),
        (["--log-format", "json", "--log-format", "text"], "", "text"),
        (["--log-format"], "", ""),
        (["--log-format", "json", "--log-format=text"], "", "text"),
        (["--log-format=text", "--log-format", "json"], "", "json"),
        (["--log-format=json", "--log-format", "text"], "", "text"),
    ],
)
def test_the_format_is_known_before_the_command_line_is_understood(args, variable, found, monkeypatch):
    monkeypatch.setenv("LLMCTL_LOG_FORMAT", variable)
    assert typed(["run", *args], "--log-format", "LLMCTL_LOG_FORMAT") == found


def test_either_option_asks_for_json(monkeypatch):
    for name in ("LLMCTL_LOG_FORMAT", "LLMCTL_ERROR_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    assert wants_json(["check", "--error-format=json"]) and wants_json(["run", "--log-format", "json"])
    assert not wants_json(["run", "--error-format", "text"])


@pytest.mark.parametrize(
    ("config", "args", "found"),
    [
        ("log_format: json\n", [], True),
        ("log_format: json\n", ["--log-format", "text"], False),
        ("log_format: text\n", [], False),
        ("log_format: [broken\n", [], False),
        ("log_format: json\nunknown: 1\n", [], False),
    ],
)
def test_the_users_configuration_counts_for_errors_too(config, args, found, monkeypatch, tmp_path):
    for name in ("LLMCTL_LOG_FORMAT", "LLMCTL_ERROR_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(config)
    monkeypatch.setenv("LLMCTL_CONFIG", str(path))
    assert wants_json(["run", *args]) == found


def test_an_error_without_a_place_has_the_same_fields():
    (line,) = json_lines(InputError("no such file", hint="look"))
    assert json.loads(line) == {
        "type": "error", "code": None, "message": "no such file", "file": None, "line": None, "column": None,
        "end_column": None, "hint": "look", "exit_code": 5,
    }  # fmt: skip


def test_mistakes_of_the_command_line_and_of_specs_are_told_alike(llmctl, tmp_path):
    wrong = llmctl("chekc", "--error-format", "json")
    assert (wrong.returncode, json.loads(wrong.stderr)["hint"]) == (2, "did you mean `check`?")
    (tmp_path / "work" / "s.yaml").write_text(
        "llmctl: 1\nname: s\nstages: {a: {uses: dta}, b: {uses: data, with: {x: 1}}}\n"
    )
    for command in ("check", "run", "plan", "render"):
        lines = [json.loads(line) for line in llmctl(command, "s.yaml", "--error-format", "json").stderr.splitlines()]
        assert [(row["code"], row["line"], row["exit_code"]) for row in lines] == [("E110", 3, 2), ("E101", 3, 2)], (
            command
        )
    assert "error[E110]" in llmctl("run", "s.yaml").stderr
