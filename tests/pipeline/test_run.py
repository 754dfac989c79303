"""Whole runs of tiny stages through the real command line: caching, cut-off, gates, skipping, selection, failure."""

import json
import resource
import shutil
import subprocess
import sys

import pytest

from llmctl.store import Store
from llmctl.store.locks import try_lock

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


def test_a_cached_run_needs_little_cpu(llmctl, spec, budget):
    assert llmctl("run", spec(CHAIN)).returncode == 0

    def cpu():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert llmctl("run", "p.yaml").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu() for _ in range(3)) < budget(1)


def test_a_run_imports_nothing_heavy(llmctl_env, llmctl, spec, work):
    spec(CHAIN)
    code = (
        "import sys\nfrom llmctl.cli import main\ntry:\n    main(['run', 'p.yaml'])\nexcept SystemExit as e:\n"
        "    heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "    print(e.code, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=work, env=llmctl_env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_what_runs_again(run, actions):
    assert run(CHAIN).code == 0
    for sets, again in (
        (["b.mark=x"], "bsc"),
        (["a.threads=8", "b.sleep=0.01", "c.pause=0.001"], ""),
        (["a.rows=3", "a.seed=1"], ""),
        # Another key for `a`, the same bytes: nothing below runs.
        (["a.seed=2"], "a"),
        (["c.max_steps=12"], "c"),
    ):
        result = run(None, *sets)
        assert result.code == 0
        assert {stage for stage, action in actions().items() if action == "run"} == set(again), sets


def test_order_of_stages_and_spelling_do_not_matter(run, actions):
    assert run(CHAIN).code == 0
    lines = CHAIN.strip().splitlines()
    stages = "\n".join(reversed(lines)).replace("{uses: make}", "{uses: make, with: {seed: 1.0e+0, rows: 3}}  # why")
    assert run(stages).code == 0
    assert set(actions().values()) == {"cached"}


def test_env_is_part_of_the_key_unless_declared_otherwise(run, actions):
    def action(env):
        assert run(f"a: {{uses: make, env: {{{env}}}}}").code == 0
        return actions()["a"]

    assert action("") == "run"
    assert action("MODE: x") == "run"
    assert action("MODE: y") == "run"
    assert action("MODE: x, TRACE: {value: '1', affects_output: false}") == "cached"


@pytest.mark.parametrize(
    "damage",
    ["delete", "truncate", *(pytest.param(how, marks=pytest.mark.slow) for how in ("manifest", "remove file"))],
)
def test_a_damaged_artifact_is_a_miss(damage, run, work, actions, events):
    assert run("a: {uses: make}\nb: {uses: upper, inputs: {text: a}}").code == 0
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
    assert run().code == 0
    assert actions() == {"a": "cached", "b": "run"}
    (planned,) = [event["stages"] for event in events() if event["type"] == "plan"]
    assert planned[1]["why"] == ["its artifact is gone or damaged"]
    assert artifacts(work) == before
    Store.open().verify(ref["id"])


def test_a_failed_stage_is_tried_again_and_its_dependants_wait(llmctl, spec, actions, work):
    spec("a: {uses: make}\nw: {uses: wrong, with: {how: stage}}\nx: {uses: count, needs: [w]}\ny: {uses: count}")
    for _ in range(2):
        done = llmctl("run", "p.yaml", "--keep-going")
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


def test_after_a_failure_nothing_new_starts_unless_told_to(run, actions, events):
    stages = "a: {uses: make}\nw: {uses: wrong, with: {how: stage}}\nx: {uses: count, needs: [w]}\ny: {uses: count}"
    assert run(stages).code == 3
    assert actions() == {"a": "run", "w": "run", "x": "skipped", "y": "skipped"}
    reasons = {event["stage"]: event["reason"] for event in events() if event["type"] == "stage.skipped"}
    assert reasons == {"x": "`w` failed", "y": "`w` failed; --keep-going runs what does not depend on it"}
    assert run(keep_going=True).code == 3
    assert actions() == {"a": "cached", "w": "run", "x": "skipped", "y": "run"}
    assert run().code == 3  # what is done already costs nothing, so it is taken
    assert actions() == {"a": "cached", "w": "run", "x": "skipped", "y": "cached"}


# -- gates ------------------------------------------------------------------------------------------------------------

GATED = """
a: {uses: make}
s: {uses: score, inputs: {text: a}, with: {score: 0.4}, gates: [{metric: score, min: 0.5}], output: ./good}
d: {uses: upper, inputs: {text: a}, needs: [s]}
e: {uses: count, needs: [d]}
f: {uses: count, inputs: {text: a}}
"""


def test_a_failing_gate_stops_its_dependants_only(run, llmctl, actions, events, work):
    assert run(GATED).code == 4
    for action in ("run", "cached"):
        if action == "cached":
            done = llmctl("run", "p.yaml")
            assert done.returncode == 4
        assert actions() == {"a": action, "s": action, "d": "skipped", "e": "skipped", "f": action}
        reasons = {event["stage"]: event["reason"] for event in events() if event["type"] == "stage.skipped"}
        assert reasons == {"d": "a gate of `s` failed", "e": "`d` was skipped"}
    assert "error: gate failed: `s`: score is 0.4, must be >= 0.5" in done.stderr
    assert "gates: 0 of 1 passed" in done.stdout
    assert not (work / "good").exists()  # a result that missed its gate is not exported
    assert Store.open().resolve("p/s").type == "metrics"  # but its numbers are kept


def test_gates_as_warnings(run, actions, events):
    assert run(GATED, gates="warn").code == 0
    assert set(actions().values()) == {"run"}
    assert any("gate missed: `s`: score is 0.4" in event["text"] for event in events() if event["type"] == "warning")
    assert run(GATED.replace("min: 0.5}", "min: 0.5, on_fail: warn}")).code == 0
    assert run(GATED).code == 4


def test_a_missing_metric_fails_the_gate_and_lists_what_there_is(run):
    result = run(GATED.replace("metric: score", "metric: accuracy"), to=["s"])
    assert result.code == 4
    assert result.message == "gate failed: `s` reports no number `accuracy`; it has fine, score"


@pytest.mark.parametrize(
    ("score", "limit", "code"),
    [
        (0.88, "max_drop: 0.02", 0),
        (0.87, "max_drop: 0.02", 4),
        pytest.param(0.82, "min_ratio: 0.9", 0, marks=pytest.mark.slow),
        pytest.param(0.80, "min_ratio: 0.9", 4, marks=pytest.mark.slow),
        pytest.param(0.98, "max_ratio: 1.1", 0, marks=pytest.mark.slow),
        (0.995, "max_ratio: 1.1", 4),
        pytest.param(0.92, "max_rise: 0.02", 0, marks=pytest.mark.slow),
        (0.93, "max_rise: 0.02", 4),
    ],
)
def test_a_gate_against_a_baseline(score, limit, code, run, events):
    result = run(f"""
a: {{uses: make}}
base: {{uses: score, inputs: {{text: a}}, with: {{score: 0.9}}}}
new: {{uses: score, inputs: {{text: a}}, with: {{score: {score}}},
  gates: [{{metric: score, baseline: base.metrics, {limit}}}]}}
""")
    assert result.code == code
    (gate,) = [event for event in events() if event["type"] == "gate"]
    assert gate["ok"] is (code == 0)
    expected = {"max_drop": 0.88, "max_rise": 0.92, "min_ratio": 0.81, "max_ratio": 0.99}
    assert gate["limit"] == pytest.approx(expected[limit.partition(":")[0]])


def test_a_baseline_without_the_metric(run):
    result = run("""
a: {uses: make}
base: {uses: score, inputs: {text: a}, with: {name: other}}
new: {uses: score, inputs: {text: a}, gates: [{metric: score, baseline: base.metrics, max_drop: 0.1}]}
""")
    assert result.code == 4
    assert "the baseline of `new` has no number `score`: base.metrics; it has fine, other" in result.message


# -- selection and effects --------------------------------------------------------------------------------------------


def test_effects_run_only_when_named_and_every_time(run, work, actions):
    stages = "a: {uses: make}\nz: {uses: make, with: {rows: 9}}\n"
    stages += "go: {uses: send, inputs: {text: a}, with: {path: pushed}}"
    assert run(stages).code == 0
    assert set(actions()) == {"a", "z"}
    for times in (1, 2):
        assert run(to=["go"]).code == 0
        assert (work / "pushed").read_text() == "pushed\n" * times
        assert actions() == {"a": "cached", "go": "run"}
    locks = [try_lock(path) for path in (work / ".llmctl/store/locks").iterdir()]
    assert all(locks)
    assert run(to=["go"], on_busy="fail").code == 0  # while another process acts, too
    for lock in locks:
        lock.release()


def test_selection(run, actions, llmctl):
    assert run(CHAIN, until="b").code == 0
    assert set(actions()) == {"a", "b"}
    assert run(to=["s"]).code == 0
    assert set(actions()) == {"a", "b", "s"}
    assert llmctl("run", "p.yaml", "--until", "a").returncode == 0
    assert set(actions()) == {"a"}
    assert llmctl("run", "p.yaml", "--to", "b").returncode == 0
    assert set(actions()) == {"a", "b"}


@pytest.mark.parametrize("option", ["--to", "--until"])
def test_an_unknown_stage_is_a_usage_error(option, llmctl, spec, work):
    done = llmctl("run", spec("train: {uses: make}"), option, "trian")
    assert done.returncode == 2
    assert "there is no stage `trian` in `p`" in done.stderr
    assert "did you mean `train`?" in done.stderr
    assert not (work / ".llmctl").exists()


def test_refresh_makes_everything_anew(run, llmctl, actions):
    assert run("a: {uses: make}\nb: {uses: upper, inputs: {text: a}}").code == 0
    assert llmctl("run", "p.yaml", "--cache", "refresh").returncode == 0
    assert actions() == dict.fromkeys("ab", "run")


def test_cache_off_neither_looks_nor_publishes(run, actions):
    for _ in range(2):
        assert run("a: {uses: make, cache: off}").code == 0
        assert actions() == {"a": "run"}
    assert run("a: {uses: make}").code == 0
    assert actions() == {"a": "run"}


# -- plan -------------------------------------------------------------------------------------------------------------


def test_plan_says_why(llmctl, spec, work, run):
    def plan(*args):
        done = llmctl("plan", "p.yaml", "--format", "json", *args)
        return {row["stage"]: (row["action"], "; ".join(row["why"])) for row in json.loads(done.stdout)}

    spec(CHAIN)
    assert plan() == dict.fromkeys("absc", ("run", "new"))
    assert not (work / ".llmctl").exists()
    assert run().code == 0
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


def test_a_new_revision_of_the_plugin_runs_again(llmctl, run, fake_stages):
    assert run("a: {uses: make}\nb: {uses: upper, inputs: {text: a}}").code == 0
    path = fake_stages / "fake_stages.py"
    path.write_text(path.read_text().replace('name="upper",', 'name="upper", rev=2,'))
    rows = json.loads(llmctl("plan", "p.yaml", "--format", "json").stdout)
    assert rows[0]["action"] == "cached"
    assert rows[1]["why"] == ["plugin rev 1 → 2"]


def test_an_editable_plugin_counts_by_its_source(llmctl, run, fake_stages):
    (fake_stages / "fake-0.1.dist-info/RECORD").unlink()
    assert run("a: {uses: make}").code == 0
    path = fake_stages / "fake_stages.py"
    path.write_text(path.read_text() + "\n# changed\n")
    rows = json.loads(llmctl("plan", "p.yaml", "--format", "json").stdout)
    assert rows[0]["why"] == ["the plugin's source changed"]


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_output_is_a_plain_copy_that_follows_the_result(run, work, actions):
    assert run("a: {uses: make, output: ./out/text}").code == 0
    files = {path.name for path in (work / "out/text").iterdir()}
    assert files == {"dataset_info.json", "train-00000-of-00001.jsonl.gz", "llmctl.json"}
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in (work / "out/text").iterdir())
    first = json.loads((work / "out/text/llmctl.json").read_text())["id"]
    (work / "out/text/dataset_info.json").unlink()
    assert run().code == 0
    assert actions() == {"a": "cached"}
    assert (work / "out/text/dataset_info.json").exists()
    assert run(None, "a.word=other").code == 0
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


def test_a_tag_names_a_result_that_passed(run, llmctl, spec):
    assert run("a: {uses: make, tag: best}").code == 0
    assert run("a: {uses: make, with: {rows: 5}}").code == 0
    best = json.loads(llmctl("show", "p/a.text@best", "--format", "json").stdout)
    latest = json.loads(llmctl("show", "p/a.text", "--format", "json").stdout)
    assert (best["metrics"]["rows"], latest["metrics"]["rows"]) == (3, 5)
    assert llmctl("run", spec("b: {uses: upper, inputs: {text: p/a@best}}", name="q")).returncode == 0
    gate = "gates: [{metric: rows, min: 9}]"
    assert run(f"a: {{uses: make, with: {{rows: 6}}, tag: best, {gate}}}").code == 4
    assert Store.open().resolve("p/a.text@best").id == best["id"]


def test_events_are_copied(llmctl, spec, work, events):
    assert llmctl("run", spec("a: {uses: make}"), "--events", "copy.jsonl").returncode == 0
    assert [json.loads(line) for line in (work / "copy.jsonl").read_text().splitlines()] == events()
    done = llmctl("run", "p.yaml", "--events", "fd:77")
    assert done.returncode == 2
    assert "cannot write events to `fd:77`" in done.stderr


def test_remaining_time_is_known_from_earlier_runs(run, events):
    assert run("a: {uses: make}\nc: {uses: count, with: {max_steps: 20, pause: 0.02}}").code == 0
    assert run(refresh=True).code == 0
    shown = [event for event in events() if event["type"] == "run.progress"]
    assert (shown[0]["done"], shown[0]["total"]) == (0, 2)
    assert 0.4 < shown[0]["eta_s"] < 30
    assert shown[-1]["eta_s"] == 0
    assert (shown[-1]["done"], shown[-1]["total"]) == (2, 2)
