"""A stage between the phases: what is known of it so far, and where it stands in the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from llmctl.spec.diagnostics import Mark
from llmctl.spec.matrix import Row
from llmctl.spec.nodes import Map, Node
from llmctl.spec.params import Params
from llmctl.spec.resolved import Gate, Ref, Select
from llmctl.spec.skeleton import BodyModel, NodeModel, SelectModel
from llmctl.stage import Stage


@dataclass
class Draft:
    """Phase A fills `model`, phase B `stage` and `params`, phase C the rest; None where a phase found mistakes.

    Each row of a matrix is a draft of its own; `base` is the id that the spec gives all of them.
    """

    id: str
    base: str
    key: Mark
    node: Map
    path: str
    """How messages call it: `stages.train`, empty in a single-stage file."""
    row: Row | None = None
    family: str = ""
    """The stage whose matrix gives the rows."""
    model: NodeModel | None = None
    stage: Stage | None = None
    params: Params | None = None
    inputs: dict[str, tuple[Ref, ...]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    gates: list[Gate] = field(default_factory=list)
    select: Select | None = None

    @property
    def body(self) -> BodyModel | None:
        """Phase A of a stage with `uses`."""
        return self.model if isinstance(self.model, BodyModel) else None

    @property
    def selects(self) -> bool:
        """Whether it is a `select`, whose declaration follows from its inputs."""
        return "select" in self.node.entries and "uses" not in self.node.entries

    @property
    def selection(self) -> SelectModel | None:
        """Phase A of a `select`."""
        return self.model if isinstance(self.model, SelectModel) else None

    def entry(self, key: str) -> tuple[Mark, Node | None]:
        """The mark of a key of the stage (its own mark if the key is absent) and the value."""
        entry = self.node.entries.get(key)
        return (entry.key, entry.value) if entry else (self.key, None)

    def where(self, *path: str) -> str:
        """A path below this stage, for messages."""
        return ".".join(part for part in (self.path, *path) if part)

    def ports(self) -> Mapping[str, str] | None:
        """The declared type of every output that this configuration produces, or None if that is unknown.

        The type is empty for `Out(same_as=…)`.
        """
        return None if self.stage is None or self.params is None or self.model is None else self._ports

    @cached_property
    def _ports(self) -> Mapping[str, str]:
        assert self.stage is not None and self.params is not None
        produced = self.params.outputs()
        return {name: out.type for name, out in self.stage.outputs.items() if produced is None or name in produced}
