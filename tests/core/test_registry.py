"""Really installed plugins: working, broken, misspelled, contested, disabled. None hurts another."""

import json
import subprocess
import sys

import pytest

STAGE = """
    from llmctl import Out, Stage, hookimpl

    @hookimpl
    def register_stages():
        return [Stage(name="{name}", help="Does {name}.", params="{module}_params:P", run="{module}_run:run",
                      outputs={{"out": Out("files")}})]
"""

STAGES = "from llmctl import Stage, hookimpl\n@hookimpl\ndef register_stages():\n    return "

BROKEN = {
    "import error": (
        "import a_module_that_is_not_there",
        "ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
    ),
    "syntax error": ("def f(:\n    pass", "SyntaxError"),
    "raises": ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    "exits": ("import sys\nsys.exit('bye')", "SystemExit: bye"),
    "misspelled hook": (
        "from llmctl import hookimpl\n@hookimpl\ndef register_stage():\n    return []",
        "unknown hook `register_stage`, did you mean `register_stages`?",
    ),
    "wrong arguments": (
        "from llmctl import hookimpl\n@hookimpl\ndef log_metrics(stage, numbers):\n    pass",
        "{'numbers'}",
    ),
    "no list": (
        "from llmctl import hookimpl\n@hookimpl\ndef register_stages():\n    return None",
        "register_stages must return a list of Stage, it returned NoneType None",
    ),
    "no stage": (
        "from llmctl import hookimpl\n@hookimpl\ndef register_stages():\n    return ['sft']",
        "register_stages must return a list of Stage, it holds str 'sft'",
    ),
    "bad stage name": (
        STAGES + "[Stage(name='My Stage', help='', params='', run='')]",
        "'My Stage'",
    ),
    "name of a core command": (
        STAGES + "[Stage(name='run', help='', params='', run='')]",
        "the name 'run' is a command of llmctl",
    ),
    "name of a section": (
        STAGES + "[Stage(name='vars', help='', params='', run='')]",
        "the name 'vars' is a section of spec files",
    ),
    "unknown field": (
        STAGES + "[Stage(name='x', help='', params='', run='', retries=3)]",
        "Stage has no field `retries` in llmctl 0.1.0",
    ),
    "unknown field of a port": (
        "from llmctl import In\nIn('dataset.text', default=3)",
        "In has no field `default` in llmctl 0.1.0",
    ),
    "missing fields": (STAGES + "[Stage(name='x', help='')]", "Stage lacks `params` and `run`"),
    "type that is none": (
        "from llmctl import In\n" + STAGES + "[Stage(name='x', help='', params='', run='', inputs={'a': In(['x'])})]",
        "stage `x`, In `a`: ['x'] is no artifact type, which is a text like dataset.text",
    ),
    "misspelled type": (
        "from llmctl import Out\n"
        + STAGES
        + "[Stage(name='x', help='', params='', run='', outputs={'a': Out('A B')})]",
        "'A B' is no artifact type",
    ),
    "no type": (
        "from llmctl import Out\n" + STAGES + "[Stage(name='x', help='', params='', run='', outputs={'a': Out()})]",
        "stage `x`, Out `a`: give either a type or same_as",
    ),
    "input without a type": (
        "from llmctl import In\n" + STAGES + "[Stage(name='x', help='', params='', run='', inputs={'a': In()})]",
        "stage `x`, In `a`: it takes no type",
    ),
    "port that is no argument": (
        "from llmctl import In\n" + STAGES + "[Stage(name='x', help='', params='', run='', inputs={'a-b': In('x')})]",
        "a port's name must match",
    ),
    "text for a port": (
        STAGES + "[Stage(name='x', help='', params='', run='', inputs={'a': 'dataset.text'})]",
        "it must be an In, not str",
    ),
    "exits in a hook": (
        "from llmctl import hookimpl\n@hookimpl\ndef register_stages():\n    raise SystemExit(0)",
        "SystemExit: 0",
    ),
    "raises what is no Exception": ("import asyncio\nraise asyncio.CancelledError('late')", "CancelledError: late"),
    "raises in a hook": (
        "from llmctl import hookimpl\n@hookimpl\ndef register_commands():\n    raise KeyError('nope')",
        "KeyError: 'nope'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_hurts_nobody(case, install, llmctl):
    source, reason = BROKEN[case]
    install("acme-broken", {"acme": "acme_broken"}, {"acme_broken.py": source})
    install("good", {"good": "good_plugin"}, {"good_plugin.py": STAGE.format(name="good", module="good")})
    shown = llmctl("--help")
    assert shown.returncode == 0
    assert "good" in shown.stdout
    assert "train-pretrain" in shown.stdout
    text = " ".join(shown.stdout.split())
    assert "Unavailable:" in text
    assert reason in text
    listed = json.loads(llmctl("plugins", "--format", "json").stdout)["plugins"]
    failures = {row["name"]: row["failure"] for row in listed}
    assert reason in failures["acme"]
    assert failures["good"] is None
    used = llmctl("acme", "--any", "thing")
    assert used.returncode == 7
    assert reason in used.stderr
    assert "acme-broken 0.1" in used.stderr
    assert "LLMCTL_DISABLE=acme-broken" in used.stderr
    assert len(used.stderr.splitlines()) == 2


def test_a_broken_plugin_can_be_hidden(install, llmctl):
    install("acme-broken", {"acme": "acme_broken"}, {"acme_broken.py": "1/0"})
    shown = llmctl("--help", env={"LLMCTL_DISABLE": "other, Acme_Broken"})
    assert "Unavailable" not in shown.stdout
    listed = llmctl("plugins", env={"LLMCTL_DISABLE": "other, Acme_Broken"}).stdout
    assert "disabled" in listed
    assert "LLMCTL_DISABLE names no installed plugin: other" in listed


def test_two_broken_plugins_of_one_name_are_both_shown(install, llmctl):
    for dist in ("one", "two"):
        install(dist, {"plugin": f"{dist}_plugin"}, {f"{dist}_plugin.py": f"raise ValueError('{dist}')"})
    shown = " ".join(llmctl("--help").stdout.split())
    assert "ValueError: one" in shown
    assert "ValueError: two" in shown


def test_a_contested_stage_is_refused_for_both(install, llmctl):
    install("thief", {"thief": "thief_plugin"}, {"thief_plugin.py": STAGE.format(name="sft", module="thief")})
    shown = llmctl("--help")
    assert shown.returncode == 0
    text = " ".join(shown.stdout.split())
    assert "registered by llmctl and by thief, so neither is used" in text
    used = llmctl("sft", "--lr", "1")
    assert used.returncode == 2
    assert "llmctl and by thief" in used.stderr
    assert "LLMCTL_DISABLE=thief" in used.stderr
    assert "Fine-tune" in llmctl("--help", env={"LLMCTL_DISABLE": "thief"}).stdout


def test_two_third_parties_contest_a_command(install, llmctl):
    source = """
        from llmctl import Command, hookimpl
        @hookimpl
        def register_commands():
            return [Command(name="hello", help="Greets.", target="x:y")]
    """
    install("one", {"one": "one_plugin"}, {"one_plugin.py": source})
    install("two", {"two": "two_plugin"}, {"two_plugin.py": source})
    used = llmctl("hello")
    assert used.returncode == 2
    assert "registered by one and by two" in used.stderr
    assert "LLMCTL_DISABLE=one or LLMCTL_DISABLE=two" in used.stderr
    refused = json.loads(llmctl("plugins", "--format", "json").stdout)["refused"]
    assert refused[0]["name"] == "hello"
    assert refused[0]["distributions"] == ["one", "two"]


def test_a_stage_and_a_command_contest_a_name_too(install, llmctl):
    install("one", {"one": "one_plugin"}, {"one_plugin.py": STAGE.format(name="hello", module="x")})
    source = """
        from llmctl import Command, hookimpl
        @hookimpl
        def register_commands():
            return [Command(name="hello", help="Greets.", target="x:y")]
    """
    install("two", {"two": "two_plugin"}, {"two_plugin.py": source})
    assert llmctl("hello").returncode == 2


def test_a_print_at_import_does_not_reach_stdout(install, llmctl):
    install("chatty", {"chatty": "chatty"}, {"chatty.py": "print('hello from an import')"})
    done = llmctl("plugins", "--format", "json")
    json.loads(done.stdout)
    assert "hello from an import" in done.stderr


def test_a_print_in_a_hook_does_not_reach_stdout(install, llmctl):
    source = STAGE.format(name="good", module="good")
    source = source.replace("return [", "print('from a hook')\n        return [")
    install("chatty", {"chatty": "chatty"}, {"chatty.py": source})
    done = llmctl("plugins", "--format", "json")
    assert "good" in {stage for row in json.loads(done.stdout)["plugins"] for stage in row["stages"]}
    assert "from a hook" in done.stderr


def test_an_entry_point_that_is_no_import_string(install, llmctl):
    install("odd", {"odd": "not a module!"}, {})
    assert llmctl("--help").returncode == 0
    used = llmctl("odd")
    assert used.returncode == 7
    assert "the entry point `odd = not a module!` is no import string" in used.stderr


def test_a_broken_plugin_for_another_llmctl_says_so(install, llmctl):
    source = STAGES + "[Stage(name='x', help='', params='', run='', retries=3)]"
    for dist, asked in (("new", "llmctl (>=9.1)"), ("fit", "llmctl>=0.1"), ("other", "llmctl-extras>=9")):
        install(dist, {dist: f"{dist}_p"}, {f"{dist}_p.py": source}, metadata=f"Requires-Dist: {asked}\n")
    assert "in llmctl 0.1.0; it asks for llmctl>=9.1, this is 0.1.0" in llmctl("new").stderr
    assert "asks for" not in llmctl("fit").stderr + llmctl("other").stderr


def test_sections_of_specs_cannot_be_taken_by_stages():
    from llmctl.spec import skeleton
    from llmctl.spec.fields import field_names
    from llmctl.stage import SECTIONS

    assert {"include", *field_names(skeleton.PipelineModel), *skeleton.FileModel.later} == set(SECTIONS)


def test_a_damaged_distribution_hurts_nobody(install, site, llmctl):
    install("acme", {"acme": "acme_plugin"}, {"acme_plugin.py": STAGE.format(name="acme", module="acme")})
    (site / "acme-0.1.dist-info/METADATA").unlink()
    assert "Does acme." in llmctl("--help").stdout
    done = llmctl("plugins")
    assert (done.returncode, done.stderr) == (0, "")
    assert "unknown" in done.stdout


LACKING = """
    from llmctl import Command, Stage, hookimpl
    @hookimpl
    def register_stages():
        return [Stage(name="lacks", help="Lacks.", params="lacks_impl:P", run="{module}:run", extra="{extra}")]
    @hookimpl
    def register_commands():
        return [Command(name="lack", help="Lacks.", target="{module}:x", extra="{extra}")]
    @hookimpl
    def open_generator(artifact, options):
        import a_heavy_library
"""


@pytest.mark.parametrize(
    ("extra", "line"),
    [("fast", "pip install 'acme-dist[fast]'"), ("train", "pip install 'llmctl[train]'")],
    ids=["an extra of its own", "an extra of llmctl"],
)
def test_the_install_line_names_the_distribution_that_has_the_extra(extra, line, install, llmctl, llmctl_env):
    files = {
        "lacks.py": LACKING.format(module="lacks_impl", extra=extra),
        "lacks_impl.py": "import a_heavy_library",
    }
    install("acme-dist", {"lacks": "lacks"}, files, metadata="Provides-Extra: fast\n")
    for command in ("lack", "lacks"):
        done = llmctl(command)
        assert done.returncode == 7
        assert done.stderr.endswith(f"needs the module `a_heavy_library`\n  hint: {line}\n")
    code = (
        "from pathlib import Path\nfrom llmctl import Artifact, MachineError\n"
        "from llmctl.registry import get_registry\n"
        "try: get_registry().open_generator(Artifact(Path('x'), 'model.x'))\n"
        "except MachineError as error: print(error.hint)"
    )
    assert in_child(code, llmctl_env) == line + "\n"


def test_a_missing_module_of_the_plugin_itself_is_a_bug(install, llmctl):
    files = {"lacks/__init__.py": LACKING.format(module="lacks.not_there", extra="fast")}
    install("acme-dist", {"lacks": "lacks"}, files, metadata="Provides-Extra: fast\n")
    done = llmctl("lack")
    assert done.returncode == 1
    assert "pip install" not in done.stderr
    assert "No module named 'lacks.not_there'" in done.stderr


# -- hooks ---------------------------------------------------------------------------------------------------------


def in_child(code, llmctl_env):
    done = subprocess.run([sys.executable, "-c", code], env=llmctl_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hook_register_stages(install, llmctl_env):
    install("good", {"good": "good_plugin"}, {"good_plugin.py": STAGE.format(name="good", module="good")})
    code = "from llmctl.registry import get_registry as g\nprint(g().stages['good'].help, g() is g())"
    assert in_child(code, llmctl_env) == "Does good. True\n"


def test_hook_register_commands(install, llmctl):
    files = {
        "hi_plugin.py": """
            from llmctl import Command, hookimpl
            @hookimpl
            def register_commands():
                return [Command(name="hi", help="Greets.", target="hi_impl:hi"),
                        Command(name="heavy", help="Needs much.", target="heavy_impl:x", extra="train"),
                        Command(name="wrong", help="No command.", target="hi_impl:name")]
        """,
        "hi_impl.py": """
            import click
            name = "x"
            @click.command()
            @click.argument("who")
            def hi(who):
                click.echo(f"hi {who}")
        """,
        "heavy_impl.py": "import a_heavy_library",
    }
    install("hi", {"hi": "hi_plugin"}, files)
    assert "Greets." in llmctl("--help").stdout
    assert llmctl("hi", "you").stdout == "hi you\n"
    missing = llmctl("heavy")
    assert missing.returncode == 7
    assert (
        missing.stderr
        == "error: `llmctl heavy` needs the module `a_heavy_library`\n  hint: pip install 'llmctl[train]'\n"
    )
    assert llmctl("wrong").returncode == 1


def test_hook_open_generator(install, llmctl_env, site):
    install(
        "gen",
        {"gen": "gen_plugin"},
        {
            "gen_plugin.py": """
                from llmctl import Stage, hookimpl
                @hookimpl
                def register_stages():
                    return [Stage(name="gen", help="", params="", run="", extra="rag")]
                @hookimpl
                def open_generator(artifact, options):
                    if artifact.type == "model.mine":
                        return ("opened", options["threads"])
                    if artifact.type == "model.heavy":
                        import a_heavy_library
            """
        },
    )
    code = """
from pathlib import Path
from llmctl import Artifact, InputError, MachineError
from llmctl.registry import get_registry
print(get_registry().open_generator(Artifact(Path("x"), "model.mine"), threads=3))
for kind in ("model.none", "model.heavy"):
    try:
        get_registry().open_generator(Artifact(Path("x"), kind))
    except (InputError, MachineError) as error:
        print(type(error).__name__, error.message, "|", error.hint)
"""
    lines = in_child(code, llmctl_env).splitlines()
    assert lines[0] == "('opened', 3)"
    assert lines[1].startswith("InputError nothing installed can generate from x (model.none)")
    assert lines[2] == "MachineError opening `x` needs the module `a_heavy_library` | pip install 'llmctl[rag]'"


HOOK = "from llmctl.registry import get_registry\nhook = get_registry().hook\n"


def test_hook_run_stage(install, llmctl_env):
    source = """
        from llmctl import hookimpl
        @hookimpl(wrapper=True)
        def run_stage(stage, context, call):
            print("before", stage)
            result = yield
            print("after", result)
            return result
        @hookimpl(specname="run_stage")
        def runs(stage, context, call):
            call()
            return True
    """
    install("wrap", {"wrap": "wrap_plugin"}, {"wrap_plugin.py": source})
    code = HOOK + "print(hook.run_stage(stage='s', context=None, call=lambda: print('works')))"
    assert in_child(code, llmctl_env).splitlines() == ["before s", "works", "after True", "True"]


def test_hook_log_metrics(install, llmctl_env):
    source = (
        "from llmctl import hookimpl\n@hookimpl\ndef log_metrics(stage, values, step):\n    print(stage, values, step)"
    )
    install("one", {"one": "one_sink"}, {"one_sink.py": source})
    install("two", {"two": "two_sink"}, {"two_sink.py": source})
    code = HOOK + "hook.log_metrics(stage='s', values={'loss': 1.0}, step=2)"
    assert in_child(code, llmctl_env).splitlines() == ["s {'loss': 1.0} 2"] * 2


# -- origin --------------------------------------------------------------------------------------------------------


ORIGIN = "from llmctl.registry import get_registry\nprint(get_registry().origin({!r}))"


def test_origin_of_a_built_in_stage(llmctl_env):
    text = in_child(ORIGIN.format("sft"), llmctl_env)
    assert "dist='llmctl', version='0.1.0'" in text
    assert "source_digest=''" in text


def test_origin_of_an_editable_plugin_follows_its_source(install, llmctl_env, site):
    files = {
        "acme/__init__.py": STAGE.format(name="acme", module="acme"),
        "acme/run.py": "A = 1\n",
        "acme/data.txt": "x",
    }
    install("acme", {"acme": "acme"}, files)
    first = in_child(ORIGIN.format("acme"), llmctl_env)
    assert "dist='acme', version='0.1', editable=True, source_digest='sha256:" in first
    (site / "acme/data.txt").write_text("other")
    assert in_child(ORIGIN.format("acme"), llmctl_env) == first
    (site / "acme/run.py").write_text("A = 2\n")
    assert in_child(ORIGIN.format("acme"), llmctl_env) != first


def test_origin_of_an_installed_plugin_has_no_digest(install, llmctl_env):
    install("acme", {"acme": "acme_plugin"}, {"acme_plugin.py": STAGE.format(name="acme", module="acme")}, record=True)
    assert "editable=False, source_digest=''" in in_child(ORIGIN.format("acme"), llmctl_env)
