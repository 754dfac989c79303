"""What TRL's `GKDTrainer.generalized_jsd_loss` says of random logits: values and gradients, as JSON.

    python -m venv peers && peers/bin/pip install trl torch
    peers/bin/python benchmarks/peers/trl_jsd.py > tests/plugins/training/trl_jsd.json

TRL softens both distributions and does not multiply by the square of the temperature.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os

import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import trl  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (0.5, 1.0, 2.0)
IGNORED = -100


def main() -> None:
    """Print logits, labels of which some are ignored, and TRL's sum over the others with its gradient."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", type=int, nargs=3, default=(2, 3, 7), help="rows, tokens, vocabulary")
    args = parser.parse_args()
    random = torch.Generator().manual_seed(args.seed)
    student, teacher = (torch.randn(args.shape, generator=random, dtype=torch.float64) * 3 for _ in range(2))
    labels = torch.randint(args.shape[2], args.shape[:2], generator=random)
    labels[:, 0] = IGNORED
    cases = []
    for beta, temperature in itertools.product(BETAS, TEMPERATURES):
        given = student.clone().requires_grad_()
        loss = GKDTrainer.generalized_jsd_loss(given, teacher, labels, beta, temperature, reduction="sum")
        loss.backward()
        cases.append({"beta": beta, "temperature": temperature, "loss": loss.item(), "gradient": given.grad.tolist()})
    inputs = {"student": student.tolist(), "teacher": teacher.tolist(), "labels": labels.tolist()}
    command = f"python benchmarks/peers/trl_jsd.py --seed {args.seed} --shape {' '.join(map(str, args.shape))}"
    print(json.dumps({"made by": command, "trl": trl.__version__, **inputs, "cases": cases}))


if __name__ == "__main__":
    main()
