"""Completion in real shells: each one sources our script and completes as it does for a person."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SPEC = """
llmctl: 1
name: small
vars: {seed: 1}
sources: {corpus: ./texts}
stages:
  read-it:
    uses: data
    inputs: {files: sources.corpus}
  learn:
    uses: tokenize
    inputs: {text: read-it}
profiles:
  smoke: {stages: {learn: {with: {vocab_size: 300}}}}
"""


def needs(shell):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@pytest.fixture
def env(llmctl_env, tmp_path):
    """`llmctl` on the PATH, as a program of its own; an empty home."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "llmctl"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m llmctl "$@"\n')
    program.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    return {**llmctl_env, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(home), "TERM": "xterm"}


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(SPEC)
    (folder / "two words.yaml").write_text(SPEC)
    (folder / "broken.yaml").write_text("llmctl: 1\nstages: [")
    (folder / "notes.txt").write_text("")
    return folder


def run(command, env, work, text=None):
    return subprocess.run(command, env=env, cwd=work, input=text, capture_output=True, text=True, timeout=60)


# -- bash -------------------------------------------------------------------------------------------------------------

BASH = """
set -eu
source <(llmctl completion bash)
compopt() { printf 'option %s\\n' "$2"; }
COMP_LINE=$1 COMP_POINT=${#1}
_llmctl_completion llmctl "$2" "" || exit
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def bash(env, work):
    """What the function of the script leaves in COMPREPLY for a line and the word that bash means to replace."""

    def complete(line, word=None):
        word = re.split(r"[\s=:@]", line)[-1] if word is None else word
        done = run(["bash", "--norc", "-c", BASH, "bash", line, word], env, work)
        assert (done.returncode, done.stderr) == (0, "")
        return [reply for reply in done.stdout.splitlines() if reply]

    return complete


@needs("bash")
def test_bash_completes_commands_stages_options_and_values(bash):
    assert bash("llmctl ru") == ["run"]
    assert bash("llmctl token") == ["tokenize", "tokenizers"]
    assert bash("llmctl tokenize --vocab") == ["--vocab-size"]
    assert bash("llmctl quantize --bits ") == ["0", "4", "8", "16"]
    assert bash("llmctl check quickst") == ["quickstart"]
    assert bash("llmctl completion f") == ["fish"]


@needs("bash")
def test_bash_completes_what_the_spec_holds(bash):
    assert bash("llmctl run small.yaml --to ") == ["read-it", "learn"]
    assert bash("llmctl run small.yaml --profile ") == ["smoke"]
    assert bash("llmctl run small.yaml --set learn.vo") == ["option nospace", "learn.vocab_size="]
    assert bash("llmctl run small.yaml --set learn.emit=to") == ["tokenizer", "tokens"], "bash replaces what follows ="
    assert bash("llmctl run small.yaml --set=learn.emit=to") == ["tokenizer", "tokens"]
    assert bash("llmctl run sma") == ["small.yaml"]


@needs("bash")
def test_bash_quotes_what_needs_it(bash):
    assert bash("llmctl run two") == [r"two\ words.yaml"]
    assert bash("llmctl run two\\ w", "two\\ w") == [r"two\ words.yaml"]
    assert bash("llmctl run 'two w", "two w") == ["two words.yaml"], "inside a quote that is open"
    assert bash("llmctl run 'two words.yaml' --until l") == ["learn"]


@needs("bash")
def test_a_broken_spec_offers_nothing_and_prints_nothing(bash):
    for line in ("--to ", "--profile ", "--set le", "--until l"):
        assert bash(f"llmctl run broken.yaml {line}") == []
        assert bash(f"llmctl run no-such.yaml {line}") == []


ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])")


class Terminal:
    """An interactive shell on a pseudo-terminal."""

    def __init__(self, command, env, work):
        self.child, self.master = pty.fork()
        if not self.child:
            os.chdir(work)
            os.execvpe(command[0], command, env)
        self.seen = ""

    def type(self, text, until, seconds=30):
        """Type, and read until the pattern shows up; returns all that was seen since."""
        self.seen = ""
        os.write(self.master, text.encode())
        end = time.monotonic() + seconds
        while not re.search(until, self.seen):
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {until!r} in {self.seen!r}"
            self.seen = ESCAPES.sub("", self.seen + os.read(self.master, 4096).decode(errors="replace"))
        return self.seen

    def close(self):
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        os.close(self.master)


@pytest.fixture
def terminal(env, work):
    opened = []

    def start(*command):
        opened.append(Terminal(command, env, work))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@needs("bash")
def test_bash_on_a_terminal_completes_after_an_equals_sign(terminal):
    shell = terminal("bash", "--norc", "--noprofile", "-i")
    shell.type("PS1='rea''dy> '; source <(llmctl completion bash)\n", r"ready> ")
    shell.type("llmctl plu\t", r"llmctl plugins ")
    shell.type("\x15llmctl run small.yaml --set learn.emit=tokeni\t", r"learn\.emit=tokenizer ")
    shell.type("\x15llmctl run two\t", r"two\\ words\.yaml ")
    shell.type("\x15llmctl run 'two w\t", r"'two words\.yaml' ")


# -- zsh --------------------------------------------------------------------------------------------------------------


@needs("zsh")
def test_zsh_on_a_terminal(terminal):
    shell = terminal("zsh", "-f", "-i")
    shell.type("PS1='rea''dy> '; autoload -Uz compinit; compinit -u -D; source <(llmctl completion zsh)\n", r"ready> ")
    shell.type("llmctl plu\t", r"llmctl plu.*gins ")
    shell.type("\x15llmctl run small.yaml --set learn.emit=tokeni\t", r"tokeni.*zer")
    shell.type("\x15llmctl run two\t", r"two.*\\ words\.yaml")
    listed = shell.type("\x15llmctl ru\t \x15llmctl quantize --bits \t", r"4\s+8")
    assert "rror" not in listed


# -- fish -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fish(env, work):
    def complete(line):
        code = f"llmctl completion fish | source; complete -C {shlex.quote(line)}"
        done = run(["fish", "--no-config", "-c", code], env, work)
        assert (done.returncode, done.stderr) == (0, ""), line
        return [row.partition("\t")[0] for row in done.stdout.splitlines()]

    return complete


@needs("fish")
def test_fish(fish):
    assert fish("llmctl ru") == ["run"]
    assert fish("llmctl run small.yaml --to ") == ["read-it", "learn"]
    assert fish("llmctl run small.yaml --set learn.emit=t") == ["learn.emit=tokenizer", "learn.emit=tokens"]
    assert fish("llmctl ls --format=j") == ["--format=json"]
    assert "two words.yaml" in fish("llmctl check t")
    assert "notes.txt" not in fish("llmctl check ")
    assert fish("llmctl run broken.yaml --to ") == []
    assert fish("llmctl data | llmctl toke") == ["tokenize", "tokenizers"], "only the command that the cursor is in"
    assert "notes.txt" in fish("llmctl tokenize --text "), "no artifact fits, so files"


# -- installed --------------------------------------------------------------------------------------------------------


@needs("fish")
def test_fish_finds_the_installed_script_by_itself(env, work):
    first = run(["llmctl", "completion", "--install", "fish"], env, work)
    assert first.returncode == 0 and first.stdout.startswith(
        f"wrote {env['HOME']}/.config/fish/completions/llmctl.fish"
    )
    done = run(["fish", "-c", "complete -C 'llmctl ru'"], env, work)
    assert done.stdout.startswith("run\t"), done.stderr


@needs("zsh")
def test_zsh_finds_the_installed_script_with_the_printed_line(env, work, terminal):
    done = run(["llmctl", "completion", "--install", "zsh"], env, work)
    (line,) = [line.strip() for line in done.stdout.splitlines() if "fpath=" in line]
    (Path(env["HOME"]) / ".zshrc").write_text(f"PS1='rea''dy> '\n{line}\n")
    shell = terminal("zsh", "-i")
    shell.type("", r"ready> ")
    shell.type("llmctl plu\t", r"llmctl plu.*gins ")
    again = run(["llmctl", "completion", "--install", "zsh"], env, work)
    assert "is up to date" in again.stdout and "names that directory" in again.stdout


@needs("bash")
def test_bash_runs_the_printed_line(env, work):
    done = run(["llmctl", "completion", "--install", "bash"], env, work)
    (line,) = [line[line.index("source") :] for line in done.stdout.splitlines() if "source " in line]
    shown = run(["bash", "--norc", "-c", f"{line}; complete -p llmctl"], env, work)
    assert "_llmctl_completion llmctl" in shown.stdout


LOADER = Path("/usr/share/bash-completion/bash_completion")


@needs("bash")
@pytest.mark.skipif(not LOADER.exists(), reason="the package bash-completion is not installed")
def test_bash_completion_finds_the_installed_script_by_itself(env, work, terminal):
    done = run(["llmctl", "completion", "--install", "bash"], env, work)
    assert "new shells have it" in done.stdout
    shell = terminal("bash", "--norc", "--noprofile", "-i")
    shell.type(f"PS1='rea''dy> '; source {LOADER}\n", r"ready> ")
    shell.type("llmctl plu\t", r"llmctl plugins ")
