"""Help for plugin authors: run one stage, tiny artifacts, pytest fixtures, and the tests that any stage must pass.

`run_stage` needs nothing else; `llmctl.testing.fixtures` needs pytest; `llmctl.testing.conformance` is what `llmctl
plugins test` runs.
"""

from __future__ import annotations

from llmctl.testing.execution import StageResult, run_stage

__all__ = ["StageResult", "run_stage"]
