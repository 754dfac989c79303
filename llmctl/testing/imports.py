"""What importing a plugin costs and changes, seen in fresh processes: `llmctl --help` imports every plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HEAVY = ("torch", "numpy", "onnxruntime", "pydantic", "yaml", "rich", "transformers", "tokenizers")
"""Modules that must not be loaded by `llmctl --help`."""
HEAVY_PARAMS = ("torch", "numpy", "onnxruntime", "transformers", "tokenizers")
"""Modules that must not be loaded to read a spec or to show a stage's help."""
MOST_CPU = 0.015
"""Seconds of CPU time that importing one plugin may take."""
ATTEMPTS = 3

PROBE = """
import contextlib, importlib, json, logging, os, sys, tempfile, time
sys.path[:] = [os.path.abspath(path) for path in sys.path]
os.chdir(tempfile.gettempdir())
import importlib.metadata, click, pluggy, llmctl.cli, llmctl.registry
if sys.argv[2] == "params":
    import llmctl.spec.params
def state():
    root = logging.getLogger()
    return {"the environment": dict(os.environ), "the working directory": os.getcwd(), "sys.path": sys.path[:],
            "the root logger": [root.level, len(root.handlers)], "sys.argv": sys.argv[:],
            "the recursion limit": sys.getrecursionlimit()}
before, known = state(), set(sys.modules)
begun = time.process_time()
import io
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    importlib.import_module(sys.argv[1])
cpu = time.process_time() - begun
after = state()
print(json.dumps({"cpu": cpu, "loaded": sorted(set(sys.modules) - known), "printed": printed.getvalue()[:80],
                  "changed": [name for name in before if before[name] != after[name]]}))
"""


@dataclass(frozen=True)
class Import:
    """What one import did: CPU seconds (the best of several), top-level modules it loaded, what it changed."""

    cpu: float
    loaded: frozenset[str]
    changed: tuple[str, ...]
    printed: str
    error: str = ""


def original_environment() -> dict[str, str]:
    """The environment that this process was started with: importing a plugin here may have changed ours already."""
    try:
        raw = Path("/proc/self/environ").read_bytes()
    except OSError:
        return dict(os.environ)
    pairs = (os.fsdecode(item).partition("=") for item in raw.split(b"\0") if item)
    return {name: value for name, _, value in pairs}


def probe(module: str, kind: str = "plugin", attempts: int = ATTEMPTS) -> Import:
    """Import `module` in `attempts` fresh processes; `kind="params"` has pydantic loaded before."""
    best, environment = None, original_environment() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for _ in range(attempts):
        command = [sys.executable, "-c", PROBE, module, kind]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not done.stdout.strip():
            lines = done.stderr.strip().splitlines() or [f"it ends the process, exit {done.returncode}"]
            return Import(0.0, frozenset(), (), "", lines[-1])
        raw = json.loads(done.stdout.splitlines()[-1])
        loaded = frozenset(name.partition(".")[0] for name in raw["loaded"])
        found = Import(raw["cpu"], loaded, tuple(raw["changed"]), raw["printed"])
        best = found if best is None or found.cpu < best.cpu else best
    assert best is not None
    return best


def import_faults(module: str, kind: str = "plugin", most: float = MOST_CPU) -> list[str]:
    """What is wrong with importing a plugin's package, or the module of its parameters; a phrase each."""
    found = probe(module, kind, ATTEMPTS if kind == "plugin" else 1)
    if found.error:
        return [f"`{module}` cannot be imported: {found.error}"]
    heavy = sorted(found.loaded & set(HEAVY if kind == "plugin" else HEAVY_PARAMS))
    faults = [f"importing `{module}` loads {', '.join(heavy)}"] if heavy else []
    faults += [f"importing `{module}` changes {what}" for what in found.changed]
    if found.printed:
        faults.append(f"importing `{module}` prints {found.printed.strip()!r}")
    if kind == "plugin" and found.cpu >= most:
        faults.append(f"importing `{module}` takes {found.cpu * 1000:.0f} ms of CPU, {most * 1000:.0f} ms are allowed")
    return faults
