"""What `test_pipeline.py` and `test_context_parallel.py` run in every rank: cases of `rank_program.py` with faults of
their own, and pieces that need no loop. `python stage_program.py CASES OUT`, with torchrun's variables.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import rank_program
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Transformer
from llmctl.train import context_parallel
from llmctl.train.batches import Batch, Example, pack
from llmctl.train.context_parallel import cut_sequences, share
from llmctl.train.objectives import CausalLM, MaskedLM
from llmctl.train.parallel import ParallelParams
from llmctl.train.pipeline_schedules import Pipeline
from llmctl.train.pipeline_stages import Relay
from llmctl.train.ranks import joined

SHAPE = {"arch": "llama", "vocab_size": 50, "dim": 32, "layers": 4, "heads": 4, "context": 48, "ff_dim": 48}
PAUSE = 0.02
"""Seconds that a stage takes at least: long enough for the stages' times to be told apart on a busy machine."""


def make(shape: dict[str, Any], double: bool = True) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(ModelConfig(**{**SHAPE, **shape}))
    for parameter in model.parameters():
        if not parameter.any():  # what begins with nothing in it would test nothing
            nn.init.normal_(parameter, std=0.02)
    return model.double() if double else model


def packed(count: int, together: bool = True) -> list[Batch]:
    """Micro-batches of different shapes: several documents to a row with `together`, else one."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(count):
        lengths = rng.integers(4, 30, 4)
        rows = [Example(rng.integers(0, 50, n), np.append(rng.random(n - 1) < 0.6, True)) for n in lengths]
        found.append(pack(rows, 37, together))
    return found


def reference(model: Transformer, objective: Any, batches: list[Batch], weight: int) -> dict[str, Tensor]:
    """Gradients of one process, by name."""
    for batch in batches:
        (objective.loss(model, batch)[0] / weight).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(float((found[name] - wanted[name]).abs().max()) for name in found)


def stages(case: dict[str, Any], group: dist.ProcessGroup, rank: int) -> dict[str, Any]:
    """Gradients, evaluation and names of a model in stages, against the whole one."""
    whole, alone = make(case["shape"]), make(case["shape"])
    names, weights = set(whole.state_dict()), alone.state_dict()
    objective = MaskedLM() if whole.config.traits.kind == "encoder" else CausalLM(accuracy=True)
    batches = packed(4)
    weight = sum(objective.weight(batch) for batch in batches)
    wanted = reference(alone, objective, batches, weight)
    pipeline = Pipeline(whole, group, case.get("schedule", "1f1b"), case.get("virtual", 1))
    sums = pipeline.gradients(objective, batches, 1 / weight)
    found = {name: p.grad.clone() for name, p in pipeline.relay.named_parameters() if p.grad is not None}
    with torch.no_grad(), pipeline.relay.eval().answering():
        alone.eval()
        seen = float((objective.loss(pipeline.relay, batches[0])[0] - objective.loss(alone, batches[0])[0]).abs())
    own = pipeline.relay.state_dict()
    norm = pipeline.clip(0.5)
    pipeline.relay.reunite()
    back = whole.state_dict() if rank == 0 else weights
    return {
        "gradient": largest(found, wanted),
        "norm": abs(float(norm) - float(nn.utils.get_total_norm(wanted.values()))),
        "losses": sorted(sums),
        "evaluation": seen,
        "subset": set(own) < names and all(torch.equal(own[name], weights[name]) for name in own),
        "names": sorted(own),
        "whole": sorted(names),
        "back": set(back) == names and all(torch.equal(back[name], weights[name]) for name in names),
    }


def timeline(case: dict[str, Any], group: dist.ProcessGroup, rank: int) -> list[tuple[float, float]]:
    """When this rank's stage computed: of a pipeline, or of micro-batches that go through it one after another."""
    times: list[tuple[float, float]] = []

    def timed(name: str) -> Any:
        kept = getattr(PipelineStage, name)

        def call(self: PipelineStage, *given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            time.sleep(PAUSE)
            found = kept(self, *given, **named)
            times.append((start, time.perf_counter()))
            return found

        setattr(PipelineStage, name, call)
        return kept

    pipeline, objective, batches = Pipeline(make({}), group, case["schedule"]), CausalLM(), packed(4)
    kept = {name: timed(name) for name in ("forward_one_chunk", "backward_one_chunk")}
    for part in [[batch] for batch in batches] if case["sequential"] else [batches]:
        pipeline.gradients(objective, part, 1.0)
    for name, method in kept.items():
        setattr(PipelineStage, name, method)
    return times


def cut(case: dict[str, Any], group: dist.ProcessGroup, rank: int) -> dict[str, Any]:
    """Logits and gradients of sequences cut across ranks, against whole ones."""
    whole, alone, objective = make(case["shape"]), make(case["shape"]), CausalLM()
    batches = packed(2, case["together"])
    weight = sum(objective.weight(batch) for batch in batches)
    if case.get("prefix"):
        for batch in batches:
            object.__setattr__(batch, "prefix", (torch.arange(batch.tokens.shape[1]) < 9).expand_as(batch.tokens))
    wanted = reference(alone, objective, batches, weight)
    cut_sequences(whole, group)
    worst = 0.0
    for batch in batches:
        part = share(batch, rank, group.size())
        (objective.loss(whole, part)[0] / weight).backward()
        own = {"positions": part.positions, "documents": part.documents, "prefix": part.prefix}
        every = {name: getattr(batch, name) for name in own}
        logits = context_parallel.whole_rows(whole(part.tokens, **own), 1, group)[:, : batch.tokens.shape[1]]
        real = slice(None) if batch.documents is None else batch.documents != -1
        worst = max(worst, float((logits - alone(batch.tokens, **every))[real].detach().abs().max()))
    grads = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    for grad in grads.values():
        dist.all_reduce(grad, group=group)
    return {"logits": worst, "gradient": largest(grads, wanted)}


PIECES = {"stages": stages, "timeline": timeline, "cut": cut}


def own_norm(self: Pipeline, largest: float) -> Tensor:
    """Clips by the norm of this rank's stages alone."""
    return nn.utils.clip_grad_norm_(self.relay.parameters(), largest)


def own_part(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
    """What this rank's own queries say of its keys."""
    return grads[0].chunk(ctx.group.size())[ctx.group.rank()], None


rank_program.FAULTS |= {
    "tied gradients are not added up": lambda: setattr(Relay, "join_shared", lambda self: None),
    "clip by the stage's norm": lambda: setattr(Pipeline, "clip", own_norm),
    "gradients of keys are not added up": lambda: setattr(
        context_parallel._Gathered, "backward", staticmethod(own_part)
    ),
}
rank_program.PATCHED = (
    *rank_program.PATCHED,
    (Relay, "join_shared"),
    (Pipeline, "clip"),
    (context_parallel._Gathered, "backward"),
)


def main() -> None:
    """The pieces in one group of processes, then the cases of the loop."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    pieces = [case for case in cases if "piece" in case]
    if pieces:
        ranks = int(os.environ["WORLD_SIZE"])
        with joined(ParallelParams(pp=ranks), torch.device("cpu")) as found:
            for case in pieces:
                value = PIECES[case["piece"]](case, found.group("pp"), found.rank)
                (out / f"{case['name']}-{found.rank}.json").write_text(json.dumps(value))
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    Path(sys.argv[1]).with_suffix(f".{os.environ['RANK']}").write_text(
        json.dumps([c for c in cases if "piece" not in c])
    )
    sys.argv[1] = str(Path(sys.argv[1]).with_suffix(f".{os.environ['RANK']}"))
    rank_program.main()


if __name__ == "__main__":
    main()
