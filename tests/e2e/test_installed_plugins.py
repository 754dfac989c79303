"""Third-party plugins in real runs: their stages, their hooks, and what their defects do to everyone else."""

import json

import pytest

SPEC = """\
llmctl: 1
name: test
stages:
  tok: {uses: fake-tok}
  pre: {uses: fake-pre, inputs: {tokens: tok, tokenizer: tok}}
"""


def test_a_third_party_stage_is_run_like_a_built_in_one(fake, llmctl, tmp_path):
    (tmp_path / "work/spec.yaml").write_text(SPEC)
    assert llmctl("check", "spec.yaml").returncode == 0
    done = llmctl("run", "spec.yaml")
    assert done.returncode == 0, done.stderr
    assert "answer" in done.stdout + done.stderr  # the headline metric
    again = llmctl("run", "spec.yaml")
    assert again.returncode == 0
    assert "cached" in again.stdout + again.stderr


def test_changed_source_of_an_editable_plugin_runs_again(fake, llmctl, tmp_path):
    first = llmctl("fake-tok", "--format", "id")
    assert llmctl("fake-tok").stderr.count("cached") >= 1
    source = fake / "fake/run.py"
    source.write_text(source.read_text().replace("{params.text * params.size}", "other"))
    changed = llmctl("fake-tok", "--format", "id")
    assert "cached" not in changed.stderr
    assert changed.stdout != first.stdout


def test_wrappers_of_run_stage_surround_the_work(fake, install, llmctl, tmp_path):
    log = tmp_path / "wrapped"
    source = f"""
        from pathlib import Path
        from llmctl import hookimpl

        @hookimpl(wrapper=True)
        def run_stage(stage, context, call):
            with Path({str(log)!r}).open("a") as file:
                file.write(f"before {{stage.name}} {{context.stage}}\\n")
            result = yield
            with Path({str(log)!r}).open("a") as file:
                file.write(f"after {{result}}\\n")
            return result
    """
    install("wrap", {"wrap": "wrap_plugin"}, {"wrap_plugin.py": source})
    done = llmctl("fake-tok")
    assert done.returncode == 0, done.stderr
    assert log.read_text() == "before fake-tok fake-tok\nafter True\n"


def test_sinks_of_log_metrics_get_the_numbers_and_cannot_stop_the_stage(fake, install, llmctl, tmp_path):
    log = tmp_path / "numbers"
    good = f"""
        from pathlib import Path
        from llmctl import hookimpl

        @hookimpl
        def log_metrics(stage, values, step):
            with Path({str(log)!r}).open("a") as file:
                file.write(f"{{stage}} {{values}} {{step}}\\n")
    """
    bad = """
        from llmctl import hookimpl

        @hookimpl
        def log_metrics(stage, values, step):
            raise RuntimeError("the sink is clogged")
    """
    install("good-sink", {"good": "good_sink"}, {"good_sink.py": good})
    install("bad-sink", {"bad": "bad_sink"}, {"bad_sink.py": bad})
    done = llmctl("fake-tok")
    assert done.returncode == 0, done.stderr
    assert "fake-tok {'answer': 42" in log.read_text()
    assert "the sink is clogged" in done.stderr


def test_a_stage_whose_library_is_missing_names_the_install_line(install, llmctl):
    files = {
        "lacks.py": """
            from llmctl import Out, Stage, hookimpl
            @hookimpl
            def register_stages():
                return [Stage(name="lacks", help="Lacks.", params="lacks_params:P", run="lacks_run:run",
                              outputs={"out": Out("fake.out")}, extra="train")]
        """,
        "lacks_params.py": "from llmctl import Params\nclass P(Params):\n    pass\n",
        "lacks_run.py": "import a_heavy_library\ndef run(ctx, params): pass\n",
    }
    install("lacks", {"lacks": "lacks"}, files)
    done = llmctl("lacks")
    assert done.returncode == 7
    assert "stage `lacks` needs the module `a_heavy_library`" in done.stderr
    assert "pip install 'llmctl[train]'" in done.stderr


def test_a_contested_stage_in_a_spec_is_explained(fake, install, llmctl, tmp_path):
    source = """
        from llmctl import Stage, hookimpl
        @hookimpl
        def register_stages():
            return [Stage(name="fake-tok", help="", params="", run="")]
    """
    install("thief", {"thief": "thief_plugin"}, {"thief_plugin.py": source})
    (tmp_path / "work/spec.yaml").write_text(SPEC)
    done = llmctl("check", "spec.yaml")
    assert done.returncode == 2
    assert "fake and by thief" in " ".join(done.stderr.split())
    assert "LLMCTL_DISABLE=" in done.stderr
    assert llmctl("check", "spec.yaml", env={"LLMCTL_DISABLE": "thief"}).returncode == 0


def test_a_broken_plugin_does_not_hurt_a_run(fake, install, llmctl):
    install("acme-broken", {"acme": "acme_broken"}, {"acme_broken.py": "1/0"})
    done = llmctl("fake-tok")
    assert done.returncode == 0, done.stderr
    assert "acme" not in done.stderr


def test_print_spec_gives_the_same_result_as_the_command(fake, llmctl, tmp_path):
    words = ("fake-tok", "--size", "3", "--fast", "--set", "names=[a, b]")
    (tmp_path / "work/tok.yaml").write_text(llmctl(*words, "--print-spec").stdout)
    direct = llmctl(*words, "--format", "id")
    assert direct.returncode == 0, direct.stderr
    frozen = llmctl("fake-tok", "-c", "tok.yaml", "--format", "id")
    assert frozen.stdout == direct.stdout
    assert "cached" in frozen.stderr
    over = llmctl("fake-tok", "-c", "tok.yaml", "--size", "4", "--format", "id")
    assert over.stdout != direct.stdout


@pytest.mark.slow
def test_output_cache_and_events_options(fake, llmctl, tmp_path):
    done = llmctl("fake-tok", "--output", "out", "--events", "events.jsonl")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "work/out").iterdir() if path.is_dir()) >= ["tokenizer", "tokens"]
    events = [json.loads(line) for line in (tmp_path / "work/events.jsonl").read_text().splitlines()]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert {"run.start", "stage.start", "stage.end", "artifact", "run.end"} <= {event["type"] for event in events}
    assert "cached" in llmctl("fake-tok").stderr
    assert "cached" not in llmctl("fake-tok", "--cache", "refresh").stderr
    assert "cached" not in llmctl("fake-tok", "--cache", "off").stderr


def test_an_effect_is_run_every_time(fake, llmctl):
    for _ in range(2):
        done = llmctl("fake-serve")
        assert done.returncode == 0, done.stderr
        assert "cached" not in done.stderr
