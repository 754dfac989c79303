"""`llmctl plugins test` and `--record` refuse what they could only answer by leaving something out."""

import json

import pytest


@pytest.fixture
def file(tmp_path):
    return tmp_path / "work/llmctl-plugin.json"


def record(llmctl, *args):
    return llmctl("plugins", "test", "odd-dist", "--record", *args)


# -- what is recorded stays recorded ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"imports": "1/0"}, "odd-dist is not recorded: the plugin `odd` of odd-dist 0.1 is broken: ZeroDivisionError"),
        ({"params_imports": "import sys; sys.exit(4)"}, "`odd.params:OddParams` cannot be imported: SystemExit: 4"),
        (None, "`odd` is recorded, and odd-dist does not offer it any more"),
    ],
    ids=["plugin", "parameters", "gone"],
)
def test_what_cannot_be_asked_is_not_taken_out_of_the_record(changes, reason, odd, llmctl, file, site):
    odd()
    assert record(llmctl).returncode == 0
    before = file.read_bytes()
    if changes is None:
        path = site / "odd/__init__.py"
        path.write_text(path.read_text().replace('name="odd"', 'name="even"'))
    else:
        odd(**changes)
    refused = record(llmctl)
    assert refused.returncode == 3
    assert reason in refused.stderr
    assert "nothing was written to llmctl-plugin.json" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert file.read_bytes() == before
    if changes is None:
        file.write_text(file.read_text().replace('"odd": {', '"even": {'))  # by hand, as the hint says
        assert record(llmctl).returncode == 0


@pytest.mark.parametrize("where", [".", "no/such/file.json"])
def test_a_record_that_cannot_be_written(where, odd, llmctl):
    odd()
    done = record(llmctl, "--file", where)
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: cannot write {where}: ")
    assert "hint: give another --file" in done.stderr


@pytest.mark.parametrize("option", [["--stage", "odd"], ["--only", "commit"], ["--kills", "4"], ["--format", "json"]])
def test_options_without_effect_on_a_record(option, odd, llmctl, file):
    odd()
    done = record(llmctl, *option)
    assert (done.returncode, file.exists()) == (2, False)
    assert done.stderr.startswith(f"error: {option[0]} has no effect beside --record\n")


# -- what is named is tested ------------------------------------------------------------------------------------------


def test_every_stage_that_is_named_must_be_there(odd, llmctl):
    odd()
    done = llmctl("plugins", "test", "odd-dist", "--stage", "odd", "--stage", "od", "--only", "declaration")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: odd-dist has no stage `od`\n  hint: did you mean `odd`?\n"


def test_a_file_about_stages_that_are_not_there(odd, llmctl, file):
    odd()
    content = {"examples": {"odd": [{}], "od": [{}]}, "unread": {"od": {"x": "y"}}}
    file.write_text(json.dumps({"llmctl-plugin": 1, "distribution": "odd-dist", **content}))
    done = llmctl("plugins", "test", "--only", "declaration")
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "ok      odd  declaration",
        "FAILED  od  file         llmctl-plugin.json has examples and unread of `od`, which is no stage of odd-dist; "
        "did you mean `odd`?",
        "2 checks, 1 failed",
    ]
    only = llmctl("plugins", "test", "--only", "declaration", "--stage", "odd")
    assert only.returncode == 0, "another stage was asked about"


def test_the_file_of_another_distribution(odd, llmctl, file):
    odd()
    file.write_text(json.dumps({"llmctl-plugin": 1, "distribution": "even-dist"}))
    done = llmctl("plugins", "test", "odd-dist", "--only", "declaration", "--file", "llmctl-plugin.json")
    assert done.returncode == 2
    assert "llmctl-plugin.json is that of `even-dist`, which is not tested" in done.stderr


# -- parameters that cannot be imported -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["import sys; sys.exit(4)", "import sys; sys.exit(0)", "1 / 0"])
def test_parameters_that_cannot_be_imported_fail_every_check_that_needs_them(end, odd, llmctl, file):
    odd()
    assert record(llmctl).returncode == 0
    odd(params_imports=f"print('noise')\n{end}")
    names = ("declaration", "start-up", "revision", "parameters")
    only = [word for name in names for word in ("--only", name)]
    done = llmctl("plugins", "test", *only, "--format", "json")
    assert done.returncode == 3, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["check"], row["status"]) for row in rows] == [(name, "failed") for name in names]
    assert all("cannot be imported: " in row["reason"] for row in rows), rows
