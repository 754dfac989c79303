"""Tags as inputs of a spec: of the same pipeline, of another one, with a port, misspelled."""

import pytest

from llmctl.errors import InputError
from llmctl.store import Store, names


@pytest.fixture
def tagged(run):
    """p/a@best is the first result of `a`, whose latest one is another."""
    first = run("a: {uses: make}").stages["a"].outputs
    store = Store.open()
    names.set_tag(store, "p/a@best", {"id": first["text"].id, "type": "dataset.text"})
    names.set_tag(store, "team/corpus@v1", {"id": first["text"].id, "type": "dataset.text"})
    run("a: {uses: make, with: {rows: 5}}")
    return first["text"]


@pytest.mark.parametrize("reference", ["a@best", "p/a@best", "team/corpus@v1"])
def test_a_tag_is_an_input(reference, tagged, run):
    result = run("b: {uses: upper, inputs: {text: " + reference + "}}")
    assert result.code == 0, result.message
    request = Store.open().request(result.stages["b"].key).read_text()
    assert tagged.id in request


def test_a_tag_that_is_not_there(tagged, run):
    with pytest.raises(InputError, match="there is no result named `p/a@bset`") as error:
        run("b: {uses: upper, inputs: {text: a@bset}}")
    assert "did you mean `p/a@best`?" in error.value.hint
