"""pytest fixtures for plugin authors: `pytest_plugins = ["llmctl.testing.fixtures"]` in the top `conftest.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llmctl.stage import Artifact
from llmctl.store import Store
from llmctl.testing.artifacts import make

if TYPE_CHECKING:
    from llmctl.pipeline.result import RunResult

RunSpec = Callable[..., "RunResult"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store of this test's own."""
    found = Store.open(tmp_path / "store")
    found.create()
    return found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """`tiny("dataset.chat")`: a tiny artifact of a built-in type, made once per session. Read-only, as all inputs."""
    made: dict[str, Artifact] = {}

    def artifact(type: str) -> Artifact:
        if type not in made:
            made[type] = make(type, tmp_path_factory.mktemp("tiny") / type)
        return made[type]

    return artifact


@pytest.fixture
def tiny_text(tiny: Callable[[str], Artifact]) -> Artifact:
    """50 documents in the splits `train` and `validation`."""
    return tiny("dataset.text")


@pytest.fixture
def tiny_chat(tiny: Callable[[str], Artifact]) -> Artifact:
    """50 conversations of a question and an answer."""
    return tiny("dataset.chat")


@pytest.fixture
def tiny_preference(tiny: Callable[[str], Artifact]) -> Artifact:
    """50 prompts with a chosen and a rejected answer."""
    return tiny("dataset.preference")


@pytest.fixture
def tiny_tokenizer(tiny: Callable[[str], Artifact]) -> Artifact:
    """One token per byte and six special ones."""
    return tiny("tokenizer")


@pytest.fixture
def tiny_tokens(tiny: Callable[[str], Artifact]) -> Artifact:
    """The documents of `tiny_text` in the tokens of `tiny_tokenizer`."""
    return tiny("dataset.tokens")


@pytest.fixture
def tiny_model(tiny: Callable[[str], Artifact]) -> Artifact:
    """A `model.hf` of two layers with random weights and `tiny_tokenizer`; the test is skipped without torch."""
    pytest.importorskip("torch")
    return tiny("model.hf")


@pytest.fixture
def run_spec(tmp_path: Path, store: Store) -> RunSpec:
    """`run_spec(text, *sets)`: run a pipeline by the real runner, each stage in a process of its own.

    The spec lies in `tmp_path`, from where its relative paths start. Returns the `RunResult`; a run that fails raises
    its error, as the command line would show it. Options of `run_pipeline` (`to=…`) are passed on.
    """

    def run(text: str, *sets: str, **options: object) -> RunResult:
        from llmctl.pipeline.run import run_pipeline
        from llmctl.registry import get_registry
        from llmctl.spec.pipeline import load_pipeline

        path = tmp_path / "spec.yaml"
        path.write_text(text, encoding="utf-8")
        result = run_pipeline(load_pipeline(path, sets=sets, registry=get_registry()), store, **options)  # type: ignore[arg-type]  # passed on
        if error := result.error():
            raise error
        return result

    return run
