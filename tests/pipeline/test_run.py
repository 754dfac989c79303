"""Whole runs of tiny stages through the real command line: caching, cut-off, gates, skipping, selection, failure."""

import json
import resource
import shutil
import subprocess
import sys

import pytest

CHAIN = """
a: {uses: make}
b: {uses: upper, inputs: {text: a}}
s: {uses: score, inputs: {text: b}, gates: [{metric: score, min: 0.5}]}
c: {uses: count, inputs: {text: b}, needs: [s]}
"""


@pytest.fixture(autouse=True)
def _plugin(fake_stages):
    return fake_stages


def artifacts(work):
    return sorted(path.name for path in (work / ".llmctl/store/artifacts/sha256").glob("*/*"))


def test_a_second_run_does_nothing(llmctl, spec, work, actions, events):
    first = llmctl("run", spec(CHAIN))
    assert first.returncode == 0, first.stderr
    assert actions() == dict.fromkeys("abcs", "run")
    before = artifacts(work)
    second = llmctl("run", "p.yaml")
    assert second.returncode == 0
    assert actions() == dict.fromkeys("abcs", "cached")
    assert artifacts(work) == before
    rows = [line.split() for line in second.stdout.splitlines()[1:5]]
    assert [row[0] for row in rows] == ["a", "b", "s", "c"]
    assert [row[1:3] for row in rows][2] == ["score", "1"]
    assert second.stdout.count("cached") == 4
    assert "gates: 1 of 1 passed" in second.stdout
    assert [event["seq"] for event in events()] == list(range(len(events())))
    assert {event["type"] for event in events()} >= {"run.start", "plan", "stage.cached", "gate", "run.end"}


def test_a_cached_run_needs_little_cpu(llmctl, spec):
    assert llmctl("run", spec(CHAIN)).returncode == 0

    def cpu():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert llmctl("run", "p.yaml").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu() for _ in range(3)) < 1.0


def test_a_run_imports_nothing_heavy(llmctl_env, llmctl, spec, work):
    spec(CHAIN)
    code = (
        "import sys\nfrom llmctl.cli import main\ntry:\n    main(['run', 'p.yaml'])\nexcept SystemExit as e:\n"
        "    heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "    print(e.code, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=work, env=llmctl_env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (("a.rows=4",), "absc"),
        (("a.word=b",), "absc"),
        (("b.mark=x",), "bsc"),
        (("s.score=0.7",), "s"),
        (("c.max_steps=12",), "c"),
        (("c.start=1",), "c"),
        (("a.threads=8", "b.sleep=0.01", "c.pause=0.001"), ""),
        (("a.rows=3", "a.seed=1"), ""),
    ],
)
def test_what_runs_again(change, again, llmctl, spec, actions):
    assert llmctl("run", spec(CHAIN)).returncode == 0
    done = llmctl("run", "p.yaml", *(word for text in change for word in ("--set", text)))
    assert done.returncode == 0, done.stderr
    assert {stage for stage, action in actions().items() if action == "run"} == set(again)


def test_equal_bytes_stop_the_ripple(llmctl, spec, actions):
    assert llmctl("run", spec(CHAIN)).returncode == 0
    # Another key for `a`, the same text: nothing below runs.
    assert llmctl("run", "p.yaml", "--set", "a.seed=2").returncode == 0
    assert actions() == {"a": "run", "b": "cached", "s": "cached", "c": "cached"}


def test_order_of_stages_and_spelling_do_not_matter(llmctl, spec, work, actions):
    assert llmctl("run", spec(CHAIN)).returncode == 0
    lines = CHAIN.strip().splitlines()
    spec("\n".join(reversed(lines)).replace("{uses: make}", "{uses: make, with: {seed: 1.0e+0, rows: 3}}  # why"))
    assert llmctl("run", "p.yaml").returncode == 0
    assert set(actions().values()) == {"cached"}


def test_env_is_part_of_the_key_unless_declared_otherwise(llmctl, spec, actions):
    def run(env):
        assert llmctl("run", spec(f"a: {{uses: make, env: {{{env}}}}}")).returncode == 0
        return actions()["a"]

    assert run("") == "run"
    assert run("MODE: x") == "run"
    assert run("MODE: y") == "run"
    assert run("MODE: x, TRACE: {value: '1', affects_output: false}") == "cached"


@pytest.mark.parametrize("damage", ["delete", "truncate", "manifest", "remove file"])
def test_a_damaged_artifact_is_a_miss(damage, llmctl, spec, work, actions):
    assert llmctl("run", spec("a: {uses: make}\nb: {uses: upper, inputs: {text: a}}")).returncode == 0
    before = artifacts(work)
    ref = json.loads((work / ".llmctl/store/refs/p/b.text.json").read_text())
    digits = ref["id"].removeprefix("sha256:")
    directory = work / ".llmctl/store/artifacts/sha256" / digits[:2] / digits
    data = next(directory.glob("*.gz"))
    if damage == "delete":
        shutil.rmtree(directory)
    elif damage == "truncate":
        data.chmod(0o644)
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "manifest":
        (directory / "llmctl.json").unlink()
    else:
        data.unlink()
    planned = json.loads(llmctl("plan", "p.yaml", "--format", "json").stdout)
    assert [(row["stage"], row["action"]) for row in planned] == [("a", "cached"), ("b", "run")]
    assert planned[1]["why"] == ["its artifact is gone or damaged"]
    assert llmctl("run", "p.yaml").returncode == 0
    assert actions() == {"a": "cached", "b": "run"}
    assert artifacts(work) == before
    assert llmctl("show", "p/b", "--verify").returncode == 0


def test_a_failed_stage_is_tried_again_and_its_dependants_wait(llmctl, spec, actions, work):
    spec("a: {uses: make}\nw: {uses: wrong, with: {how: stage}}\nx: {uses: count, needs: [w]}\ny: {uses: count}")
    for _ in range(2):
        done = llmctl("run", "p.yaml")
        assert done.returncode == 3
        assert actions()["w"] == "run"
        assert actions()["x"] == "skipped"
        error = done.stderr.strip().splitlines()[-2:]
        assert error[0] == "error: `w`: parity missed"
        assert error[1].startswith("  hint: look at it; log: ")
        log = error[1].rpartition("log: ")[2]
        assert log.endswith("logs/w.log")
        assert "parity missed" in (work / log).read_text()
    assert actions()["y"] == "cached"


# -- gates ------------------------------------------------------------------------------------------------------------

GATED = """
a: {uses: make}
s: {uses: score, inputs: {text: a}, with: {score: 0.4}, gates: [{metric: score, min: 0.5}], output: ./good}
d: {uses: upper, inputs: {text: a}, needs: [s]}
e: {uses: count, needs: [d]}
f: {uses: count, inputs: {text: a}}
"""


def test_a_failing_gate_stops_its_dependants_only(llmctl, spec, actions, events, work):
    for action in ("run", "cached"):
        done = llmctl("run", spec(GATED))
        assert done.returncode == 4
        assert actions() == {"a": action, "s": action, "d": "skipped", "e": "skipped", "f": action}
        reasons = {event["stage"]: event["reason"] for event in events() if event["type"] == "stage.skipped"}
        assert reasons == {"d": "a gate of `s` failed", "e": "`d` was skipped"}
        assert "error: gate failed: `s`: score is 0.4, must be >= 0.5" in done.stderr
        assert "gates: 0 of 1 passed" in done.stdout
    assert not (work / "good").exists()  # a result that missed its gate is not exported
    assert llmctl("show", "p/s").returncode == 0  # but its numbers are kept


def test_gates_as_warnings(llmctl, spec, actions):
    done = llmctl("run", spec(GATED), "--gates", "warn")
    assert done.returncode == 0
    assert set(actions().values()) == {"run"}
    assert "gate missed: `s`: score is 0.4" in done.stderr
    spec(GATED.replace("min: 0.5}", "min: 0.5, on_fail: warn}"))
    assert llmctl("run", "p.yaml").returncode == 0


def test_a_missing_metric_fails_the_gate_and_lists_what_there_is(llmctl, spec):
    done = llmctl("run", spec(GATED.replace("metric: score", "metric: accuracy")))
    assert done.returncode == 4
    assert "`s` reports no number `accuracy`; it has fine, score" in done.stderr


@pytest.mark.parametrize(
    ("score", "limit", "code"),
    [(0.88, "max_drop: 0.02", 0), (0.87, "max_drop: 0.02", 4), (0.92, "max_rise: 0.02", 0), (0.93, "max_rise: 0.02", 4)],
)
def test_a_gate_against_a_baseline(score, limit, code, llmctl, spec, events):
    spec(f"""
a: {{uses: make}}
base: {{uses: score, inputs: {{text: a}}, with: {{score: 0.9}}}}
new: {{uses: score, inputs: {{text: a}}, with: {{score: {score}}},
  gates: [{{metric: score, baseline: base.metrics, {limit}}}]}}
""")
    assert llmctl("run", "p.yaml").returncode == code
    (gate,) = [event for event in events() if event["type"] == "gate"]
    assert gate["ok"] is (code == 0)
    assert gate["limit"] == pytest.approx(0.88 if "drop" in limit else 0.92)


def test_a_baseline_without_the_metric(llmctl, spec):
    spec("""
a: {uses: make}
base: {uses: score, inputs: {text: a}, with: {name: other}}
new: {uses: score, inputs: {text: a}, gates: [{metric: score, baseline: base.metrics, max_drop: 0.1}]}
""")
    done = llmctl("run", "p.yaml")
    assert done.returncode == 4
    assert "the baseline of `new` has no number `score`: base.metrics; it has fine, other" in done.stderr


# -- selection and effects --------------------------------------------------------------------------------------------


def test_effects_run_only_when_named_and_every_time(llmctl, spec, work, actions):
    spec("a: {uses: make}\nz: {uses: make, with: {rows: 9}}\n" + "go: {uses: push, inputs: {text: a}, with: {path: pushed}}")
    assert llmctl("run", "p.yaml").returncode == 0
    assert set(actions()) == {"a", "z"}
    for times in (1, 2):
        assert llmctl("run", "p.yaml", "--to", "go").returncode == 0
        assert (work / "pushed").read_text() == "pushed\n" * times
        assert actions() == {"a": "cached", "go": "run"}


def test_until_leaves_out_what_comes_after(llmctl, spec, actions):
    assert llmctl("run", spec(CHAIN), "--until", "b").returncode == 0
    assert set(actions()) == {"a", "b"}


def test_to_takes_what_it_needs(llmctl, spec, actions):
    assert llmctl("run", spec(CHAIN), "--to", "s").returncode == 0
    assert set(actions()) == {"a", "b", "s"}


@pytest.mark.parametrize("option", ["--to", "--until"])
def test_an_unknown_stage_is_a_usage_error(option, llmctl, spec, work):
    done = llmctl("run", spec("train: {uses: make}"), option, "trian")
    assert done.returncode == 2
    assert "there is no stage `trian` in `p`" in done.stderr
    assert "did you mean `train`?" in done.stderr
    assert not (work / ".llmctl").exists()


def test_refresh_makes_everything_anew(llmctl, spec, actions):
    assert llmctl("run", spec(CHAIN)).returncode == 0
    assert llmctl("run", "p.yaml", "--cache", "refresh").returncode == 0
    assert actions() == dict.fromkeys("absc", "run")


def test_cache_off_neither_looks_nor_publishes(llmctl, spec, actions):
    for _ in range(2):
        assert llmctl("run", spec("a: {uses: make, cache: off}")).returncode == 0
        assert actions() == {"a": "run"}
    assert llmctl("run", spec("a: {uses: make}")).returncode == 0
    assert actions() == {"a": "run"}


# -- plan -------------------------------------------------------------------------------------------------------------


def test_plan_says_why(llmctl, spec, work):
    def plan(*args):
        done = llmctl("plan", "p.yaml", "--format", "json", *args)
        return {row["stage"]: (row["action"], "; ".join(row["why"])) for row in json.loads(done.stdout)}

    spec(CHAIN)
    assert plan() == dict.fromkeys("absc", ("run", "new"))
    assert not (work / ".llmctl").exists()
    assert llmctl("run", "p.yaml").returncode == 0
    assert plan() == dict.fromkeys("absc", ("cached", ""))
    changed = plan("--set", "b.mark=x", "--set", "c.start=2")
    assert changed["a"] == ("cached", "")
    assert changed["b"] == ("run", "mark default → x")
    assert changed["s"] == ("unknown", "needs the result of `b`")
    assert changed["c"] == ("run", "start default → 2")
    (work / "new.txt").write_text("z")
    spec(CHAIN.replace("a: {uses: make}", "a: {uses: make, inputs: {files: ./new.txt}}"))
    assert plan()["a"] == ("run", "input files changed (0 → 1 artifacts)")
    assert plan("--cache", "refresh")["a"] == ("run", "cache: refresh")


def test_a_new_revision_of_the_plugin_runs_again(llmctl, spec, fake_stages):
    assert llmctl("run", spec(CHAIN)).returncode == 0
    path = fake_stages / "fake_stages.py"
    path.write_text(path.read_text().replace('name="upper",', 'name="upper", rev=2,'))
    rows = json.loads(llmctl("plan", "p.yaml", "--format", "json").stdout)
    assert rows[0]["action"] == "cached"
    assert rows[1]["why"] == ["plugin rev 1 → 2"]


def test_an_editable_plugin_counts_by_its_source(llmctl, spec, fake_stages, actions):
    (fake_stages / "fake-0.1.dist-info/RECORD").unlink()
    assert llmctl("run", spec("a: {uses: make}")).returncode == 0
    path = fake_stages / "fake_stages.py"
    path.write_text(path.read_text() + "\n# changed\n")
    rows = json.loads(llmctl("plan", "p.yaml", "--format", "json").stdout)
    assert rows[0]["why"] == ["the plugin's source changed"]


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_output_is_a_plain_copy_that_follows_the_result(llmctl, spec, work, actions):
    spec("a: {uses: make, output: ./out/text}")
    assert llmctl("run", "p.yaml").returncode == 0
    files = {path.name for path in (work / "out/text").iterdir()}
    assert files == {"dataset_info.json", "train-00000-of-00001.jsonl.gz", "llmctl.json"}
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in (work / "out/text").iterdir())
    first = json.loads((work / "out/text/llmctl.json").read_text())["id"]
    (work / "out/text/dataset_info.json").unlink()
    assert llmctl("run", "p.yaml").returncode == 0
    assert actions() == {"a": "cached"}
    assert (work / "out/text/dataset_info.json").exists()
    assert llmctl("run", "p.yaml", "--set", "a.word=other").returncode == 0
    assert json.loads((work / "out/text/llmctl.json").read_text())["id"] != first
    assert [path.name for path in (work / "out").iterdir()] == ["text"]


def test_output_never_replaces_what_llmctl_did_not_write(llmctl, spec, work):
    (work / "mine").mkdir()
    (work / "mine/thesis.txt").write_text("years")
    done = llmctl("run", spec("a: {uses: make, output: ./mine}"))
    assert done.returncode == 5
    assert "exists and is no llmctl artifact" in done.stderr
    assert (work / "mine/thesis.txt").read_text() == "years"
    assert not (work / ".llmctl").exists()


def test_a_tag_names_a_result_that_passed(llmctl, spec):
    assert llmctl("run", spec("a: {uses: make, tag: best}\nb: {uses: upper, inputs: {text: a@best}, needs: [a]}")).returncode
    assert llmctl("run", spec("a: {uses: make, tag: best}")).returncode == 0
    assert llmctl("run", spec("a: {uses: make, with: {rows: 5}}")).returncode == 0
    best = json.loads(llmctl("show", "p/a.text@best", "--format", "json").stdout)
    latest = json.loads(llmctl("show", "p/a.text", "--format", "json").stdout)
    assert (best["metrics"]["rows"], latest["metrics"]["rows"]) == (3, 5)
    assert llmctl("run", spec("b: {uses: upper, inputs: {text: p/a@best}}", name="q")).returncode == 0


def test_events_are_copied(llmctl, spec, work, events):
    assert llmctl("run", spec("a: {uses: make}"), "--events", "copy.jsonl").returncode == 0
    assert [json.loads(line) for line in (work / "copy.jsonl").read_text().splitlines()] == events()
    done = llmctl("run", "p.yaml", "--events", "fd:77")
    assert done.returncode == 2
    assert "cannot write events to `fd:77`" in done.stderr


def test_remaining_time_is_known_from_earlier_runs(llmctl, spec, events):
    spec("a: {uses: make}\nc: {uses: count, with: {max_steps: 20, pause: 0.02}}")
    assert llmctl("run", "p.yaml").returncode == 0
    assert llmctl("run", "p.yaml", "--cache", "refresh").returncode == 0
    shown = [event for event in events() if event["type"] == "run.progress"]
    assert (shown[0]["done"], shown[0]["total"]) == (0, 2)
    assert 0.4 < shown[0]["eta_s"] < 30
    assert shown[-1]["eta_s"] == 0
    assert (shown[-1]["done"], shown[-1]["total"]) == (2, 2)
