"""Properties of the source tree that drift quietly when nobody looks."""

import ast
import re
from pathlib import Path

import pytest

import llmctl
from llmctl import hookspecs
from llmctl.registry import HOOKS

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "llmctl").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])


def test_public_api_is_pinned():
    assert llmctl.__all__ == [
        "Artifact", "Command", "Context", "Field", "In", "InputError", "LlmctlError", "MachineError", "Out",
        "PLUGIN_API", "Params", "Stage", "StageError", "TempFail", "UsageError", "__version__", "hookimpl",
    ]  # fmt: skip
    for name in llmctl.__all__:
        assert getattr(llmctl, name) is not None


def test_hooks_are_pinned():
    assert set(HOOKS) == {
        "register_stages",
        "register_commands",
        "run_stage",
        "log_metrics",
        "open_generator",
        "register_readers",
    }


def hook_tests(hook, sources):
    """The functions `test_hook_<hook>` of the test files that assert something or run a helper that does."""
    found = []
    for text in sources:
        if f"def test_hook_{hook}" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and re.fullmatch(rf"test_hook_{hook}(_.*)?", node.name):
                found += [node for inner in ast.walk(node) if isinstance(inner, ast.Assert)][:1]
    return found


TESTS = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_and_has_a_test_of_its_name(hook):
    assert (getattr(hookspecs, hook).__doc__ or "").strip(), f"{hook} has no docstring"
    assert hook_tests(hook, TESTS), f"no test is called test_hook_{hook}"


def test_a_hook_without_a_test_is_noticed():
    assert not hook_tests("brand_new", TESTS)
    assert not hook_tests("log_metrics", ["def test_hook_log_metrics():\n    pass\n"]), "an empty test is none"
    assert not hook_tests("log", ["def test_hook_logger():\n    assert True\n"]), "a test of another hook is none"
    assert hook_tests("log", ["def test_hook_log_twice():\n    assert True\n"])


def test_gradients_are_taken_in_one_file():
    found = [str(path.relative_to(ROOT)) for path in SOURCES if ".backward(" in path.read_text()]
    assert found == ["llmctl/train/loop.py"]


def test_nobody_imports_a_package_called_plugins():
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.partition(".")[0] == "plugins"], path


def test_modules_are_nouns():
    vague = {"utils", "util", "common", "misc", "helpers"}
    assert not [path for path in SOURCES if path.stem in vague]


def test_every_module_says_what_it_is_for():
    assert not [str(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]


@pytest.mark.parametrize(
    "folder", sorted(path for path in (ROOT / "plugins").iterdir() if path.is_dir()), ids=lambda p: p.name
)
def test_every_plugin_has_the_same_first_three_files(folder):
    if folder.name.startswith("llmctl_"):
        assert {"__init__.py", "params.py", "run.py"} <= {path.name for path in folder.iterdir()}
        assert len((folder / "__init__.py").read_text().splitlines()) < 60
