"""The plugin API as it is promised: every name and argument, with the version that promises it; and how names go."""

import dataclasses
import inspect
import os
import warnings
from pathlib import Path

import pytest
from packaging.version import Version

import llmctl
from llmctl import hookspecs
from llmctl.deprecation import Deprecated, deprecated_attribute, warn_deprecated
from llmctl.registry import HOOKS
from llmctl.testing import conformance, fixtures, run_stage

GOLDEN = Path(__file__).parent / "golden" / "api.txt"


def arguments(function):
    """`(a, b=, *, c, **d)`: names and kinds; a default may change, that there is one may not."""
    kinds = inspect.Parameter
    found = []
    for parameter in inspect.signature(function).parameters.values():
        star = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**", kinds.KEYWORD_ONLY: "by name "}
        default = "" if parameter.default is kinds.empty else "="
        found.append(f"{star.get(parameter.kind, '')}{parameter.name}{default}")
    return f"({', '.join(found)})"


def surface():
    """A line for everything that a plugin may use."""
    lines = []
    for name in llmctl.__all__:
        value = getattr(llmctl, name)
        if not inspect.isclass(value):
            lines.append(f"{name}{arguments(value)}" if inspect.isroutine(value) else name)
            continue
        if dataclasses.is_dataclass(value):
            fields = ", ".join(field.name for field in dataclasses.fields(value))
            lines.append(f"{name}: {fields}")
        else:
            lines.append(name)
        for key, member in sorted(vars(value).items()):
            if not key.startswith("_") and inspect.isfunction(member):
                lines.append(f"{name}.{key}{arguments(member)}")
    lines += [f"hook {name}{arguments(getattr(hookspecs, name))}" for name in HOOKS]
    lines += [f"testing.run_stage{arguments(run_stage)}"]
    lines += [f"testing.conformance.check_stage{arguments(conformance.check_stage)}"]
    lines += [
        f"fixture {name}" for name in sorted(vars(fixtures)) if "fixture" in type(vars(fixtures)[name]).__name__.lower()
    ]
    return lines


def removed(old, new):
    """The lines of an older surface that a newer one does not keep."""
    return [line for line in old if line not in new]


def test_the_api_is_the_one_that_its_version_promises():
    lines = surface()
    if os.environ.get("LLMCTL_UPDATE_GOLDEN"):
        GOLDEN.write_text("\n".join([f"plugin API {llmctl.PLUGIN_API}", *lines]) + "\n")
    version, *promised = GOLDEN.read_text().splitlines()
    hint = "deprecate before you remove, raise PLUGIN_API, then LLMCTL_UPDATE_GOLDEN=1"
    assert removed(promised, lines) == [], hint
    assert removed(lines, promised) == [], hint
    assert version == f"plugin API {llmctl.PLUGIN_API}"


def test_a_change_of_the_api_is_noticed():
    lines = surface()
    assert any(line.startswith("Context.metric(") for line in lines)
    assert "fixture run_spec" in lines
    assert removed(lines, [line for line in lines if not line.startswith("Context.metric(")])


# -- deprecation ------------------------------------------------------------------------------------------------------


OLD = {"OldStage": Deprecated(target="llmctl.stage:Stage", instead="llmctl.Stage", removed_in="0.3")}


def test_a_deprecated_name_works_and_warns_where_it_is_used(monkeypatch):
    monkeypatch.setattr(llmctl, "_DEPRECATED", OLD)
    with pytest.warns(DeprecationWarning) as found:
        assert llmctl.OldStage is llmctl.Stage
    (warning,) = found
    assert str(warning.message) == "llmctl.OldStage is deprecated and will be removed in llmctl 0.3; use llmctl.Stage"
    assert warning.filename == __file__


def test_an_argument_can_be_deprecated_too():
    def function(**arguments):
        if "old" in arguments:
            warn_deprecated("the argument `old`", instead="`new`", removed_in="0.3")

    with pytest.warns(
        DeprecationWarning, match="the argument `old` is deprecated .* in llmctl 0.3; use `new`"
    ) as found:
        function(old=1)
    assert found[0].filename == __file__


def test_other_names_neither_warn_nor_exist():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert llmctl.Params is not None
        with pytest.raises(AttributeError, match="module 'llmctl' has no attribute 'Nothing'"):
            llmctl.Nothing  # noqa: B018
        with pytest.raises(AttributeError):
            deprecated_attribute("llmctl", "Nothing", OLD)


def outlived(table, version):
    """Deprecated names whose time is over."""
    return [name for name, entry in table.items() if Version(version) >= Version(entry.removed_in)]


def test_no_deprecated_name_outlives_its_version():
    assert outlived(llmctl._DEPRECATED, llmctl.__version__) == []
    assert outlived(OLD, "0.2.9") == []
    assert outlived(OLD, "0.3.0") == ["OldStage"]
