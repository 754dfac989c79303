"""What `pip install` gives, away from the checkout: the wheel's contents, everything with all extras, and no torch."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STAGES = sorted(PROJECT["entry-points"]["llmctl"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=target)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_has_one_package_per_plugin_and_no_other(names):
    top = {name.partition("/")[0] for name in names}
    plugins = set(PROJECT["entry-points"]["llmctl"].values())
    assert top == {"llmctl", *plugins, f"llmctl-{PROJECT['version']}.dist-info"}


def test_the_wheel_has_every_file_of_the_source(names):
    ignored = {".pyc", ".so"}
    for base, inside in (("llmctl", "llmctl"), ("plugins", ""), ("specs", "llmctl/specs")):
        files = (path for path in (ROOT / base).rglob("*") if path.is_file() and path.suffix not in ignored)
        for path in files:
            if any(part.startswith(".") for part in path.relative_to(ROOT).parts):
                continue
            assert (Path(inside) / path.relative_to(ROOT / base)).as_posix() in names
    assert {"llmctl/py.typed", "llmctl/specs/quickstart.yaml", "llmctl/pipeline/report.html"} <= names


def test_the_wheel_has_nothing_that_was_left_lying_around(names):
    own = {name for name in names if name.startswith("llmctl/scaffold/templates/")}  # the tests of a new plugin
    assert [name for name in names - own if "__pycache__" in name or name.endswith(".pyc") or "/tests/" in name] == []


def test_the_metadata_names_the_program_the_stages_and_the_license(wheel, names):
    info = f"llmctl-{PROJECT['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "llmctl = llmctl.__main__:main" in entry_points
    assert all(f"\n{stage} = " in entry_points for stage in STAGES)
    assert f"{info}/licenses/LICENSE" in names
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not [line for line in required if "torch" in line or "transformers" in line]


# -- really installed -------------------------------------------------------------------------------------------------


@dataclass
class Installed:
    """An environment that knows nothing of the checkout, and an empty directory to work in."""

    bin: Path
    work: Path

    def __call__(self, program: str, *args: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "TMPDIR")}
        return subprocess.run(
            [self.bin / program, *args],
            cwd=self.work,
            env={**kept, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def good(self, program: str, *args: str | Path, timeout: float = 120) -> str:
        done = self(program, *args, timeout=timeout)
        assert done.returncode == 0, done.stderr
        return done.stdout


def constraints() -> list[str]:
    """Those of the environment that runs the tests: its torch can be had, another perhaps not."""
    files = ["constraints.txt"]
    if "+cpu" in importlib.metadata.version("torch"):
        files.append("constraints-cpu.txt")
    return [word for name in files for word in ("-c", str(ROOT / name))]


def install(base: Path, what: str) -> Installed:
    subprocess.run([sys.executable, "-m", "venv", base / "env"], check=True)
    work = base / "somewhere else"
    work.mkdir()
    command = [base / "env/bin/python", "-m", "pip", "install", "-q", *constraints(), what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stderr
    return Installed(base / "env/bin", work)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """`pip install .[all]`, not editable, from a directory elsewhere, and the tiny chain run there."""
    pytest.importorskip("torch")
    found = install(tmp_path_factory.mktemp("full"), f"{ROOT}[all]")
    shutil.copy(HERE / "tiny.yaml", found.work)
    found.good("llmctl", "run", "tiny.yaml", "--to", "serve", timeout=280)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_works_from_any_directory(full):
    help = full.good("llmctl", "--help")
    assert all(stage in help for stage in STAGES)
    assert "quickstart" in full.good("llmctl", "check", "quickstart")
    assert "data" in full.good("llmctl", "plan", "quickstart")
    assert {"model.onnx", "genai_config.json"} <= {path.name for path in (full.work / "exports/tiny").iterdir()}
    assert "cached" in full.good("llmctl", "plan", "tiny.yaml")
    full.good("python", "-m", "pip", "check")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_names_are_taken_from_others(full):
    code = "import importlib.util as u; print([n for n in ('plugins', 'specs', 'tests', 'tools') if u.find_spec(n)])"
    assert full.good("python", "-P", "-c", code).strip() == "[]"
    where = full.good("python", "-P", "-c", "import llmctl, llmctl_data; print(llmctl.__file__, llmctl_data.__file__)")
    assert str(ROOT) not in where


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_torch_a_bundle_is_checked_served_and_asked(wheel, full, tmp_path):
    base = install(tmp_path, f"{wheel}[serve]")
    absent = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx') if u.find_spec(n)])"
    assert base.good("python", "-c", absent).strip() == "[]"
    shutil.copytree(full.work / "exports/tiny", base.work / "bundle")
    assert "no mistakes" in base.good("llmctl", "check", "quickstart")
    serve = ["serve", "--model", "./bundle", "--mode", "smoke", "--set", "smoke_questions=[Hello?]", "--port", "0"]
    base.good("llmctl", *serve, "--max-new-tokens", "8")
    question = ["chat", "bundle", "--prompt", "What does dedent do?", "--max-new-tokens", "8"]
    assert base.good("llmctl", *question) == full.good("llmctl", *(("chat", "exports/tiny", *question[2:])))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_torch_training_names_the_extra(wheel, full, tmp_path):
    base = install(tmp_path, str(wheel))
    shutil.copytree(full.work / ".llmctl", base.work / ".llmctl")
    shutil.copy(HERE / "tiny.yaml", base.work)
    done = base("llmctl", "run", "tiny.yaml", "--to", "sft", "--set", "sft.lr=0.013")
    assert done.returncode == 7
    assert "llmctl[train]" in done.stderr
    assert "Traceback" not in done.stderr
