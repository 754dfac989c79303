"""A `llmctl-plugin.json` that was edited by hand: one line says what is wrong with it."""

import json

import pytest

from llmctl.errors import InputError
from llmctl.testing.baseline import PluginFile

HEAD = {"llmctl-plugin": 1, "distribution": "odd-dist"}
RECORD = {"rev": 1, "outputs": {"text": "dataset.text"}, "parameters": {"rows": {"affects": "output", "default": 3}}}


def test_what_is_right_is_read_and_written_as_it_was(tmp_path):
    path = tmp_path / "file.json"
    examples = {"odd": [{"params": {"rows": {"a": 1}}, "inputs": {"text": "dataset.text", "files": ["a", "b"]}}, {}]}
    content = {**HEAD, "examples": examples, "unread": {"odd": {"rows": "why"}}, "recorded": {"odd": RECORD}}
    path.write_text(json.dumps(content))
    found = PluginFile.read(path)
    assert found.mentioned() == {"odd": ["examples", "unread", "recorded"]}
    found.write()
    assert json.loads(path.read_text()) == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distribution": 5}, "`distribution` is no text"),
        ({"distribution": ""}, "`distribution` is no text"),
        ({"recorded": []}, "`recorded` is no object"),
        ({"recorded": {"demo": {}}}, "recorded.demo is no record of a stage"),
        ({"recorded": {"demo": 5}}, "recorded.demo is no record of a stage"),
        ({"recorded": {"demo": {**RECORD, "rev": "1"}}}, "recorded.demo is no record of a stage"),
        ({"recorded": {"demo": {**RECORD, "outputs": ["text"]}}}, "recorded.demo is no record of a stage"),
        ({"recorded": {"demo": {**RECORD, "outputs": {"text": {}}}}}, "recorded.demo is no record of a stage"),
        ({"recorded": {"demo": {**RECORD, "parameters": {"a": 3}}}}, "recorded.demo is no record of a stage"),
        ({"recorded": {"demo": {**RECORD, "parameters": {"a": {}}}}}, "recorded.demo is no record of a stage"),
        ({"examples": {"demo": {}}}, "examples.demo is no list of {params, inputs}"),
        ({"examples": {"demo": [{"inputs": {"text": {"a": 1}}}]}}, "examples.demo is no list of {params, inputs}"),
        ({"examples": {"demo": [{"inputs": {"text": [1]}}]}}, "examples.demo is no list of {params, inputs}"),
        ({"unread": {"demo": ["rows"]}}, "unread.demo is no object of texts"),
        ({"unread": {"demo": {"rows": 1}}}, "unread.demo is no object of texts"),
    ],
)
def test_what_is_wrong_is_named(changes, message, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps({**HEAD, **changes}))
    with pytest.raises(InputError) as found:
        PluginFile.read(path)
    assert found.value.message == f"{path}: {message}"
    assert found.value.hint
