"""Everything that the checks look at, as one value: the real one is looked up, those of the tests are made up."""

from __future__ import annotations

import json
import locale
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmctl.registry import Registry
    from llmctl.spec.resolved import Pipeline, Secret, StageSpec

PROBE_SECONDS = 120.0
"""An import of torch from a cold disk on a busy machine takes most of a minute."""


@dataclass(frozen=True)
class Dist:
    """An installed distribution."""

    name: str
    version: str
    requires: tuple[str, ...] = ()
    editable: str = ""
    """The project directory of an editable install."""


@dataclass(frozen=True)
class Output:
    """What a program answered; `code` is None if it could not be started or did not end."""

    code: int | None
    text: str = ""


@dataclass(frozen=True)
class Probe:
    """The result of an experiment, or in `fault` why there is none."""

    values: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class World:
    """An installation on a machine. `read` gives the text of a file, empty if there is none."""

    python: tuple[int, int, int]
    executable: str
    isolated: bool
    """Whether packages are kept apart from the system's: a virtual environment, conda, a container."""
    environ: Mapping[str, str]
    distributions: Mapping[str, Dist]
    """By normalised name (PEP 503)."""
    tried: Mapping[str, str]
    """Versions that were tried together (`constraints.txt` of a checkout), by normalised name."""
    registry: Registry
    read: Callable[[str], str]
    which: Callable[[str], str | None]
    run: Callable[[Sequence[str]], Output]
    probe: Callable[[str], Probe]
    kernel_gpus: tuple[str, ...] = ()
    """Names of the GPUs that the kernel's driver lists."""
    store: Path
    free: int
    """Bytes free on the disk of the store."""
    cores: int
    affinity: int
    open_files: int
    encoding: str
    now: float
    spec: Callable[[], Pipeline] | None = None
    """Reads the spec on the command line, if there is one."""
    fits: Callable[[StageSpec], object]
    """MachineError if a stage asks for more than the machine has."""
    secret: Callable[[Secret], object]
    """MachineError if a secret is not there."""

    def has(self, name: str) -> Dist | None:
        """The installed distribution of that name."""
        return self.distributions.get(normal(name))

    @property
    def gpus(self) -> list[str]:
        """Names of the NVIDIA GPUs that the driver shows."""
        answer = self.run(("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"))
        if answer.code is None:  # not every container has the program
            return list(self.kernel_gpus)
        return [line.strip() for line in answer.text.splitlines() if line.strip()] if answer.code == 0 else []

    @property
    def pip(self) -> str:
        """How to call the pip of this environment."""
        found = self.which("pip")
        beside = Path(self.executable).parent
        return "pip" if found and Path(found).parent == beside else f"{self.executable} -m pip"

    def extra(self, name: str) -> str:
        """The command that installs an extra, into an editable install too."""
        ours = self.has("llmctl")
        what = f"-e '{ours.editable}[{name}]'" if ours and ours.editable else f"'llmctl[{name}]'"
        return f"{self.pip} install {what}"


def normal(name: str) -> str:
    """A distribution name as packaging compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def real_world(store: Path, spec: Callable[[], Pipeline] | None = None) -> World:
    """This installation on this machine; the probes start at once, beside each other."""
    from llmctl.launch.failures import free_bytes
    from llmctl.launch.secrets import resolve
    from llmctl.pipeline.machine import check_resources
    from llmctl.registry import get_registry

    home = next(place for place in (store, *store.absolute().parents) if place.is_dir())
    pool = ThreadPoolExecutor(4)
    probes = {
        name: pool.submit(start_probe, name, *arguments)
        for name, *arguments in (("torch",), ("onnxruntime",), ("place", str(home)), ("temporary",))
    }
    pool.shutdown(wait=False)
    return World(
        python=sys.version_info[:3],
        executable=sys.executable,
        isolated=sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ or Path("/.dockerenv").exists(),
        environ=os.environ,
        distributions=installed(),
        tried=tried_versions(Path(__file__).parents[2] / "constraints.txt"),
        registry=get_registry(),
        read=read_text,
        which=shutil.which,
        run=_Memory(),
        probe=lambda name: probes[name].result(),
        kernel_gpus=kernel_gpus(Path("/proc/driver/nvidia/gpus")),
        store=store,
        free=free_bytes(store),
        cores=os.cpu_count() or 1,
        affinity=len(os.sched_getaffinity(0)),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        encoding=locale.getpreferredencoding(False),
        now=time.time(),
        spec=spec,
        fits=lambda stage: check_resources([stage], store),
        secret=lambda secret: resolve({secret.name: secret}, [secret.name]),
    )


def installed() -> dict[str, Dist]:
    """Every distribution on the path; the first of two of the same name is the one that is imported."""
    from importlib.metadata import distributions

    found: dict[str, Dist] = {}
    for dist in distributions():
        name = dist.metadata["Name"]
        if not name or normal(name) in found:
            continue
        found[normal(name)] = Dist(
            name, dist.version or "", tuple(dist.requires or ()), _project(dist.read_text("direct_url.json"))
        )
    return found


def _project(direct_url: str | None) -> str:
    """The directory of an editable install by its record (PEP 610), empty if it is none."""
    try:
        origin = json.loads(direct_url or "{}")
        return str(origin["url"]).removeprefix("file://") if origin["dir_info"]["editable"] else ""
    except (ValueError, KeyError, TypeError):
        return ""


def kernel_gpus(folder: Path) -> tuple[str, ...]:
    """The `Model:` lines that NVIDIA's kernel driver shows, one for each GPU."""
    texts = [read_text(str(path)) for path in sorted(folder.glob("*/information"))]
    return tuple(match[1].strip() for text in texts if (match := re.search(r"^Model:(.*)$", text, re.MULTILINE)))


def tried_versions(constraints: Path) -> dict[str, str]:
    """`name==version` lines without a marker; empty if there is no such file."""
    lines = read_text(str(constraints)).splitlines()
    rows = (re.match(r"([\w.-]+)==([\w.+!-]+)\s*(#|$)", line) for line in lines)
    return {normal(row[1]): row[2] for row in rows if row}


def read_text(path: str) -> str:
    """The text of a file, empty if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class _Memory:
    """Runs programs, each command once."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, ...], Output] = {}

    def __call__(self, command: Sequence[str]) -> Output:
        key = tuple(command)
        if key not in self._answers:
            self._answers[key] = run_program(key)
        return self._answers[key]


def run_program(command: Sequence[str], seconds: float = 20) -> Output:
    """Run a program and take what it prints, errors included."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Output(None, f"no answer within {seconds:.0f} s")
    except OSError as error:
        return Output(None, str(error.strerror))
    return Output(done.returncode, done.stdout)


def start_probe(name: str, *arguments: str, seconds: float = PROBE_SECONDS) -> Probe:
    """Run an experiment in a process of its own; a crash, a hang or an error of it becomes `fault`."""
    command = [sys.executable, "-m", "llmctl.doctor.probes", name, *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Probe(fault=f"no answer within {seconds:.0f} s")
    if done.returncode < 0:
        return Probe(fault=f"it crashed ({signal.Signals(-done.returncode).name})")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return Probe(fault=lines[-1][:300])
    return Probe(json.loads(done.stdout))
