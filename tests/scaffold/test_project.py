"""`llmctl plugins new`: names, files, and a project whose own tests pass as it was written."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from llmctl import __version__
from llmctl.errors import UsageError
from llmctl.plugin_check import pinned
from llmctl.registry import get_registry
from llmctl.scaffold.project import TEMPLATES, Project, project, write

ROOT = Path(__file__).parents[2]
FILES = {
    ".gitignore", "README.md", "demo.yaml", "llmctl-plugin.json", "llmctl_demo/__init__.py", "llmctl_demo/params.py",
    "llmctl_demo/run.py", "pyproject.toml", "tests/conftest.py", "tests/test_demo.py",
}  # fmt: skip


def files(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("Demo Stage!", "no name for a stage: a-z, 0-9 and single hyphens", "how about `demo-stage`?"),
        ("demo_stage", "no name for a stage", "how about `demo-stage`?"),
        ("2fast", "no name for a stage", "how about `fast`?"),
        ("-x", "no name for a stage", "how about `x`?"),
        ("a--b", "no name for a stage", "how about `a-b`?"),
        ("../evil", "no name for a stage", "how about `evil`?"),
        ("", "no name for a stage", "text-cleaner"),
        ("é", "no name for a stage", "text-cleaner"),
        ("x" * 41, "at most 40 characters", f"how about `{'x' * 40}`?"),
        ("llmctl-", "no name for a stage", "text-cleaner"),
        ("run", "`run` is a command of llmctl", "such as `my-run`"),
        ("plugins", "`plugins` is a command of llmctl", "such as `my-plugins`"),
        ("vars", "`vars` is a section of spec files", "such as `my-vars`"),
        ("tokenize", "`tokenize` is the name of an installed stage", "such as `my-tokenize`"),
        ("llmctl-sft", "`sft` is the name of an installed stage", "such as `my-sft`"),
        ("chat", "`chat` is the name of an installed command", "such as `my-chat`"),
        ("monitor", "`monitor` is a name that llmctl keeps for itself", "such as `my-monitor`"),
    ],
)
def test_a_name_that_is_wrong_or_taken(name, message, hint):
    with pytest.raises(UsageError) as found:
        project(name, get_registry())
    assert message in found.value.message
    assert hint in found.value.hint


def test_the_name_of_another_plugin_is_taken(install, llmctl):
    source = """
        from llmctl import Stage, hookimpl
        @hookimpl
        def register_stages():
            return [Stage(name="acme", help="X.", params="", run="")]
    """
    install("acme", {"acme": "acme"}, {"acme.py": source})
    install("broken", {"torn": "torn"}, {"torn.py": "1/0"})
    install("llmctl-odd", {"odds": "llmctl_odd"}, {"llmctl_odd/__init__.py": ""})
    for name in ("acme", "torn", "odd"):
        done = llmctl("plugins", "new", name)
        assert done.returncode == 2, name
        assert "error: `" in done.stderr


@pytest.mark.parametrize("name", ["demo", "text-cleaner", "corpus", "in", "x", "a1-b2", "llm"])
def test_every_file_of_any_name_is_whole(name):
    found = project(name, get_registry())
    written = found.files()
    assert not [path for path, text in written.items() if "{{" in text or "{%" in text]
    assert all(text.endswith("\n") for text in written.values())
    for path, text in written.items():
        if path.endswith(".py"):
            compile(text, path, "exec")
    settings = tomllib.loads(written["pyproject.toml"])["project"]
    assert settings["name"] == f"llmctl-{name}"
    assert settings["entry-points"]["llmctl"] == {name: found.package}
    assert settings["dependencies"] == [f"llmctl>={__version__},<0.2"]
    assert json.loads(written["llmctl-plugin.json"])["distribution"] == found.dist


ODD_NAMES = ("spec", "texts", "true", "false", "null", "no", "test")
"""Names that mean something to the templates themselves, to YAML or to Python."""


@pytest.mark.slow
def test_a_name_that_means_something_elsewhere_works(tmp_path, install, site, llmctl, llmctl_env):
    for name in ODD_NAMES:
        made = project(name, get_registry())
        write(made, tmp_path / name)
        install(made.dist, {name: made.package}, {}, metadata=f"Requires-Dist: {pinned()}\n")
        shutil.copytree(tmp_path / name / made.package, site / made.package)
    checked = llmctl("plugins", "--check")
    assert checked.returncode == 0, checked.stdout
    read = "from llmctl.spec.pipeline import load_pipeline as load\nfrom llmctl.registry import get_registry as get"
    loaded = [f"load({str(tmp_path / name / name)!r} + '.yaml', registry=get())" for name in ODD_NAMES]
    command = [sys.executable, "-c", "\n".join([read, *loaded])]
    done = subprocess.run(command, env=llmctl_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Some of their own tests; in processes of its own, which takes long, one that YAML would misread.
    some = "dropped or goes_on or declaration or (null and pipeline)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", some]
    done = subprocess.run(
        [*command, *ODD_NAMES], cwd=tmp_path, env=llmctl_env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert f"{3 * len(ODD_NAMES) + 1} passed" in done.stdout


def test_llmctl_demo_means_demo():
    assert project("llmctl-demo", get_registry()) == Project("demo")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_it_says_what_comes_next(llmctl, tmp_path):
    done = llmctl("plugins", "new", "demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "llmctl-demo: 10 files written\n"
        "next:\n  cd llmctl-demo\n  pip install -e '.[test]'\n  pytest\n  llmctl demo --help\n"
    )
    assert files(tmp_path / "work/llmctl-demo") == FILES


def test_nothing_is_overwritten(llmctl, tmp_path):
    target = tmp_path / "work/here"
    target.mkdir()
    (target / "README.md").write_text("mine")
    refused = llmctl("plugins", "new", "demo", "--directory", "here")
    assert refused.returncode == 5
    assert refused.stderr.startswith("error: here is not empty\n  hint: give another --directory, or --force")
    assert files(target) == {"README.md"}
    forced = llmctl("plugins", "new", "demo", "--directory", "here", "--force")
    assert forced.returncode == 0
    assert forced.stdout.startswith("here: 9 files written, kept: README.md\n")
    assert (target / "README.md").read_text() == "mine"
    assert files(target) == FILES
    again = llmctl("plugins", "new", "demo", "--directory", "here", "--force")
    assert again.stdout.startswith("here: 0 files written, kept: ")


def test_a_directory_that_cannot_be_written(llmctl, tmp_path):
    (tmp_path / "work/file").write_text("")
    done = llmctl("plugins", "new", "demo", "--directory", "file")
    assert (done.returncode, done.stderr) == (5, "error: file is a file\n  hint: give another --directory\n")
    done = llmctl("plugins", "new", "demo", "--directory", "file/below")
    assert done.returncode == 3
    assert "cannot write file/below/pyproject.toml: Not a directory" in done.stderr


# -- the project itself -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The generated project, installed by pip beside it: (project, environment)."""
    base = tmp_path_factory.mktemp("new")
    made, site = base / "llmctl-demo", base / "site"
    subprocess.run(
        [sys.executable, "-m", "llmctl", "plugins", "new", "demo"], cwd=base, check=True, capture_output=True
    )
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", site, made], check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLMCTL_", "PYTEST_"))}
    return made, {**kept, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def call(demo, *args, **options):
    made, env = demo
    command = [sys.executable, "-m", *args]
    return subprocess.run(command, cwd=made, env=env, capture_output=True, text=True, check=False, **options)


@pytest.mark.slow
def test_its_own_tests_pass_as_generated(demo):
    done = call(demo, "pytest", "-q", "-p", "no:cacheprovider", "-W", "error")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_it_conforms(demo):
    done = call(demo, "llmctl", "plugins", "test", "llmctl-demo", "--kills", "1")
    assert done.returncode == 0, done.stdout
    assert "9 checks, 0 failed" in done.stdout
    assert call(demo, "llmctl", "plugins", "--check").returncode == 0


def test_its_record_is_that_of_its_stage(demo):
    before = (demo[0] / "llmctl-plugin.json").read_text()
    done = call(demo, "llmctl", "plugins", "test", "--record")
    assert done.stdout == "llmctl-plugin.json: 1 stages of llmctl-demo, 0 changed\n"
    assert (demo[0] / "llmctl-plugin.json").read_text() == before


def test_its_spec_runs(demo, tmp_path):
    done = call(demo, "llmctl", "run", "demo.yaml", "--store", str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    assert "sifted: done" in done.stderr


def test_it_is_clean_by_our_own_rules(demo):
    made = demo[0]
    settings = ["--no-cache", "--config", str(ROOT / "pyproject.toml"), "--config", f"src=['{made}']"]
    ruff = next(path for path in (Path(sys.executable).with_name("ruff"), ROOT / ".venv/bin/ruff") if path.exists())
    subprocess.run([ruff, "check", *settings, made], check=True)
    subprocess.run([ruff, "format", "--check", *settings, made], check=True)


@pytest.mark.slow
def test_it_is_typed(demo):
    done = call(demo, "mypy", "--strict", "--cache-dir", os.devnull, "llmctl_demo", "tests/test_demo.py")
    assert done.returncode == 0, done.stdout


def test_the_templates_are_in_the_wheel(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    templates = {path.relative_to(ROOT).as_posix() for path in TEMPLATES.rglob("*.jinja")}
    assert len(templates) == len(FILES)
    assert templates <= names
