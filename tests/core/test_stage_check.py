"""What a declaration names is looked for in the source: every way to bind a name counts, and nothing is imported."""

import pytest

from llmctl import Stage
from llmctl.stage_check import stage_faults

DEFINED = {
    "function": "def run(ctx, params): pass",
    "assignment": "run = print",
    "tuple": "other, (run, *rest) = print, (print, 1)",
    "annotated": "run: object = print",
    "with": "with open('/dev/null') as f:\n    def run(ctx, params): pass",
    "with target": "with open('/dev/null') as run: pass",
    "finally": "try:\n    pass\nfinally:\n    run = print",
    "except": "try:\n    import fast\nexcept ImportError:\n    def run(ctx, params): pass",
    "else": "if 1 > 2:\n    pass\nelse:\n    run = print",
    "match": "match 1:\n    case _:\n        run = print",
    "loop": "for run in (print,): pass",
    "walrus": "(run := print)",
    "import": "from builtins import print as run",
    "star": "from builtins import *",
    "getattr": "def __getattr__(name): return print",
}
UNDEFINED = {
    "nothing": "",
    "in a function": "def other():\n    run = print",
    "in a class": "class Other:\n    run = print",
    "in a comprehension": "found = [run for run in (1, 2)]",
    "read": "print(run)",
    "removed": "del run",
    "deep import": "import os.run",
}


@pytest.fixture
def faults(tmp_path, monkeypatch, request):
    """What is said about `run` of a stage whose module has this source."""

    def look(source):
        module = f"acme_{abs(hash(request.node.name))}"
        (tmp_path / f"{module}.py").write_text(f"raise RuntimeError('not to be imported')\n{source}\n")
        monkeypatch.syspath_prepend(tmp_path)
        stage = Stage(name="acme", help="Does a thing.", params="llmctl:Params", run=f"{module}:run")
        return [text for text, _ in stage_faults(stage) if text.startswith("run")]

    return look


@pytest.mark.parametrize("case", DEFINED)
def test_a_name_that_is_bound(case, faults):
    assert faults(DEFINED[case]) == []


@pytest.mark.parametrize("case", UNDEFINED)
def test_a_name_that_is_not_bound(case, faults):
    (text,) = faults(UNDEFINED[case])
    assert text.endswith("defines no `run`")
