from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from llmctl.spec.diagnostics import SpecError
from llmctl.spec.pipeline import Pipeline, load_pipeline

sys.path.insert(0, str(Path(__file__).parent / "fakes"))  # the fake stages name their parameters by module


@pytest.fixture
def registry():
    from fake_stages import FakeRegistry

    return FakeRegistry()


@pytest.fixture
def load(registry, tmp_path, monkeypatch) -> Callable[..., Pipeline]:
    """Read a spec text as `spec.yaml` of the current directory."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *sets: str, profiles: tuple[str, ...] = ()) -> Pipeline:
        Path("spec.yaml").write_text(dedent(text).lstrip("\n"), encoding="utf-8")
        return load_pipeline("spec.yaml", profiles, sets, registry=registry)

    return load


@pytest.fixture
def mistakes(load) -> Callable[..., list[str]]:
    """The diagnostics of a spec text as `CODE place message [hint]`."""

    def mistakes(text: str, *sets: str, profiles: tuple[str, ...] = ()) -> list[str]:
        with pytest.raises(SpecError) as caught:
            load(text, *sets, profiles=profiles)
        return [
            " ".join(filter(None, (d.code, str(d.mark or "-"), d.message, f"[{d.hint}]" if d.hint else "")))
            for d in caught.value.diagnostics
        ]

    return mistakes
