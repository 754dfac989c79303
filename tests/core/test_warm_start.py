"""What tests fork instead of starting it anew behaves as a new interpreter does."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHOWS = """
import json, os, sys
import click
from llmctl import Command, hookimpl

@click.command()
@click.argument("code", type=int)
def tells(code):
    import time
    streams = [[file.fileno(), file.encoding, file.errors] for file in (sys.stdin, sys.stdout, sys.stderr)]
    seen = {"cwd": os.getcwd(), "argv": sys.argv[1:], "env": dict(sorted(os.environ.items())), "streams": streams}
    seen |= {"path": sys.path[:2], "main": sys.modules["__main__"].__spec__.name, "read": sys.stdin.read()}
    seen |= {"open": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1]}
    print(json.dumps(seen))
    print("said", file=sys.stderr)
    if code == 9:
        time.sleep(60)
    return code

@hookimpl
def register_commands():
    return [Command(name="tells", help="Tells.", target="shows:tells")]
"""


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize("given", [None, b"some\nlines"])
def test_it_is_as_a_new_interpreter(install, warm_start, llmctl_env, tmp_path, code, given):
    install("shows", {"shows": "shows"}, {"shows.py": SHOWS})
    env, found = {**llmctl_env, "EXTRA": "1"}, []
    (tmp_path / "given").write_bytes(given or b"")
    for new in (True, False):
        with (tmp_path / "given").open("rb") as stdin:
            source = subprocess.DEVNULL if given is None else stdin
            if new:
                command = [sys.executable, "-m", "llmctl", "tells", str(code)]
                done = subprocess.run(command, env=env, cwd=tmp_path, stdin=source, capture_output=True, text=True)
            else:
                done = warm_start.run(["tells", str(code)], env, tmp_path, source, 20)
        found.append((done.args, done.returncode, done.stdout, done.stderr))
    assert found[0] == found[1]
    assert found[0][1] == code
    assert "some" in found[0][2] or given is None


def test_one_that_takes_too_long_is_killed_and_the_next_one_runs(install, warm_start, llmctl_env, tmp_path):
    install("shows", {"shows": "shows"}, {"shows.py": SHOWS})
    with pytest.raises(subprocess.TimeoutExpired):
        warm_start.run(["tells", "9"], llmctl_env, tmp_path, subprocess.DEVNULL, 1)
    assert warm_start.run(["tells", "0"], llmctl_env, tmp_path, subprocess.DEVNULL, 20).returncode == 0


def test_what_an_interpreter_reads_at_its_start_takes_a_new_one(warm_start, llmctl_env):
    assert warm_start.fits(llmctl_env)
    for name in ("PYTHONWARNINGS", "LC_ALL", "TZ"):
        assert not warm_start.fits({**llmctl_env, name: "C"})
    with warm_start.turn:
        assert not warm_start.fits(llmctl_env), "one runs at a time"
