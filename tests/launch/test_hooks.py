"""`run_stage` and `log_metrics` of installed plugins, called in the stage's process."""

import json

from llmctl.store import Store

WRAPPER = """
    from pathlib import Path
    from llmctl import hookimpl

    @hookimpl(wrapper=True)
    def run_stage(stage, context, call):
        context.log(f"before {stage.name} as {context.stage}")
        result = yield
        context.log(f"after {stage.name}")
        return result
"""
RETRY = """
    from llmctl import hookimpl

    @hookimpl
    def run_stage(stage, context, call):
        try:
            call()
        except ValueError:
            context.warn("once more")
            call()
        return True
"""
SINK = """
    from pathlib import Path
    from llmctl import hookimpl

    @hookimpl
    def log_metrics(stage, values, step):
        with Path({path!r}).open("a") as file:
            file.write(f"{{stage}} {{values}} {{step}}\\n")
"""
BROKEN = """
    from llmctl import hookimpl

    @hookimpl
    def log_metrics(values):
        raise RuntimeError("tracker down")
"""


def texts(work):
    (run,) = (work / ".llmctl/store/runs").iterdir()
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event["text"] for event in events if event["type"] in ("log", "warning")]


def test_a_wrapper_goes_around_the_stage(install, llmctl, one, work):
    install("wrapper", {"wrapper": "wrapper"}, {"wrapper.py": WRAPPER})
    assert llmctl("run", one("make")).returncode == 0
    assert texts(work) == ["before make as w", "after make"]


def test_an_implementation_may_call_again(install, llmctl, one, work):
    install("retry", {"retry": "retry"}, {"retry.py": RETRY})
    done = llmctl("run", one("wrong", "how: raise"))
    assert done.returncode == 1
    assert texts(work) == ["once more"]
    assert "ValueError: what happened" in done.stderr


def test_sinks_get_numbers_and_a_broken_one_only_warns(install, llmctl, one, work):
    install("sink", {"sink": "sink"}, {"sink.py": SINK.format(path=str(work / "numbers"))})
    install("broken-sink", {"broken": "broken_sink"}, {"broken_sink.py": BROKEN})
    done = llmctl("run", one("count", "max_steps: 2"))
    assert done.returncode == 0
    lines = (work / "numbers").read_text().splitlines()
    assert lines == ["w {'loss': 1.0} 1", "w {'loss': 0.5} 2", "w {'begun': 0} None", "w {'steps': 2} None"]
    assert texts(work) == ["the plugin `broken` failed to log metrics: RuntimeError: tracker down"]


def test_metrics_of_the_run_are_kept(llmctl, one, work):
    assert llmctl("run", one("count", "max_steps: 2")).returncode == 0
    (run,) = (work / ".llmctl/store/runs").iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[:2] == [
        {"stage": "w", "name": "loss", "value": 1.0, "step": 1},
        {"stage": "w", "name": "loss", "value": 0.5, "step": 2},
    ]


def test_another_revision_here_than_in_the_request(llmctl, one, work, fake_stages):
    assert llmctl("run", one("make")).returncode == 0
    store = Store(work / ".llmctl/store")
    (request,) = (store.root / "requests").glob("*/*.json")
    key = json.loads(request.read_text())["key"]
    again = llmctl("stage", "exec", "--key", key, "--store", store.root)
    assert again.returncode == 0
    assert json.loads(again.stdout.splitlines()[-1])["type"] == "result"
    path = fake_stages / "fake_stages.py"
    path.write_text(path.read_text().replace('name="make",', 'name="make", rev=4,'))
    other = llmctl("stage", "exec", "--key", key, "--store", store.root)
    assert other.returncode == 7
    assert "stage `make` is fake rev 1 in the request, fake rev 4 here" in other.stdout
    missing = llmctl("stage", "exec", "--key", "sha256:" + "0" * 64, "--store", store.root)
    assert missing.returncode == 5
