"""Fixtures for every test that drives the real command line or really installed plugins."""

from __future__ import annotations

import compileall
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import hypothesis
import pytest

from .warm_start import WarmStart

# An example that takes long says that the machine is busy.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A suite in the background (`make test &`, nohup) would hand an ignored Ctrl-C on to every command it tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes with as many threads as cores each wait for one another at every step: 240 s for a test of 7.
    os.environ["OMP_NUM_THREADS"] = "1"

# As installed for a user: without its byte code every command compiles 120 files first, a fifth of its CPU time. That
# of the modules that tests write, and rewrite within a second, must not be kept.
if "PYTEST_XDIST_WORKER" not in os.environ:
    for package in ("llmctl", "plugins"):
        compileall.compile_dir(Path(__file__).parents[1] / package, quiet=2, workers=1)
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

Install = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]


def write_distribution(
    site: Path,
    name: str,
    entry_points: Mapping[str, str],
    files: Mapping[str, str],
    version: str = "0.1",
    record: bool = False,
    metadata: str = "",
) -> Path:
    """Lay out `site` as `pip install --target` would: the modules and `name-version.dist-info`.

    `metadata` are further lines of METADATA, such as `Requires-Dist: llmctl>=0.1`.
    """
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
    lines = [f"{key} = {value}" for key, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[llmctl]", *lines]) + "\n")
    if record:
        (info / "RECORD").write_text("")
    for path, text in files.items():
        target = site / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text))
    return site


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory on the PYTHONPATH of `llmctl_env`."""
    path = tmp_path / "site"
    path.mkdir()
    return path


@pytest.fixture
def install(site: Path) -> Install:
    """Install a plugin into `site`: `install("acme", {"acme": "acme_plugin"}, {"acme_plugin.py": "…"})`."""

    def put(name: str, entry_points: Mapping[str, str], files: Mapping[str, str], **options: object) -> Path:
        return write_distribution(site, name, entry_points, files, **options)

    return put


@pytest.fixture
def llmctl_env(site: Path, tmp_path: Path) -> dict[str, str]:
    """A clean environment for child processes: no colour or terminal settings of the developer's shell."""
    dropped = ("LLMCTL_", "NO_COLOR", "CLICOLOR", "FORCE_COLOR", "CI", "TERM", "COLUMNS", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    config = {"LLMCTL_CONFIG": str(tmp_path / "config" / "llmctl" / "config.yaml")}  # nor the developer's own
    own = {"PYTHONPATH": str(site), "TMPDIR": str(tmp_path), **config, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return {**env, **own}


@pytest.fixture(scope="session")
def warm_start() -> Iterator[WarmStart]:
    """What the commands of `llmctl` fork from."""
    with WarmStart({name: value for name, value in os.environ.items() if name != "PYTHONPATH"}) as process:
        yield process


@pytest.fixture
def llmctl(llmctl_env: dict[str, str], tmp_path: Path, warm_start: WarmStart) -> Run:
    """Run the real command line in `tmp_path/work`: `llmctl("check", "spec.yaml")`; `stdin` is /dev/null."""
    work = tmp_path / "work"
    work.mkdir()

    def run(
        *args: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 60, **kw
    ):
        words, variables, place = [*map(str, args)], {**llmctl_env, **(env or {})}, cwd or work
        kw.setdefault("stdin", subprocess.DEVNULL)
        if "input" in kw:
            del kw["stdin"]
        if set(kw) == {"stdin"} and warm_start.fits(variables):
            return warm_start.run(words, variables, place, timeout=timeout, **kw)
        command: Sequence[str] = [sys.executable, "-m", "llmctl", *words]
        return subprocess.run(command, env=variables, cwd=place, capture_output=True, text=True, timeout=timeout, **kw)

    return run


REFERENCE = 0.016
"""CPU seconds of `_reference` on the machine for which the budgets of CPU time were set."""


@pytest.fixture
def budget() -> Callable[[float], float]:
    """`budget(0.12)`: so much CPU time here as 0.12 s on the reference machine; never less than 0.12 s."""
    found = []
    for _ in range(7):
        begun = time.process_time()
        _reference()
        found.append(time.process_time() - begun)
    return lambda seconds: seconds * max(1.0, min(found) / REFERENCE)


def _reference() -> None:
    """A fixed piece of what llmctl's own Python does most: making, encoding and hashing small values."""
    for number in range(4000):
        row = {"id": f"s[{number}]", "params": {"lr": number * 1e-5, "rows": number, "names": [str(number)] * 3}}
        hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
