"""Every way a command can end: a line, a hint and an exit code; never a traceback on the terminal."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PLUGIN = {
    "ways_plugin.py": """
        from llmctl import Command, hookimpl

        @hookimpl
        def register_commands():
            return [Command(name="end", help="Ends in a chosen way.", target="ways_impl:end")]
    """,
    "ways_impl.py": """
        import errno, os, sys, time
        import click
        from llmctl import InputError, LlmctlError, MachineError, StageError, TempFail, UsageError
        from llmctl.errors import BusyError, GateError

        ERRORS = {kind.__name__: kind for kind in
                  (UsageError, StageError, GateError, InputError, BusyError, MachineError, TempFail)}

        @click.command()
        @click.argument("how")
        def end(how):
            if how in ERRORS:
                raise ERRORS[how]("it is so", hint="do that", code="E7" if how == "GateError" else None)
            match how:
                case "says-error": raise InputError("errors.jsonl holds no rows")
                case "returns": return 4
                case "exits": sys.exit(6)
                case "leaves": click.get_current_context().exit(75)
                case "full": raise OSError(errno.ENOSPC, "No space left on device", "/data/x")
                case "bug": raise ValueError("a bug\\nof two lines")
                case "oserror": raise PermissionError(errno.EACCES, "Permission denied", "/root/x")
                case "abort": raise click.Abort
                case "click": raise click.ClickException("Said by click.")
                case "file": raise click.FileError("x.yaml", "no such file")
                case "floods":
                    while True: click.echo("x" * 1000)
                case "sleeps":
                    print("ready", flush=True)
                    time.sleep(30)
    """,
}


@pytest.fixture
def ends(install, llmctl):
    install("ways", {"ways": "ways_plugin"}, PLUGIN)
    return lambda how, **kw: llmctl("end", how, **kw)


@pytest.mark.parametrize(
    ("how", "code", "stderr"),
    [
        ("UsageError", 2, "error: it is so\n  hint: do that\n"),
        ("StageError", 3, "error: it is so\n  hint: do that\n"),
        ("GateError", 4, "error[E7]: it is so\n  hint: do that\n"),
        ("InputError", 5, "error: it is so\n  hint: do that\n"),
        ("BusyError", 6, "error: it is so\n  hint: do that\n"),
        ("MachineError", 7, "error: it is so\n  hint: do that\n"),
        ("TempFail", 75, "error: it is so\n  hint: do that\n"),
        ("says-error", 5, "error: errors.jsonl holds no rows\n"),
        ("returns", 4, ""),
        ("exits", 6, ""),
        ("leaves", 75, ""),
        (
            "full",
            3,
            "error: no space left on the device while writing /data/x\n"
            "  hint: free some space, or put the store on another disk\n",
        ),
        ("abort", 130, "interrupted\n"),
        ("click", 2, "error: said by click\n  hint: see `llmctl end --help`\n"),
        ("file", 5, "error: cannot open x.yaml: no such file\n"),
    ],
)
def test_ways_to_end(how, code, stderr, ends):
    done = ends(how)
    assert (done.returncode, done.stderr) == (code, stderr)


@pytest.mark.parametrize(
    ("how", "first"), [("bug", "ValueError: a bug of two lines"), ("oserror", "PermissionError: ")]
)
def test_a_bug_leaves_its_traceback_in_a_file(how, first, ends, tmp_path):
    done = ends(how, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: unexpected {first}")
    assert len(done.stderr.splitlines()) == 2
    assert "Traceback" not in done.stderr
    file = Path(re.search(r"the traceback is in (\S+)", done.stderr)[1])
    assert "Traceback (most recent call last)" in file.read_text()
    assert "ways_impl.py" in file.read_text()


def test_debug_shows_the_traceback(ends):
    done = ends("bug", env={"LLMCTL_DEBUG": "1"})
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "Traceback" in ends("StageError", env={"LLMCTL_DEBUG": "1"}).stderr


def test_a_traceback_that_cannot_be_saved_is_shown(monkeypatch, capsys):
    from llmctl import cli

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    monkeypatch.delenv("LLMCTL_DEBUG", raising=False)
    assert cli._save_traceback(ValueError("a bug")) == 1
    assert "ValueError: a bug" in capsys.readouterr().err


def test_ctrl_c(install, llmctl_env, tmp_path):
    install("ways", {"ways": "ways_plugin"}, PLUGIN)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmctl", "end", "sleeps"],
        env=llmctl_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in stderr


@pytest.mark.parametrize("moment", ["while it starts", "while it leaves"])
def test_ctrl_c_at_other_times(site, llmctl_env, tmp_path, moment):
    """While `click`, which all commands need, is imported; a second one when the first has been answered."""
    press = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(0.01)"
    again = f"import atexit\natexit.register(lambda: exec({press!r}))\n"
    (site / "click.py").write_text((again if moment == "while it leaves" else "") + press)
    command = [sys.executable, "-m", "llmctl", "--help"]
    done = subprocess.run(command, env=llmctl_env, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_with_nowhere_to_say_it(site, llmctl_env, tmp_path):
    (site / "click.py").write_text("raise KeyboardInterrupt")
    script = f'{sys.executable} -m llmctl --help 2>&-; echo "$?"'
    done = subprocess.run(["bash", "-c", script], env=llmctl_env, capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("130\n", "")


def test_a_reader_that_leaves(install, llmctl_env, tmp_path):
    install("ways", {"ways": "ways_plugin"}, PLUGIN)
    script = f'{sys.executable} -m llmctl end floods | head -1 >/dev/null; echo "${{PIPESTATUS[@]}}"'
    done = subprocess.run(["bash", "-c", script], env=llmctl_env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "141 0\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("args", "stderr"),
    [
        (["trian"], "error: no such command `trian`\n  hint: did you mean `train-pretrain`?\n"),
        (["rn"], "error: no such command `rn`\n  hint: did you mean `run`?\n"),
        (["xyzzy"], "error: no such command `xyzzy`\n  hint: see `llmctl --help`\n"),
        (["--verson"], "error: no such option `--verson`\n  hint: did you mean `--version`?\n"),
        (["plugins", "--frmat", "json"], "error: no such option `--frmat`\n  hint: did you mean `--format`?\n"),
        (
            ["plugins", "--format", "xml"],
            "error: invalid value for '--format': 'xml' is not one of 'text', 'json'\n"
            "  hint: see `llmctl plugins --help`\n",
        ),
        (["lineage", "x", "y"], "error: got unexpected extra argument (y)\n  hint: see `llmctl lineage --help`\n"),
        (["plugins", "nwe"], "error: no such command `nwe`\n  hint: did you mean `new`?\n"),
    ],
)
def test_wrong_command_lines(args, stderr, llmctl):
    done = llmctl(*args)
    assert (done.returncode, done.stderr) == (2, stderr)
    # stdout is a pipe here: a mistyped stage tells the next stage that it failed, a mistyped option of ours does not.
    record = f'{{"llmctl":"end","v":1,"stage":"{args[0]}","code":2}}\n'
    assert done.stdout == (record if f"no such command `{args[0]}`" in stderr else "")


def test_plugins_lists_distribution_version_stages_and_hooks(llmctl):
    import json

    done = llmctl("plugins")
    assert done.returncode == 0
    assert re.search(r"^sft +llmctl +0\.1\.0 +sft +- +register_stages +ok$", done.stdout, re.M)
    rows = json.loads(llmctl("plugins", "--format", "json").stdout)["plugins"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["sft"] == {
        "name": "sft", "distribution": "llmctl", "version": "0.1.0", "stages": ["sft"], "commands": [],
        "hooks": ["register_stages"], "disabled": False, "failure": None,
    }  # fmt: skip


def test_the_module_and_the_script_are_the_same(llmctl, llmctl_env):
    script = Path(sys.executable).with_name("llmctl")
    if not script.exists():
        pytest.skip("llmctl is not installed in this environment")
    done = subprocess.run([script, "--version"], env=llmctl_env, capture_output=True, text=True)
    assert done.stdout == llmctl("--version").stdout


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_the_label_of_an_error_on_a_terminal(llmctl_env, variables, coloured):
    reader, writer = os.openpty()
    command = [sys.executable, "-m", "llmctl", "nonsense"]
    code = subprocess.call(command, env={**llmctl_env, **variables}, stdin=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    text = os.read(reader, 4096)
    os.close(reader)
    assert code == 2
    assert (b"\x1b[31m" in text) == coloured
    assert b"no such command `nonsense`" in text


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("command", "code"), [("ls", 0), ("plugins", 0), ("nonsense", 2), ("generate .", 2)])
def test_closed_standard_streams(command, code, closed, llmctl_env, tmp_path):
    script = f"{sys.executable} -m llmctl {command} {closed}"
    done = subprocess.run(["bash", "-c", script], env=llmctl_env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
