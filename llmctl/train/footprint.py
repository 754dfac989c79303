"""How much memory each rank of a training needs at its worst moment, and which part of it is the largest.

A pure function of shape, batch, optimizer and ranks, free of torch: it answers before anything is started, for machines
that are not here. `benchmarks/memory.py` compares it with what trainings take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from llmctl.nn.config import ModelConfig
from llmctl.nn.counts import count, matrices
from llmctl.train.activations import FLOAT, Pass, around, block, widest
from llmctl.train.params import TrainParams
from llmctl.train.pipeline_cut import WORDS, cut, in_flight

ALLOCATOR = {"none": 0.45, "selective": 1.5, "full": 1.5}
"""What glibc keeps of freed memory, as a share of what lives, by `recompute`. Measured: .2 to .6, and 1.1 and more
where blocks are freed and taken again within a pass."""
CHUNKED = 1.1
"""The same with `loss_chunk`. Blocks of 32 MiB and more are given back at once."""
RETURNED = 32 << 20
INTEGERS = 8 * 5
"""Bytes per token of a batch: ids, targets, picks, positions and documents, int64 each."""
ADVICE = {
    "weights": "train a smaller model, or share it among more ranks: parallel.dp_shard, tp or pp",
    "casts": "share them among more ranks: parallel.dp_shard, tp or pp",
    "gradients": "share them among more ranks: parallel.dp_shard, tp or pp",
    "optimizer": "optimizer: adamw8bit or adafactor, offload_optimizer on CUDA, or more ranks: parallel.dp_shard",
    "activations": "a smaller micro_batch, recompute: full, or a shorter context",
    "logits": "loss_chunk: 4096, or a smaller micro_batch",
    "work": "another optimizer than muon, or more ranks: parallel.dp_shard, tp or pp",
    "checkpoint": "save_every: 0, which saves at the end alone, or more ranks: parallel.dp_shard",
    "data": "a smaller batch_size, or a lower prefetch",
    "teacher": "a smaller teacher",
    "mean": "ema: 0",
    "allocator": "a smaller micro_batch",
}
"""What to change when a part is the largest of what does not fit."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step computes, apart from the model: `rows` at once of `length` tokens, `micro_batches` of them."""

    rows: int
    length: int
    targets: int
    micro_batches: int = 1
    masked: bool = False
    cuda: bool = False
    product: int = FLOAT
    logits: float | None = None
    """Tensors of the size of the logits that the loss takes at once; None: those of a cross-entropy."""
    beside: Mapping[str, float] = field(default_factory=dict)
    """Bytes that the loss takes beside activations and logits, by part."""

    @classmethod
    def of(cls, params: TrainParams, length: int, *, cuda: bool, **further: object) -> Load:
        """The load of a training whose rows are full; every token is a target unless `targets` says otherwise.

        `micro_batch: auto` counts as one sequence at a time: what it must at least be.
        """
        ranks = params.parallel
        share = max(1, -(-params.batch_size // ranks.data))
        at_once = 1 if params.micro_batch == "auto" else params.sequences_at_once
        smaller = params.precision in ("bf16", "fp16", "fp8") or (params.precision == "auto" and cuda)
        return cls(
            **{  # type: ignore[arg-type]  # fields of this class
                "rows": at_once,
                "length": length // ranks.cp,
                "targets": at_once * length // ranks.cp,
                "micro_batches": -(-share // at_once),
                "masked": params.packing != "none",
                "cuda": cuda,
                "product": 2 if smaller else FLOAT,
                **further,
            }
        )


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank at its worst moment, by part."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=lambda name: self.parts[name])


def footprint(config: ModelConfig, params: TrainParams, load: Load) -> Footprint:
    """The worst moment of the worst rank: of a pipeline, whichever stage needs most."""
    stages = [_Stage(config, params, load, number) for number in range(params.parallel.pp)]
    return max((moment for stage in stages for moment in stage.moments()), key=lambda found: found.total)


class _Stage:
    """One rank's part of the model: all of it, or the stages of a pipeline that are its own."""

    def __init__(self, config: ModelConfig, params: TrainParams, load: Load, number: int) -> None:
        self.config, self.params, self.load = config, params, load
        ranks, depth = params.parallel, config.layers
        first, last = number == 0, number == ranks.pp - 1
        mine = [stage for stage in cut(config, ranks.pp * ranks.virtual_stages) if stage.index % ranks.pp == number]
        self.layers = [layer for stage in mine for layer in range(stage.start, stage.stop)]
        counts, self.matrices = count(config), matrices(config)
        share = len(self.layers) / depth
        outer = (counts.embedding + counts.positions) * (first or (last and config.tie_embeddings))
        self.inner = counts.blocks * share / ranks.tp
        self.outer = (outer + counts.head * last) / ranks.tp
        self.head = config.vocab_size * config.dim / ranks.tp * last * (config.head in WORDS)
        self.tied = first and last and config.tie_embeddings
        self.step = Pass(
            rows=load.rows,
            length=load.length,
            targets=load.targets,
            product=load.product,
            fused=load.cuda,
            recompute=self._recompute(),
            dropout=params.dropout,
            masked=load.masked,
            skips=params.attention == "flex",
            split=ranks.tp,
            cut=ranks.cp,
        )
        self.first, self.last = first, last
        sizes = (ranks.pp, number, max(load.micro_batches, 1), ranks.virtual_stages)
        self.in_flight = in_flight(ranks.pp_schedule, *sizes) if ranks.pp > 1 else 1.0

    def _recompute(self) -> str:
        """Compiled blocks compute again what is cheap, much like `selective`."""
        return "selective" if self.params.compile and self.params.recompute == "none" else self.params.recompute

    @property
    def parameters(self) -> float:
        """Of this stage, before they are sharded."""
        return self.inner + self.outer

    def moments(self) -> Iterator[Footprint]:
        """The end of the forward pass, the head's gradient, the end of the backward pass, the optimizer's step."""
        kept, logits = self.in_flight * self._kept(), self._logits()
        gradients = FLOAT * self.parameters / self.params.parallel.dp_shard
        capped = bool(self.config.logit_softcap)  # its tanh is kept
        by_hand = not self.load.cuda and self.load.product == FLOAT  # llmctl.nn.kernels
        before = gradients if self.load.micro_batches > 1 else 0.0
        head = FLOAT * self.head
        given, beside = self.load.logits, self.load.beside
        most, least = (2 if by_hand else 3, 2) if given is None else (given, given / 2 + 1)
        yield self._at("loss", gradients=before, activations=kept, logits=(most + capped) * logits, **beside)
        held = (least + capped) * logits
        yield self._at("gradient of the head", gradients=before + head, activations=kept, logits=held, **beside)
        late = FLOAT * (self.head if self.tied else 0.0) + (gradients - before if before else 0.0)
        last = self._kept() / max(1, len(self.layers)) + widest(self.config, self.step)
        yield self._at("gradient of the embedding", gradients=gradients + late, activations=last)
        yield self._at("step of the optimizer", gradients=gradients, work=self._work())

    def _at(self, moment: str, **parts: float) -> Footprint:
        ranks, load, params = self.params.parallel, self.load, self.params
        shared = ranks.dp_shard * (ranks.dp_replicate if ranks.shard_optimizer else 1)
        state = 0.0 if params.offload_optimizer else self._state() / shared
        weights = FLOAT * self.parameters / ranks.dp_shard + self._gathered()
        steps = params.prefetch + 2
        rows = load.rows * load.micro_batches
        found = {
            "weights": weights,
            "optimizer": state,
            "mean": FLOAT * self.parameters / ranks.dp_shard if params.ema else 0.0,
            "data": float(rows * load.length * INTEGERS * (1 if load.cuda else steps)),
            **parts,
            "casts": self._casts() if "activations" in parts else 0.0,
        }
        found["checkpoint"] = 0.0 if load.cuda else self._copy(found)
        found["allocator"] = self._allocator(found)
        return Footprint(moment, {name: round(size) for name, size in found.items() if size >= 1})

    def _copy(self, parts: dict[str, float]) -> float:
        """What is written while training goes on: all that a checkpoint holds, or the first one's weights alone."""
        names = ("weights", "optimizer", "mean") if self.params.save_every else ("weights",)
        return sum(parts.get(name, 0.0) for name in names)

    def _allocator(self, parts: dict[str, float]) -> float:
        """What the CPU's allocator holds beyond what lives; CUDA's is torch's own and part of no peak."""
        if self.load.cuda:
            return 0.0
        blocks = sum(parts.values()) - (parts.get("logits", 0.0) if self._logits() >= RETURNED else 0.0)
        return blocks * max(ALLOCATOR[self.step.recompute], CHUNKED if self.params.loss_chunk else 0.0)

    def _casts(self) -> float:
        """Every matrix has a copy in a smaller type as long as its product may be differentiated; of sharded ones those
        of the block at work."""
        if self.load.product == FLOAT:
            return 0.0
        at_once = 1 if self.params.parallel.dp_shard == 1 else max(1, len(self.layers))
        return self.load.product * (self.inner + self.head) / at_once

    def _gathered(self) -> float:
        """Whole weights that sharded ones are gathered into: the block at work and the next, or all (ZeRO-2)."""
        if self.params.parallel.dp_shard == 1:
            return 0.0
        if not self.params.parallel.reshard_after_forward:
            return self.load.product * self.parameters
        return self.load.product * max(2 * self.inner / max(1, len(self.layers)), self.outer)

    def _kept(self) -> float:
        """Activations of one micro-batch; with `recompute` also what one block makes again."""
        total = sum(block(self.config, self.step, layer) for layer in self.layers)
        if self.config.traits.kind == "encoder-decoder":
            total += self.config.encoder_layers * block(self.config, self.step, 0, cross=False)
        if self.step.recompute != "none":
            total += block(self.config, replace(self.step, recompute="none"), self.layers[0] if self.layers else 0)
        return total + (around(self.config, self.step) if self.first or self.last else 0.0)

    def _logits(self) -> float:
        """Bytes of the logits that are held at once."""
        if not self.last or not self.head:
            return 0.0
        chunk = self.params.loss_chunk
        targets = min(chunk, self.load.targets) if chunk else self.load.targets
        return targets * self.config.vocab_size * FLOAT / self.params.parallel.tp

    def _state(self) -> float:
        """Bytes of the optimizer's state, unsharded."""
        small, outer, inner = FLOAT, self.outer, self.inner
        return {
            "muon": small * (inner + 2 * outer),
            "adamw": 2 * small * (inner + outer),
            "adamw8bit": (2 + 2 * small / 256) * inner + 2 * small * outer,
            "adafactor": 0.01 * small * (inner + outer),
            "lion": small * (inner + outer),
            "sgd": small * (inner + outer) * bool(self.params.momentum),
            "schedule-free": 2 * small * (inner + outer),
        }[self.params.optimizer]

    def _work(self) -> float:
        """What a step of the optimizer takes for itself: Muon iterates all matrices of one shape together."""
        largest: float = max((rows * columns for rows, columns in self.matrices), default=0)
        largest = max(largest, self.config.vocab_size * self.config.dim * bool(self.outer)) / self.params.parallel.tp
        if self.params.optimizer == "muon":
            size = 2 if self.load.cuda else FLOAT
            share = len(self.layers) / self.config.layers / self.params.parallel.tp
            groups = (n * share * _muon(rows, columns, size) for (rows, columns), n in self.matrices.items())
            return max(groups, default=0.0)
        if self.params.optimizer in ("adamw", "schedule-free") and not self.params.cautious_decay:
            return 0.0 if self.params.optimizer == "adamw" else 3 * FLOAT * largest
        return (6 if self.params.optimizer == "adamw8bit" else 3) * FLOAT * largest


def _muon(rows: int, columns: int, size: int) -> float:
    """Bytes per matrix: directions in float32, three tensors like it in the iteration, and two Gram matrices."""
    return FLOAT * rows * columns + size * (3 * rows * columns + 2 * min(rows, columns) ** 2)
