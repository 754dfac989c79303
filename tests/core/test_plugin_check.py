"""`llmctl plugins --check` on really installed plugins: each defect is named with the way out, and nothing is run."""

import json

import pytest

from llmctl import __version__
from llmctl.plugin_check import pinned
from llmctl.registry import fits

INIT = """
from llmctl import Command, In, Out, Stage, hookimpl

@hookimpl
def register_stages():
    return [Stage(**{{**dict(
        name="acme", help="Does a thing.",
        inputs={{"text": In("dataset.text")}}, outputs={{"text": Out("dataset.text")}},
        params="acme.params:AcmeParams", run="acme.run:run",
    ), **dict({changes})}})]

{more}
"""
PARAMS = """
from llmctl import Field, Params

class AcmeParams(Params):
    rows: int = Field(3, description="rows that are kept")
    {field}
"""
RUN = "raise RuntimeError('a check must not import this')\n{imports}\ndef run({arguments}):\n    pass\n"
GOOD = "Requires-Dist: llmctl>=0.1\n"


@pytest.fixture
def acme(install):
    """Install the plugin `acme`, good but for what is changed."""

    def put(changes="", field="", arguments="ctx, params, text", more="", imports="", **options):
        options.setdefault("metadata", GOOD)
        files = {
            "acme/__init__.py": INIT.format(changes=changes, more=more),
            "acme/params.py": PARAMS.format(field=field),
            "acme/run.py": RUN.format(arguments=arguments, imports=imports),
        }
        return install("acme-dist", {"acme": "acme"}, files, **options)

    return put


def test_everything_that_is_built_in_is_in_order(llmctl):
    done = llmctl("plugins", "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith("0 problems, plugin API 1.0")
    assert "note" not in done.stdout


def test_a_good_plugin_is_in_order_and_is_not_run(acme, llmctl):
    acme()
    done = llmctl("plugins", "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


PROBLEMS = {
    "help": (dict(changes="help='does a thing'"), "help is not one sentence: 'does a thing'", "a full stop last"),
    "two sentences": (dict(changes="help='Does this. Does that.'"), "help is not one sentence", "one line"),
    "type": (dict(changes="outputs={'text': Out('dataset.txt')}"), "no type `dataset.txt`", "`dataset.text`?"),
    "same_as": (
        dict(changes="outputs={'text': Out(same_as='texts')}"),
        "same as `texts`, which is no input",
        "`text`?",
    ),
    "rev": (dict(changes="rev=0"), "rev is 0", "from 1 on"),
    "headline": (dict(changes="headline='rows'"), "headline is a text, not a tuple", "('rows',)"),
    "extra": (dict(changes="extra='fast'"), "acme-dist has no extra `fast`", "its extras: none"),
    "no module": (dict(changes="run='acme.runs:run'"), "run: there is no module `acme.runs`", "part of the wheel"),
    "no function": (dict(changes="run='acme.run:rum'"), "run: `acme.run` defines no `rum`", "did you mean `run`?"),
    "no import string": (dict(changes="run='acme.run'"), "run is 'acme.run'", '"package.module:name"'),
    "no package": (dict(changes="run='not_there.x:run'"), "run: `not_there.x` cannot be found", ""),
    "syntax": (dict(imports="def f(:"), "run.py:2: invalid syntax", ""),
    "input not taken": (dict(arguments="ctx, params"), "has no argument for the input `text`", ""),
    "argument unknown": (
        dict(arguments="ctx, params, text, txt"),
        "`txt` of `acme.run:run` is no input port",
        "`text`?",
    ),
    "no arguments": (dict(arguments=""), "takes no context and parameters", "def run(ctx, params, **inputs)"),
    "description": (dict(field="limit: int = 3"), "the parameter `limit` has no description", "--help shows"),
    "flags": (
        dict(field="text: str = Field('', description='x')"),
        "--text would be the parameter `text` and",
        "rename",
    ),
    "switch": (
        dict(field="fast: bool = Field(True, description='x')\n    no_fast: int = Field(1, description='y')"),
        "--no-fast would be the parameter `fast`, switched off and the parameter `no_fast`",
        "rename",
    ),
    "params import": (dict(field="1 / 0"), "cannot be imported: ZeroDivisionError", ""),
    "params class": (dict(changes="params='acme.params:Params'"), "", ""),
    "params exit": (dict(field="import sys; sys.exit(4)"), "cannot be imported: SystemExit: 4", ""),
    "params missing": (dict(changes="params='acme:Acme'"), "params: `acme` defines no `Acme`", ""),
    "params open": (
        dict(changes="params='acme:Acme'", more="def __getattr__(name):\n    raise AttributeError('no ' + name)"),
        "params: `acme:Acme` cannot be imported: AttributeError: no Acme",
        "",
    ),
    "no params class": (dict(changes="params='acme.params:Field'"), "is no class of parameters", "llmctl.Params"),
    "outputs": (
        dict(field="def outputs(self):\n        return {'txt'}"),
        "outputs() of its parameters names `txt`, which is no output",
        "`text`?",
    ),
    "requires": (
        dict(field="def required_inputs(self):\n        return {'txt': 'x'}"),
        "required_inputs() of its parameters names `txt`, which is no input",
        "",
    ),
    "command": (
        dict(more="@hookimpl\ndef register_commands():\n    return [Command(name='hi', help='Hi.', target='acme:hi')]"),
        "`hi`: target: `acme` defines no `hi`",
        "",
    ),
    "requirement": (
        dict(metadata="Requires-Dist: llmctl>=9,<10\n"),
        f"acme-dist 0.1 asks for llmctl<10,>=9, this is {__version__}",
        "install a version of acme-dist for llmctl",
    ),
}


@pytest.mark.parametrize("case", [case for case in PROBLEMS if PROBLEMS[case][1]])
def test_a_defect_is_exit_7_and_named_with_the_way_out(case, acme, llmctl):
    options, text, hint = PROBLEMS[case]
    acme(**options)
    done = llmctl("plugins", "--check")
    assert (done.returncode, done.stderr) == (7, "")
    problem, *rest = done.stdout.splitlines()
    assert problem.startswith("problem: acme-dist: ")
    assert text in problem
    assert hint in (rest[0] if hint else "")
    assert "1 problem, plugin API" in rest[-1]


def test_an_imported_name_counts_as_defined(acme, llmctl):
    acme(changes="params='acme.params:Params'")  # the class of llmctl itself, imported there
    assert llmctl("plugins", "--check").returncode == 0


def test_broken_and_contested_plugins_are_problems(acme, install, llmctl):
    acme(changes="name='sft'")
    install("acme-broken", {"broken": "acme_broken"}, {"acme_broken.py": "1/0"})
    done = llmctl("plugins", "--check")
    assert done.returncode == 7
    assert (
        "problem: acme-broken: `broken`: the plugin `acme_broken` of acme-broken 0.1 is broken: ZeroDiv" in done.stdout
    )
    assert "problem: acme-dist, llmctl: `sft`: registered by acme-dist and by llmctl" in done.stdout
    assert "LLMCTL_DISABLE=acme-dist" in done.stdout
    hidden = llmctl("plugins", "--check", env={"LLMCTL_DISABLE": "acme-dist,acme-broken"})
    assert hidden.returncode == 0, hidden.stdout


def test_a_plugin_that_forgot_to_decorate_its_hook(install, llmctl):
    install("acme", {"acme": "acme_plugin"}, {"acme_plugin.py": "def register_stages():\n    return []"}, metadata=GOOD)
    done = llmctl("plugins", "--check")
    assert done.returncode == 7
    assert "problem: acme: `acme`: it implements no hook\n  hint: decorate the function: @hookimpl" in done.stdout


def test_two_versions_of_a_distribution_on_the_path(acme, install, llmctl):
    acme()
    install("acme-dist", {"acme": "acme"}, {}, version="0.2", metadata=GOOD)
    done = llmctl("plugins", "--check")
    assert done.returncode == 7
    assert "acme-dist: it is installed twice: 0." in done.stdout
    assert "pip uninstall acme-dist" in done.stdout
    assert llmctl("acme", "--help").returncode == 0, "one of them is used"


def test_notes_do_not_fail(acme, llmctl):
    acme(field="store: str = Field('', description='x')", metadata="")
    done = llmctl("plugins", "--check")
    assert done.returncode == 0
    assert done.stdout.count("note: acme-dist: ") == 2
    assert "it does not say which versions of llmctl" in done.stdout
    assert f'dependencies = ["{pinned()}"]' in done.stdout
    assert "`acme`: --store is an option of every stage" in done.stdout
    assert "--set store=…" in done.stdout


def test_what_a_plugin_uses_that_is_to_go_is_noted(acme, llmctl):
    acme(more="import warnings\nwarnings.warn('llmctl.Old is deprecated', DeprecationWarning)")
    done = llmctl("plugins", "--check")
    assert done.returncode == 0
    assert "note: acme-dist: `acme`: llmctl.Old is deprecated (" in done.stdout


DEPRECATE = """
import llmctl
from llmctl.deprecation import Deprecated
llmctl._DEPRECATED["Old"] = Deprecated(target="llmctl.stage:Stage", instead="llmctl.Stage", removed_in="0.3")
"""


def test_who_uses_a_name_that_is_to_go_is_found_in_every_file(acme, llmctl, site):
    acme(more=DEPRECATE + "llmctl.Old", imports="from llmctl import Old")
    (site / "acme/other.py").write_text("import llmctl\n\nOLD = llmctl.Old\n")
    with (site / "acme/params.py").open("a") as file:
        file.write("from llmctl import Old\n")
    (site / "acme/torn.py").write_text("llmctl.Old(")
    done = llmctl("plugins", "--check")
    assert (done.returncode, done.stderr) == (0, "")
    text = "llmctl.Old is deprecated and will be removed in llmctl 0.3; use llmctl.Stage"
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    expected = [
        f"note: acme-dist: `acme`: {text} ({site}/acme/{name}:" for name in ("__init__", "other", "params", "run")
    ]
    assert [line.partition(".py:")[0] + ":" for line in notes] == expected
    assert notes[1].endswith("/other.py:3)")


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemExit(4)"])
def test_a_package_between_that_cannot_be_imported(code, acme, llmctl, site):
    acme(changes="run='acme.sub.run:run'")
    (site / "acme/sub").mkdir()
    (site / "acme/sub/__init__.py").write_text(code)
    done = llmctl("plugins", "--check")
    assert (done.returncode, done.stderr) == (7, "")
    error = "ZeroDivisionError: division by zero" if code == "1 / 0" else "SystemExit: 4"
    assert f"`acme`: run: `acme.sub.run` cannot be found: {error}\n" in done.stdout


def test_what_parameters_print_does_not_reach_the_report(acme, llmctl):
    acme(field="print('noise')")
    done = llmctl("plugins", "--check", "--format", "json")
    assert (done.returncode, done.stderr) == (0, "noise\n")
    assert json.loads(done.stdout)["ok"]


@pytest.mark.parametrize("option", [["--check"], ["--format", "json"]])
def test_options_of_the_list_before_a_command(option, llmctl, tmp_path):
    done = llmctl("plugins", *option, "new", "demo")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {option[0]} has no effect on `new`\n")
    assert not list((tmp_path / "work").iterdir())


def test_json(acme, llmctl):
    acme(changes="rev=0")
    done = llmctl("plugins", "--check", "--format", "json")
    assert done.returncode == 7
    found = json.loads(done.stdout)
    assert (found["ok"], found["plugin_api"]) == (False, "1.0")
    assert found["findings"] == [
        {
            "level": "problem",
            "distribution": "acme-dist",
            "where": "acme",
            "text": "rev is 0",
            "hint": "it is a number from 1 on",
        }
    ]


@pytest.mark.parametrize(
    ("version", "requirement"), [("0.1.0", "llmctl>=0.1.0,<0.2"), ("1.9.3", "llmctl>=1.9.3,<1.10")]
)
def test_a_plugin_is_pinned_up_to_the_next_minor_version(version, requirement):
    assert pinned(version) == requirement
    specifier = requirement.removeprefix("llmctl")
    assert fits(specifier, version)
    major, minor, _ = version.split(".")
    assert not fits(specifier, f"{major}.{int(minor) + 1}.0")
