"""The tests that every stage must pass: `llmctl plugins test` runs them, and a plugin's own suite can.

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=str)
    def test_conformance(check, tmp_path):
        conformance.check_stage(STAGE, {"rows": 3}, directory=tmp_path, only=[check])

A check gets a `Subject` and a directory of its own; it returns an `Outcome` and raises nothing for a stage that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmctl.errors import TempFail
from llmctl.stage import Stage
from llmctl.testing import baseline, checks
from llmctl.testing.subjects import Bound, Example, Subject, subject

__all__ = ["CHECKS", "Check", "Example", "Outcome", "Subject", "check_stage", "subject"]

Status = Literal["ok", "failed", "not applicable"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one check found; `reason` says why it failed or does not apply, or holds a remark."""

    check: str
    status: Status
    reason: str = ""


@dataclass(frozen=True)
class Check:
    """A check with its name; `str(check)` is the name, for the ids of parametrised tests."""

    name: str
    function: Callable[[Subject, Path], str]

    def __str__(self) -> str:
        return self.name

    def __call__(self, subject: Subject, directory: Path) -> Outcome:
        """Run the check in a directory of its own."""
        place = directory / self.name
        place.mkdir(parents=True)
        try:
            return Outcome(check=self.name, status="ok", reason=self.function(subject, place))
        except checks.Failed as failed:
            return Outcome(check=self.name, status="failed", reason=str(failed))
        except checks.NotApplicable as why:
            return Outcome(check=self.name, status="not applicable", reason=str(why))
        except TempFail:
            return Outcome(check=self.name, status="failed", reason="it stopped although nobody asked it to")


CHECKS = (
    Check("declaration", checks.declaration),
    Check("start-up", checks.start),
    Check("revision", checks.revision),
    Check("parameters", checks.parameters),
    Check("commit", checks.commit),
    Check("determinism", checks.determinism),
    Check("resume", checks.resume),
    Check("kill", checks.kill),
    Check("effects", checks.effects),
)


def check_stage(
    stage: Stage,
    params: Mapping[str, Any] | None = None,
    inputs: Bound | None = None,
    *,
    directory: Path,
    only: Sequence[Check] = CHECKS,
    file: Path | None = None,
    unread: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Run the checks on a stage and raise AssertionError for those that fail; returns every outcome.

    Required inputs that are not given are made. With `file`, a `llmctl-plugin.json`, its examples come after this
    one (or alone, if neither `params` nor `inputs` are given), and the check `revision` compares with its record.
    """
    found = subject(stage, baseline.PluginFile.read(file) if file else None, directory / "inputs", params, inputs)
    if unread:
        found = replace(found, unread={**found.unread, **unread})
    outcomes = [check(found, directory) for check in only]
    failed = [f"{outcome.check}: {outcome.reason}" for outcome in outcomes if outcome.status == "failed"]
    if failed:
        raise AssertionError(f"stage `{stage.name}`: " + "\n".join(failed))
    return outcomes
