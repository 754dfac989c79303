"""Paths that cannot be looked at are a user's mistake, whichever command they are given to."""

from __future__ import annotations

import pytest

from llmctl import cli

LONG = "a" * 300
NOBODY = "~nobody-of-this-name/model"
COMMANDS = [
    ["serve", "--model"],
    ["export-onnx", "--model"],
    ["tokenize", "--text"],
    ["generate", "--prompt", "x"],
    ["chat"],
    ["inspect"],
    ["sign"],
    ["verify"],
    ["init", "pretrain", "--data"],
]


@pytest.mark.parametrize("path", [LONG, NOBODY], ids=["long", "nobody"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_path_that_cannot_be_looked_at_is_said_in_a_line(command, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMCTL_STORE", str(tmp_path / "store"))
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, path])
    shown = "".join(capsys.readouterr())
    assert caught.value.code in (2, 5)
    assert "unexpected" not in shown
    assert path.partition("/")[0] in shown.replace("\n", "")
