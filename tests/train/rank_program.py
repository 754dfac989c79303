"""What `test_ranks.py` runs in every rank: the cases of a JSON file, one after the other, each with the loop itself.

`python rank_program.py CASES OUT`, with torchrun's variables; `fault` of a case breaks the loop in one place.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.stage import Context, Helped
from llmctl.train import loop, spread
from llmctl.train.batches import Batch, Example
from llmctl.train.data import ExampleSource, Pick, Source
from llmctl.train.objectives import CausalLM, MaskedLM
from llmctl.train.optimizers import own
from llmctl.train.params import TrainParams
from llmctl.train.parts import local

SHAPE = {
    "arch": "llama",
    "vocab_size": 50,
    "dim": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "context": 32,
    "ff_dim": 48,
}
PARAMS = {
    "max_steps": 5, "batch_size": 8, "clip": 0.5, "warmup_steps": 0, "schedule": "constant", "optimizer": "adamw",
    "lr": 0.01, "log_every": 1, "save_every": 0, "prefetch": 0,
}  # fmt: skip


def examples() -> list[Example]:
    """Sequences of 5 to 29 tokens with very different numbers of targets."""
    rng = np.random.default_rng(0)
    return [Example(rng.integers(0, 50, n), rng.random(n) < rng.random()) for n in rng.integers(5, 30, 64)]


class Pairs(Source):
    """What BERT learns from: 1 to 5 masked tokens in each of 16, and whether a second sentence follows."""

    def batch(self, picks: Sequence[Pick]) -> Batch:
        drawn = [np.random.default_rng(place) for _, place in picks]
        tokens = torch.tensor(np.stack([rng.integers(0, 50, 16) for rng in drawn]))
        counts = [int(rng.integers(1, 6)) for rng in drawn]
        return Batch(
            tokens=tokens,
            picks=torch.cat([torch.arange(count) * 2 + 16 * row for row, count in enumerate(counts)]),
            targets=torch.cat([torch.tensor(rng.integers(0, 50, n)) for rng, n in zip(drawn, counts, strict=True)]),
            size=tokens.numel(),
            segments=torch.zeros_like(tokens),
            labels=torch.tensor([int(rng.integers(0, 2)) for rng in drawn]),
            firsts=torch.arange(len(picks)) * 16,
        )


def make_sparse(model: Transformer) -> None:
    """Half of the weights of every matrix of the blocks become 0."""
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.ndim == 2:
                parameter.masked_fill_(torch.rand(parameter.shape) < 0.5, 0)


def run(case: dict[str, Any], out: Path) -> dict[str, float]:
    """One case; the loss of every step and the final weights go to `out`. Returns the bytes that this rank held."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SHAPE, **case.get("shape", {})}))
    if case.get("double"):
        model.double()
    if case.get("sparse"):
        make_sparse(model)
    params = TrainParams(**{**PARAMS, **case.get("params", {})})
    held: dict[str, float] = {}
    finish = loop._Run.finish

    def measured(self: loop._Run) -> dict[str, float]:
        held["weights"] = sum(local(p.detach()).nbytes for p in self.model.parameters())
        states = [
            value for each in map(own, self.optimizers.all) for state in each.state.values() for value in state.values()
        ]
        held["state"] = sum(local(value).nbytes for value in states)
        return finish(self)

    base = out / case["name"]
    ctx = Context("test", {"metrics": base / "metrics"}, base / "resume", lambda kind, fields: None)
    loop._Run.finish = measured
    try:
        if model.config.head == "pretraining":
            loop.fit(ctx, model, MaskedLM(), Pairs(64, params), params)
        else:
            loop.fit(ctx, model, CausalLM(), ExampleSource(examples(), 32, params), params)
        torch.save(model.state_dict(), base / "weights.pt")
    except Helped:
        pass
    finally:
        loop._Run.finish = finish
    return held


def unreduced_norm(grads: Any) -> torch.Tensor:
    """The norm of this rank's parts alone."""
    return torch.stack([torch.linalg.vector_norm(local(grad)).double() for grad in grads]).norm()


FAULTS = {
    "": lambda: None,
    "clip by the local norm": lambda: setattr(spread, "whole_norm", unreduced_norm),
    "heads are not added up": lambda: setattr(spread.Spread, "reduce", lambda self: None),
    "gradients are not added up": lambda: setattr(
        spread.Spread, "accumulating", lambda self, last: self._root.no_sync()
    ),
    "weights are not added up": lambda: setattr(loop.Ranks, "counted", lambda self, *numbers: list(numbers)),
}


def main() -> None:
    """All cases; each has a port of its own, since the store of the one before may still be there."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    rank, port = os.environ["RANK"], int(os.environ["MASTER_PORT"])
    kept = {name: vars(owner)[name] for owner, name in PATCHED}
    for number, case in enumerate(cases):
        os.environ["MASTER_PORT"] = str(port + number)
        FAULTS[case.get("fault", "")]()
        held = run(case, out)
        for owner, name in PATCHED:
            setattr(owner, name, kept[name])
        (out / case["name"] / f"held-{rank}.json").write_text(json.dumps(held))


PATCHED = ((spread, "whole_norm"), (spread.Spread, "reduce"), (spread.Spread, "accumulating"), (loop.Ranks, "counted"))

if __name__ == "__main__":
    main()
