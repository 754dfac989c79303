"""Which layer of the student is to equal which of the teacher. Free of torch: forecasts ask, too."""

from __future__ import annotations

from collections.abc import Sequence

from llmctl.errors import UsageError

Layers = tuple[tuple[int, int], ...]
"""(layer of the student, layer of the teacher), counted from 0."""


def layer_pairs(student: int, teacher: int, given: Sequence[int] | None = None) -> Layers:
    """Which layers are compared, of models with so many; `given` is `DistillParams.layer_map`.

    By default layer i of the student's n is to equal layer round(i m / n) of the teacher's m, halves rounded up.
    UsageError for a map that does not fit the models.
    """
    if given is None:
        given = [max(1, (2 * layer * teacher + student) // (2 * student)) for layer in range(1, student + 1)]
    if len(given) != student or max(given) > teacher:
        raise UsageError(
            f"layer_map {list(given)} does not fit: the student has {student} layers, the teacher {teacher}",
            hint=f"give {student} numbers from 1 to {teacher}, 0 for layers without one",
        )
    return tuple((layer, goal - 1) for layer, goal in enumerate(given) if goal)
