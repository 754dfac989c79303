"""A plugin as a third party makes it: written by `llmctl plugins new`, built, installed, used with our stages."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = """\
llmctl: 1
name: notes
sources:
  notes: "notes/*.md"
stages:
  corpus: {uses: data, inputs: {files: sources.notes}, with: {emit: [text]}}
  sifted: {uses: demo, inputs: {text: corpus.text}}
  tokens: {uses: tokenize, inputs: {text: sifted.text}, with: {vocab_size: 270}}
"""
NOTES = {
    "a.md": "# Heron\n\nThe heron of the marsh hunts at dusk and sleeps by day.\n",
    "b.md": "# heron\n\nThe  heron of the marsh hunts at DUSK and sleeps by day.\n",
    "c.md": "Short.\n",
    "d.md": "# Otter\n\nThe otter of the old mill swims well and eats beetles.\n",
}


@dataclass
class Place:
    """A Python with llmctl and the plugin, and a directory of notes to work in."""

    python: Path
    work: Path
    env: dict[str, str] = field(default_factory=dict)

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self.shell(" ".join(["llmctl", *args]))

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """A line of bash, in which `llmctl` is that of this Python; any failing part of a pipe fails it."""
        kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "TMPDIR", "PATH")}
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", f'llmctl() {{ "{self.python}" -P -m llmctl "$@"; }}\n{line}'],
            cwd=self.work,
            env={**kept, "OMP_NUM_THREADS": "1", **self.env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
        )


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def new_demo(base: Path) -> Path:
    """`llmctl plugins new demo`, elsewhere."""
    good(
        subprocess.run(
            [sys.executable, "-m", "llmctl", "plugins", "new", "demo"], cwd=base, capture_output=True, text=True
        )
    )
    return base / "llmctl-demo"


def notes(base: Path) -> Path:
    work = base / "some where"
    (work / "notes").mkdir(parents=True)
    for name, text in NOTES.items():
        (work / "notes" / name).write_text(text)
    (work / "notes.yaml").write_text(SPEC)
    return work


def takes_part(place: Place) -> None:
    """The plugin's stage is a command, stands in a spec and in a pipe between two built-in stages, and is cached."""
    assert "  demo " in good(place("--help"))
    assert "--min-words" in good(place("demo", "--help"))
    assert "no mistakes" in good(place("check", "notes.yaml"))
    ran = place("run", "notes.yaml")
    good(ran)
    assert "sifted: done" in ran.stderr
    assert "rows.kept 2  rows.short 1  rows.repeated 1" in ran.stdout
    again = place("run", "notes.yaml")
    assert again.stderr.count("cached") == 3, again.stderr
    data = "llmctl data --files 'notes/*.md' --set emit=[text]"
    line = f"{data} | llmctl demo | llmctl tokenize --vocab-size 270 --format id"
    piped = place.shell(line)
    ids = good(piped).split()
    assert all(f"{name}: cached" in piped.stderr for name in ("data", "demo", "tokenize")), piped.stderr
    shown = good(place("show", "notes/tokens.tokens"))
    assert any(id in shown for id in ids), "the pipe gives what the spec gave"
    other = place.shell(line.replace("llmctl demo", "llmctl demo --min-words 1"))
    assert "tokenize: done" in other.stderr
    assert good(other).split() != ids
    wrong = place.shell(line.replace("llmctl demo", "llmctl demo --min-word 1"))
    assert wrong.returncode != 0
    assert "did you mean `--min-words`?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_installed_beside_llmctl(tmp_path):
    made, site = new_demo(tmp_path), tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", site, made], check=True)
    takes_part(Place(Path(sys.executable), notes(tmp_path), {"PYTHONPATH": str(site)}))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Place:
    """Two wheels in a new virtual environment, everything else from the index."""
    base = tmp_path_factory.mktemp("clean")
    wheels = base / "wheels"
    for source in (ROOT, new_demo(base)):
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, source]
        good(subprocess.run(command, capture_output=True, text=True, cwd=base))
    subprocess.run([sys.executable, "-m", "venv", base / "env"], check=True)
    files = ["constraints.txt"]
    if "+cpu" in importlib.metadata.version("torch"):
        files.append("constraints-cpu.txt")
    constraints = [word for name in files for word in ("-c", str(ROOT / name))]
    (ours,), (demo,) = wheels.glob("llmctl-*.whl"), wheels.glob("llmctl_demo-*.whl")
    # Both by path: on the index another project has the name `llmctl`.
    command = [base / "env/bin/python", "-m", "pip", "install", "-q", *constraints, ours, f"{demo}[test]"]
    good(subprocess.run(command, capture_output=True, text=True, cwd=base))
    return Place(base / "env/bin/python", notes(base))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_as_a_wheel_in_a_clean_environment(clean):
    where = "import llmctl, llmctl_demo; print(llmctl.__file__, llmctl_demo.__file__)"
    found = subprocess.run([clean.python, "-P", "-c", where], cwd=clean.work, capture_output=True, text=True)
    assert good(found).count("site-packages") == 2
    assert str(ROOT) not in found.stdout
    takes_part(clean)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_kit_works_in_a_clean_environment(clean):
    good(clean("plugins", "--check"))
    project = clean.work.parent / "llmctl-demo"
    assert "9 checks, 0 failed" in good(
        clean("plugins", "test", "llmctl-demo", "--file", str(project / "llmctl-plugin.json"))
    )
    tests = [clean.python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    good(subprocess.run(tests, cwd=project, capture_output=True, text=True))
