"""What a run leaves: one `StageResult` per selected stage, and the exit code that they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmctl.errors import BY_EXIT_CODE, LlmctlError
from llmctl.stage import Artifact

if TYPE_CHECKING:
    from llmctl.pipeline.choice import Choice

Status = Literal["done", "cached", "failed", "stopped", "skipped"]


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One checked gate; `value` is None if the metric is missing, `limit` is the bound that decided."""

    stage: str
    metric: str
    value: float | None
    limit: float | None
    relation: Literal[">=", "<="]
    ok: bool
    on_fail: Literal["stop", "warn"]
    message: str


@dataclass(kw_only=True)
class StageResult:
    """What became of one stage in this run."""

    id: str
    status: Status
    key: str = ""
    outputs: Mapping[str, Artifact] = field(default_factory=dict)
    """Committed outputs by port; empty unless `done` or `cached`."""
    known: Mapping[str, Artifact] = field(default_factory=dict)
    """All outputs of a cached result, also those whose bytes were collected: their ids make the keys of others."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    headline: Mapping[str, Any] = field(default_factory=dict)
    """The metrics that `Stage.headline` names, as far as they were reported."""
    seconds: float = 0.0
    """Wall time of this run, or of the run that produced a cached result."""
    code: int = 0
    message: str = ""
    hint: str = ""
    log: Path | None = None
    attempts: int = 1
    """How often it was begun in this run; more than once after failures that `retries` allows."""
    choice: Choice | None = None
    """Of a `select` stage: which row won."""
    collected: bool = False
    """Whether bytes of its outputs are in the store no more (`ephemeral: true`); those are not in `outputs`."""
    gates: tuple[GateResult, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The parts that `run.json` keeps."""
        return {
            "status": self.status,
            "key": self.key,
            "outputs": {port: {"id": a.id, "type": a.type} for port, a in self.outputs.items()},
            "metrics": dict(self.metrics),
            "seconds": round(self.seconds, 3),
            "code": self.code,
            "message": self.message,
            "attempts": self.attempts,
            **({"choice": self.choice.to_json()} if self.choice else {}),
            **({"collected": True} if self.collected else {}),
            "gates": [asdict(gate) for gate in self.gates],
        }

    @property
    def ok(self) -> bool:
        """Whether the outputs are there."""
        return self.status in ("done", "cached")


@dataclass(kw_only=True)
class RunResult:
    """The whole run. `code` is 0, the first failure's code (3 for a 2 after others were made), 4 for a gate, or that of
    the signal that ended it."""

    run: str
    directory: Path
    code: int
    stages: dict[str, StageResult]
    """By stage id, in the order of the pipeline."""
    seconds: float = 0.0
    message: str = ""
    hint: str = ""

    def error(self) -> LlmctlError | None:
        """The error to raise at the edge, None after a good run; its `exit_code` is `code`."""
        if not self.code:
            return None
        error = BY_EXIT_CODE.get(self.code, LlmctlError)(self.message, hint=self.hint or None)
        error.exit_code = self.code
        return error
