"""The secrets of a run: looked up before it for the stages that will run, and later for one that runs unexpectedly."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from llmctl.launch import secrets
from llmctl.launch.masking import SHORTEST, Masker
from llmctl.pipeline.events import EventLog
from llmctl.spec.resolved import Secret, StageSpec


class Keyring:
    """Values by name, and a masker that knows them all. Several threads may ask."""

    def __init__(self, declared: Mapping[str, Secret]) -> None:
        self._declared = declared
        self._values: dict[str, str] = {}
        self._untold: list[str] = []
        """Secrets that are too short to be masked, of which nobody was warned yet."""
        self._lock = threading.Lock()

    @property
    def hidden(self) -> frozenset[str]:
        """Variables that a secret comes from, or would come from if the user's configuration said nothing else."""
        return frozenset(name for secret in self._declared.values() for name in (secret.name, secret.variable) if name)

    def look_up(self, specs: Iterable[StageSpec]) -> None:
        """Look up what these stages are given, unless it is known. MachineError for a secret that is not there."""
        with self._lock:
            found = secrets.resolve(self._declared, [n for n in secrets.names_of(specs) if n not in self._values])
            self._values |= found
            self._untold += [name for name, value in found.items() if len(value) < SHORTEST]

    def masker(self) -> Masker:
        """Hides all values that are known by now."""
        with self._lock:
            return Masker(self._values)

    def guard(self, events: EventLog) -> None:
        """Hide all values that are known by now in what is written, and warn of those that cannot be hidden."""
        events.masker = self.masker()
        with self._lock:
            untold, self._untold = self._untold, []
        for name in untold:
            text = f"the secret `{name}` has fewer than {SHORTEST} characters: it is not masked in logs"
            events("warning", text=text)

    def variables(self, spec: StageSpec) -> dict[str, str]:
        """The declared variables of a stage with their values; KeyError for a secret that was not looked up."""
        return {name: self._values[v.secret] if v.secret else v.value for name, v in spec.env.items()}
