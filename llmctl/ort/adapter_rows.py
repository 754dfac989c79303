"""What a call's binding gets for the adapters of its rows, and the memory in which several adapters stand side by side.

A call whose rows have one adapter, or none, gets that one's own matrices. For several there are `Places`: an adapter
that joins a batch is written over one that no row has, and nothing else moves. Places are made anew only for a batch
that does not fit, and when they have been too wide for long: a step's products take time for every column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from llmctl.ort.adapters import DOWN, MASK, UP, Adapters, kind_of

NOBODY = -1
PATIENCE = 4
"""To put an adapter side by side takes as long as its products in 2.6 steps (benchmarks/RESULTS.md); narrower places
are made when what they would have saved is somewhat more."""


class Places:
    """Adapters side by side, each in columns of its own; one can be written over another that needs no fewer."""

    def __init__(self, adapters: Adapters, numbers: Sequence[int]) -> None:
        self._adapters = adapters
        self.owners = list(numbers)
        """The number of the adapter that each place holds."""
        self.bytes = sum(adapters.size(number) for number in numbers)
        self.version = 0
        """Rises when an owner changes: masks that were made before are wrong."""
        self._ranks = [adapters.ranks(number) for number in numbers]
        self._arrays = {}
        for site, (rows, columns) in adapters.sites.items():
            width = sum(ranks[kind_of(site)] for ranks in self._ranks)
            self._arrays[site + DOWN] = np.zeros((rows, width), adapters.dtypes[site + DOWN])
            self._arrays[site + UP] = np.zeros((width, columns), adapters.dtypes[site + UP])
        for place, number in enumerate(numbers):
            self._write(place, number)
        # On the CPU these are the arrays' own memory, on a device copies of it.
        self.values: Mapping[str, ort.OrtValue] = {
            name: ort.OrtValue.ortvalue_from_numpy(array, adapters.device, 0) for name, array in self._arrays.items()
        }

    def admit(self, numbers: Set[int], recent: Sequence[int]) -> bool:
        """Give all of them a place; False if there is none for one of them.

        Who has one keeps it. Others lose theirs: the smallest that will do, of those the longest out of use, where
        `recent` has the latest at its end.
        """
        order = {number: position for position, number in enumerate(recent)}
        free = [place for place, owner in enumerate(self.owners) if owner not in numbers]
        free.sort(key=lambda place: (sum(self._ranks[place].values()), order.get(self.owners[place], -1)))
        missing = sorted(numbers - set(self.owners), key=self._adapters.size, reverse=True)
        taken: dict[int, int] = {}
        for number in missing:
            ranks = self._adapters.ranks(number)
            fitting = [one for one in free if all(self._ranks[one][kind] >= rank for kind, rank in ranks.items())]
            if not fitting:
                return False
            taken[fitting[0]] = number
            free.remove(fitting[0])
        self._replace(taken)
        return True

    def masks(self, rows: np.ndarray) -> dict[str, ort.OrtValue]:
        """Which columns are those of the adapters `rows (B,)`, `(B, 1, rank)` by the masks' names."""
        found = {}
        for kind in {kind_of(site) for site in self._adapters.sites}:
            owners = np.repeat(self.owners, [ranks[kind] for ranks in self._ranks])
            own = (owners == rows[:, None, None]).astype(self._adapters.dtypes[kind + MASK])
            found[kind + MASK] = ort.OrtValue.ortvalue_from_numpy(own)
        return found

    def _replace(self, taken: Mapping[int, int]) -> None:
        """New owners for some places."""
        if not taken:
            return
        self.version += 1
        for place in taken:
            self.owners[place] = NOBODY  # if memory ends half-way, as on a device
        for place, number in taken.items():
            self._write(place, number)
        if self._adapters.device != "cpu":
            for name, array in self._arrays.items():
                if array.size:
                    self.values[name].update_inplace(array)
        for place, number in taken.items():
            self.owners[place] = number

    def _write(self, place: int, number: int) -> None:
        """The matrices of an adapter into the arrays, and zeros into columns that it does not need."""
        for name, matrix in self._adapters.feeds(number).items():
            kind, across = kind_of(name.removesuffix(DOWN).removesuffix(UP)), name.endswith(DOWN)
            start = sum(ranks[kind] for ranks in self._ranks[:place])
            columns = slice(start, start + self._ranks[place][kind])
            own = self._arrays[name][:, columns].T if across else self._arrays[name][columns]
            count = matrix.shape[1 if across else 0]
            own[:count], own[count:] = matrix.T if across else matrix, 0


@dataclass(frozen=True)
class _Bound:
    """What a binding has."""

    rows: bytes
    numbers: frozenset[int]
    places: Places | None
    """None if the rows have no more than one adapter."""
    version: int = 0


class RowAdapters:
    """Binds adapters to the calls of one owner of bindings, and does nothing where a binding has the right ones.

    At any time there is one `Places`, no wider than the adapters of the largest batch so far.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._bound: dict[ort.IOBinding, _Bound] = {}
        self._places: Places | None = None
        self._recent: list[int] = []
        """The adapters of batches with several, the latest at the end."""
        self._peak = self._steps = 0
        """The most bytes that a step needed of the places since all of them were needed, and the steps since."""

    def bind(self, binding: ort.IOBinding, rows: np.ndarray) -> None:
        """The rows of this binding's calls have the adapters `rows (B,)`, by their numbers."""
        key, bound = rows.tobytes(), self._bound.get(binding)
        if bound is not None and bound.rows == key and self._stands(bound):
            return
        numbers = frozenset(rows.tolist()) - {0}
        places = self._places_for(numbers) if len(numbers) > 1 else None
        if places is None:
            (number,) = numbers or {0}
            values = {**self._adapters.own(number), **self._adapters.own_masks(number, rows)}
        else:
            kept = bound is not None and bound.places is places
            values = {**places.masks(rows), **({} if kept else places.values)}
        self._bound.pop(binding, None)  # if memory ends half-way, as on a device, the binding has neither
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        self._bound[binding] = _Bound(key, numbers, places, places.version if places else 0)

    def clear(self) -> None:
        """Forget all bindings."""
        self._bound.clear()
        self._places = None

    def _stands(self, bound: _Bound) -> bool:
        """Whether its rows' adapters are still where they were, in places that are not too wide."""
        if bound.places is None:
            return True
        return bound.places is self._places and bound.version == bound.places.version and not self._wide(bound.numbers)

    def _places_for(self, numbers: frozenset[int]) -> Places:
        """With all of these in them."""
        self._recent = [one for one in self._recent if one not in numbers] + sorted(numbers)
        places = self._places
        if places is not None and not self._wide(numbers) and places.admit(numbers, self._recent):
            return places
        chosen, need = sorted(numbers), self._size(numbers)
        self._peak = max(self._peak, need)
        for number in reversed(self._recent):
            if number not in numbers and need + self._adapters.size(number) <= self._peak:
                chosen.append(number)
                need += self._adapters.size(number)
        self._release()
        self._places = made = Places(self._adapters, chosen)
        self._peak = self._steps = 0
        return made

    def _wide(self, numbers: Iterable[int]) -> bool:
        """Count a step of these; whether narrower places would by now have been worth making."""
        assert self._places is not None
        self._steps += 1
        self._peak = max(self._peak, self._size(numbers))
        if self._peak >= self._places.bytes:
            self._peak = self._steps = 0
        return self._steps * (self._places.bytes - self._peak) > PATIENCE * self._peak > 0

    def _size(self, numbers: Iterable[int]) -> int:
        return sum(self._adapters.size(number) for number in numbers)

    def _release(self) -> None:
        """Let go of the places: a binding keeps alive what it has."""
        for binding, bound in list(self._bound.items()):
            if bound.places is not None:
                del self._bound[binding]
                for name, value in self._adapters.own(0).items():
                    binding.bind_ortvalue_input(name, value)
        self._places = None
