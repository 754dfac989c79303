"""Every check of the conformance kit passes a stage that is right and fails one that is wrong in just that."""

import json
from pathlib import Path

import pytest

from llmctl.testing import conformance, imports
from llmctl.testing.conformance import CHECKS

OK = ("ok", "")


def test_a_stage_that_is_right_passes_every_check(odd, llmctl, tmp_path):
    odd()
    assert llmctl("plugins", "test", "--record", "odd-dist").returncode == 0
    done = llmctl("plugins", "test", "--kills", "1", timeout=120)  # the file names the distribution
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line.split()[:3] for line in lines[:-1]] == [["ok", "odd", str(check)] for check in CHECKS]
    assert "asked 5 times, stopped at 1 and 3" in done.stdout
    assert lines[-1] == "9 checks, 0 failed"


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"fields": 'knob: int = Field(1, description="turns nothing")'}, "`knob`"),
        ({"run": [(" + params.inner.depth", " + bool(params.inner)")]}, "`inner.depth`"),
        ({"run": [("params.rows + params.inner.depth", "7")]}, "`inner`, `inner.depth`, `rows`"),
    ],
    ids=["one", "nested", "several"],
)
def test_a_knob_that_nobody_reads_is_named(changes, missed, odd, check):
    odd(**changes)
    status, reason = check("parameters")
    assert status == "failed"
    assert reason.startswith(f"run does not read {missed} in any example")


def test_a_parameter_may_be_read_in_another_example(odd, check):
    knob = 'knob: int = Field(1, description="turns something when there are many rows")'
    odd(fields=knob, run=[("rows = list", "params.rows > 30 and params.knob\n    rows = list")])
    assert check("parameters")[0] == "failed"
    assert check("parameters", examples=[{}, {"params": {"rows": 31}}]) == OK


def test_parameters_that_are_passed_on_as_a_whole_are_read(odd, check):
    odd(fields='knob: int = Field(1, description="x")', end="params.model_dump()")
    assert check("parameters") == OK


def test_a_reason_may_stand_for_an_example_but_not_for_ever(odd, check):
    odd(fields='knob: int = Field(1, description="x")')
    assert check("parameters", unread={"knob": "needs a GPU"}) == ("ok", "knob: needs a GPU")
    odd(fields='knob: int = Field(1, description="x")', end="params.knob")
    assert check("parameters") == ("failed", "`unread` names `knob`, which is read")
    assert check("parameters", unread={"knop": "?"}) == ("failed", "`unread` names `knop`, which is no parameter")


def test_a_wrong_example_is_a_failure(odd, check):
    odd()
    status, reason = check("parameters", examples=[{"params": {"rowz": 1}}])
    assert status == "failed"
    assert "the parameters of an example are wrong" in reason


# -- revision ---------------------------------------------------------------------------------------------------------


def record(llmctl):
    return llmctl("plugins", "test", "odd-dist", "--record")


def test_a_default_that_changed_without_saying_so_fails(odd, check, llmctl):
    odd()
    assert record(llmctl).returncode == 0
    assert check("revision") == OK
    odd(rows=30)
    status, reason = check("revision")
    assert status == "failed"
    assert reason == "the default of `rows` went from 20 to 30: raise rev to 2, or old results pass for new ones"
    refused = record(llmctl)
    assert refused.returncode == 3
    assert "`odd` is not recorded: the default of `rows`" in refused.stderr
    odd(rows=30, rev=2)
    assert check("revision") == ("ok", "rev 1 → 2; record it: llmctl plugins test --record")
    assert record(llmctl).stdout == "llmctl-plugin.json: 1 stages of odd-dist, 1 changed\n"
    assert check("revision") == OK
    odd(rows=30, rev=1)
    assert check("revision")[1].startswith("rev went back from 2 to 1")


KNOB = 'knob: int = Field(1, description="new")'


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({"fields": KNOB}, {}, "the parameter `knob` is gone"),
        ({}, {"depth": 1}, "the default of `inner.depth` went from 0 to 1"),
        ({"fields": KNOB.replace("1", "1, affects='nothing'")}, {"fields": KNOB}, "`knob` affected nothing and now"),
        ({"fields": KNOB}, {"fields": "knob: int = Field(description='x')"}, "of `knob` went from 1 to no default"),
        (
            {"more": ", outputs={'text': Out('dataset.text')}"},
            {"more": ", outputs={'text': Out('files')}"},
            "the output `text` went from dataset.text to files",
        ),
    ],
    ids=["removed", "nested", "affects", "required", "output"],
)
def test_other_changes_that_need_a_higher_rev(before, after, reason, odd, check, llmctl, site):
    def put(changes):
        odd(**changes)
        if "more" in changes:
            path = site / "odd/__init__.py"
            start = (
                path.read_text().index("outputs={"),
                path.read_text().index("},\n", path.read_text().index("outputs={")),
            )
            text = path.read_text()
            path.write_text(text[: start[0]] + "**{}" + text[start[1] + 1 :])

    put(before)
    assert record(llmctl).returncode == 0
    put(after)
    status, found = check("revision")
    assert status == "failed"
    assert reason in found


@pytest.mark.parametrize(
    "after",
    [{"fields": KNOB}, {"every": 5}, {"fields": "knob: int = Field(description='needed')"}],
    ids=["new parameter", "default of what affects nothing", "new required parameter"],
)
def test_changes_that_leave_old_results_valid(after, odd, check, llmctl):
    odd()
    assert record(llmctl).returncode == 0
    odd(**after)
    status, reason = check("revision")
    assert status == "ok"
    assert reason == "what changed leaves old results valid; record it: llmctl plugins test --record"


def test_without_a_file_there_is_nothing_to_compare_with(odd, check):
    odd()
    status, reason = check("revision", file=False)
    assert (status, reason[:40]) == ("failed", "there is no llmctl-plugin.json here to c")
    assert check("revision")[1].startswith("the stage is not recorded")


# -- commit, determinism ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("[path.unlink() for path in ctx.output('text').iterdir()]", "the output `text` is no valid dataset.text"),
        ("(ctx.output('text') / 'link').symlink_to('/etc/hosts')", "`link` is a symbolic link"),
        ("(ctx.output('text') / 'model.pkl').write_text('x')", "model.pkl is a pickle"),
        ("(ctx.output('text') / 'x.json').write_text('NaN')", "x.json is no valid JSON"),
        ("(ctx.output('text').parent / 'stray').write_text('x')", "it wrote `stray` beside its outputs"),
        ("1 / 0", "run raised ZeroDivisionError"),
    ],
    ids=["empty", "link", "pickle", "json", "stray", "raises"],
)
def test_outputs_that_could_not_be_committed(end, reason, odd, check):
    odd(end=end)
    status, found = check("commit")
    assert status == "failed"
    assert reason in found


def test_an_output_that_no_example_makes_is_remarked(odd, check):
    odd(
        fields="def outputs(self):\n        return {'text'}",
        run=[("ctx.report", "ctx.wants('metrics') and ctx.report")],
    )
    assert check("commit") == ("ok", "in no example: the output metrics")


def test_a_time_in_an_output_is_no_determinism(odd, check):
    odd()
    assert check("determinism") == OK, "the time in the metrics may differ"
    odd(end="(ctx.output('text') / 'time.txt').write_text(str(time.time_ns()))")
    assert check("determinism") == ("failed", "the output `text` has other bytes the second time: time.txt")


# -- resume, kill -----------------------------------------------------------------------------------------------------


def test_a_stage_that_never_asks_is_no_failure(odd, check):
    odd(run=[("if ctx.should_stop():", "if False:")])
    status, reason = check("resume")
    assert status == "not applicable"
    assert reason.startswith("not resumable")


def test_a_stage_that_goes_on_when_told_to_stop(odd, check):
    odd(run=[("if ctx.should_stop():", "if ctx.should_stop() and False:")])
    assert check("resume") == ("failed", "told to stop at the 1st ctx.should_stop(), it went on to the end")


def test_a_stage_that_forgets_what_it_had(odd, check):
    odd(checkpoint=CHECKPOINT_OF_NOTHING)
    assert check("resume") == ("failed", "stopped at the 1st checkpoint and run again, the output `text` differs")


@pytest.mark.parametrize(
    "changes",
    [
        {"run": [("json.loads(state.read_text()) if state.exists() else []", "[]")]},
        {"checkpoint": "ctx.checkpointed(len(kept))"},
    ],
    ids=["kept and not read", "said and not kept"],
)
def test_a_stage_that_says_it_resumes_and_begins_anew(changes, odd, check):
    odd(**changes)
    reason = "stopped at the 3rd checkpoint and run again, it begins anew: its work is lost"
    assert check("resume") == ("failed", reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"checkpoint": "pass"}, "not resumable: it stops when it is asked to, and keeps nothing in ctx.resume_dir"),
        ({"every": 20}, "it asks once, which does not show whether work is kept: give a larger example"),
    ],
    ids=["keeps nothing", "asks once"],
)
def test_what_does_not_show_that_work_is_kept_is_no_pass(changes, reason, odd, check):
    odd(**changes)
    assert check("resume") == ("not applicable", reason)


def test_two_questions_are_enough_to_show_it(odd, check):
    odd(every=10)
    assert check("resume") == ("ok", "asked 2 times, stopped at 1 and 2")


CHECKPOINT_OF_NOTHING = """
            ctx.resume_dir.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps(["x"] * len(kept)))
"""
TORN = """
            ctx.resume_dir.mkdir(parents=True, exist_ok=True)
            with state.open("w") as file:
                file.write(json.dumps(kept)[:-3])
                file.flush()
                ctx.progress(len(kept))
                time.sleep(1.0 if len(kept) == 10 else 0.0)
                file.write(json.dumps(kept)[-3:])
"""


@pytest.mark.slow
def test_a_checkpoint_that_a_kill_can_tear(odd, check):
    odd(checkpoint=TORN, every=10)
    assert check("resume")[0] == "ok", "a stop that is asked for does not show it"
    status, reason = check("kill", "--kills", "1")
    assert status == "failed"
    assert "after 1 kills it does not run again" in reason
    assert "JSONDecodeError" in reason


@pytest.mark.slow
def test_a_process_that_is_left_behind(odd, check):
    daemon = "__import__('subprocess').Popen(['sleep', '60'], start_new_session=True)"
    odd(run=[("state = ctx", f"{daemon}\n    state = ctx")])
    status, reason = check("kill", "--kills", "1")
    assert status == "failed"
    assert "after kill -9 a process is left" in reason
    assert "sleep 60" in reason


# -- start-up, effects, declaration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"imports": "import numpy"}, "importing `odd` loads numpy"),
        ({"imports": "import pydantic"}, "importing `odd` loads pydantic"),
        ({"imports": "sum(range(10_000_000))"}, "ms of CPU, 15 ms are allowed"),
        ({"imports": "import os; os.environ['X_ODD'] = '1'"}, "importing `odd` changes the environment"),
        ({"imports": "import os; os.chdir('/')"}, "importing `odd` changes the working directory"),
        ({"imports": "import logging; logging.basicConfig()"}, "importing `odd` changes the root logger"),
        ({"imports": "print('hello')"}, "importing `odd` prints 'hello'"),
        ({"params_imports": "import numpy"}, "importing `odd.params` loads numpy"),
        ({"params_imports": "1 / 0"}, "`odd.params` cannot be imported: ZeroDivisionError"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_imports_that_cost_or_change_something(changes, reason, odd, check):
    odd(**changes)
    status, found = check("start-up")
    assert status == "failed"
    assert reason in found


def test_the_heavy_modules_are_those_of_the_start_up_test():
    text = (Path(__file__).parents[1] / "core/test_startup.py").read_text()
    assert f"HEAVY = {json.dumps(list(imports.HEAVY))[1:-1].join('()')}" in text


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("Path('stray.txt').write_text('x')", "it wrote `stray.txt` into the current directory"),
        ("next(text.path.iterdir()).open('ab').write(b'x')", "it changed its input "),
        ("os.chdir('/')", "run changes the working directory"),
    ],
    ids=["directory", "input", "chdir"],
)
def test_effects_beside_the_outputs(end, reason, odd, check):
    odd(end=end)
    status, found = check("effects")
    assert status == "failed"
    assert reason in found


def test_prints_are_no_effect(odd, check):
    odd(end="print('a line'); os.write(1, b'another')")
    assert check("effects") == OK


def test_a_declaration_that_the_check_of_plugins_refuses(odd, check):
    odd(more=", headline='rows'")
    assert check("declaration") == ("failed", "headline is a text, not a tuple of texts")


def test_a_stage_that_acts_on_the_world_is_not_run(odd, check):
    odd(more=", effect=True")
    for name in ("commit", "kill", "effects"):
        assert check(name) == ("not applicable", "it acts on the world, so it is not run")


# -- in a suite -------------------------------------------------------------------------------------------------------


def test_check_stage_raises_what_a_test_needs_to_know(tmp_path):
    from llmctl_tokenize import TOKENIZE

    def checks(*names):
        return [check for check in CHECKS if check.name in names]

    good = conformance.check_stage(
        TOKENIZE, {"vocab_size": 300}, directory=tmp_path / "good", only=checks("commit", "revision", "resume")
    )
    assert [outcome.status for outcome in good] == ["not applicable", "ok", "ok"]
    with pytest.raises(AssertionError, match="stage `tokenize`: commit: run raised StageError: the text allows"):
        conformance.check_stage(TOKENIZE, directory=tmp_path / "bad", only=checks("commit"))
