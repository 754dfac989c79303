"""The planted corpus: every word is a role and one of two kinds, and stands beside words of its role and its kind."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from llmctl import Artifact
from llmctl.text.vectors import Vectors

ROLES, KINDS = 20, 2
PLANT = {"vector_size": 32, "window": 2, "sample": 0.0, "seed": 1, "split_words": "whitespace"}


def planted_lines(count: int) -> list[str]:
    drawn = random.Random(0)
    lines = []
    for _ in range(count):
        role, kind = drawn.randrange(ROLES), drawn.randrange(KINDS)
        outer = [f"r{role}_{drawn.randrange(3)}", f"g{kind}_{drawn.randrange(3)}"]
        if drawn.random() < 0.5:
            outer.reverse()
        lines.append(f"{outer[0]} w{role}x{kind} {outer[1]}")
    return lines


def accuracy(vectors: Vectors) -> float:
    """Share of the 380 analogies `w i x1 - w i x0 + w j x0` that give `w j x1`."""
    pairs = [(i, j) for i in range(ROLES) for j in range(ROLES) if i != j]
    rows = [[vectors.index[w] for w in (f"w{i}x1", f"w{i}x0", f"w{j}x0")] for i, j in pairs]
    asked = np.array(rows)
    sums = vectors.unit[asked[:, 0]] - vectors.unit[asked[:, 1]] + vectors.unit[asked[:, 2]]
    nearest = vectors.neighbours(sums, 1, rows)
    return float(np.mean([vectors.names[n[0][0]] == f"w{j}x1" for n, (_, j) in zip(nearest, pairs, strict=True)]))


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """40,000 sentences of three words."""
    path: Path = tmp_path_factory.mktemp("planted") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in planted_lines(40_000)))
    return Artifact(path, "dataset.text")
