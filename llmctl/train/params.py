"""The parameters every training stage shares. Free of torch; each stage subclasses it with its own defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params
from llmctl.train.parallel import ParallelParams, misfit, sequences_at_once

Optimizer = Literal["muon", "adamw", "adamw8bit", "adafactor", "lion", "sgd", "schedule-free"]
Schedule = Literal["cosine", "wsd", "linear", "inverse-sqrt", "constant"]
CAUTIOUS = ("muon", "adamw", "adamw8bit", "lion", "sgd")
"""Optimizers whose decay can be cautious: those whose update is one direction, known before it is applied."""


class GroupParams(Params):
    """What differs for some of the parameters; what is unset is as for the others of their kind."""

    lr: float | None = Field(None, gt=0, description="Peak learning rate.")
    beta1: float | None = Field(None, ge=0, lt=1, description="As `beta1`, of optimizers that have it.")
    beta2: float | None = Field(None, ge=0, lt=1, description="As `beta2`, of optimizers that have it.")
    weight_decay: float | None = Field(None, ge=0, description="Decoupled decay, times the rate.")


class TrainParams(Params):
    """How far, how fast and how exactly to train.

    Thread count, device and checkpoint interval are in no cache key, as the world size is not (they are recorded): they
    change sums in the last bits only. Raising `max_steps` or `epochs` continues from the last checkpoint, of a run that
    has ended too; a schedule that decays towards the end is then stretched over the new length from there on.
    """

    epochs: float = Field(1.0, gt=0, affects="extent", description="Passes over the training data.")
    max_steps: int | None = Field(None, ge=1, affects="extent", description="Optimizer steps; wins over `epochs`.")
    batch_size: int = Field(16, ge=1, description="Sequences per optimizer step.")
    micro_batch: int | Literal["auto"] = Field(
        0,
        description="Sequences computed at a time; gradients add up to those of the whole batch. 0: all. "
        "`auto`: the most that fit the memory, found before the first step. With parallel.pp, 0: as few as make four "
        "micro-batches per process.",
    )
    packing: Literal["documents", "best-fit", "crop", "none"] = Field(
        "documents",
        description="`documents`: laid end to end and cut into rows; `best-fit`: cut only if longer than a row; "
        "`crop`: each row starts with a document, what fits nowhere is dropped; `none`: one per row, padded.",
    )

    prefetch: int = Field(
        2, ge=0, affects="nothing", description="Steps whose batches a thread makes ahead; 0: none, and no thread."
    )

    optimizer: Optimizer = Field(
        "muon",
        description="`muon`: Muon for the hidden matrices, AdamW for the rest. `adamw8bit`: moments in 8 bits. "
        "`schedule-free`: AdamW whose mean of all steps is the model.",
    )
    lr: float = Field(0.02, gt=0, description="Peak learning rate of the hidden matrices.")
    embedding_lr: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of embeddings, head, norms, biases. Unset: 1.5 lr with muon, else lr.",
    )
    head_lr: float | None = Field(
        None, gt=0, description="Peak learning rate of an output matrix of its own. Unset: embedding_lr."
    )
    vector_lr: float | None = Field(
        None, gt=0, description="Peak learning rate of norms and biases. Unset: embedding_lr."
    )
    scale_lr_with_batch: Literal["none", "sqrt", "linear"] = Field(
        "none", description="Multiply all rates by (batch_size / reference_batch), or by its root."
    )
    reference_batch: int = Field(16, ge=1, description="The batch size that the given rates were tuned for.")
    scale_lr_with_width: Literal["none", "sqrt", "inverse"] = Field(
        "none",
        description="For a model wider than reference_width: `sqrt` lowers every rate but Muon's by the root of the "
        "ratio (nanochat); `inverse` that of the hidden matrices by the ratio (muP), Muon's excepted.",
    )
    reference_width: int = Field(768, ge=1, description="The width of the model that the given rates were tuned for.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled decay of the hidden matrices, times the rate.")
    decay_embeddings: bool = Field(False, description="Decay embeddings and head as well; norms and biases never.")
    cautious_decay: bool = Field(False, description="Decay only weights that the update shrinks, too (2510.12402).")
    decay_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Weight decay over the run: the same, or falling to 0."
    )
    groups: dict[str, GroupParams] = Field(
        {},
        description="What differs for some parameters, by kind (matrix, embedding, head, vector) or a part of their "
        "names (value_embedding, q, norm, …); later entries win.",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the mean gradient; Lion: its share in the update.")
    beta2: float = Field(
        0.95, ge=0, lt=1, description="Decay of the mean squared gradient; Lion: of its mean gradient, usually 0.99."
    )
    epsilon: float = Field(1e-8, gt=0, description="Added to the root of the mean squared gradient.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon and SGD: momentum.")
    momentum_warmup: int = Field(
        0,
        ge=0,
        description="Muon and SGD: steps over which momentum rises from momentum_start. 0: none.",
    )
    momentum_start: float = Field(0.85, ge=0, lt=1, description="Momentum of the first step, with momentum_warmup.")
    momentum_end: float | None = Field(
        None, ge=0, lt=1, description="Momentum of the last step; it falls over decay_share. Unset: it stays."
    )
    nesterov: bool = Field(True, description="Muon and SGD: look ahead along the momentum.")
    muon_scale: Literal["original", "match_rms_adamw"] = Field(
        "original",
        description="Muon's rate per matrix: lr sqrt(max(1, rows/columns)), or 0.2 lr sqrt(max(rows, columns)).",
    )
    muon_iteration: Literal["newton-schulz", "polar-express"] = Field(
        "newton-schulz",
        description="Muon: the polynomials that orthogonalise; `polar-express` comes closer (2505.16932).",
    )
    muon_equalise: Literal["none", "rows", "columns", "both"] = Field(
        "none", description="Muon: bring rows or columns to one norm before orthogonalising (MuonEq, 2603.28254)."
    )
    muon_renormalise: bool = Field(
        False, description="Muon: give each update the norm of an exactly orthogonal matrix (Muon+, 2602.21545)."
    )
    muon_variance: bool = Field(
        False, description="Muon: level the size of a matrix's rows, or of its columns if those are more (NorMuon)."
    )
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; longer gradients are scaled down. 0: off.")
    keep_zeros: bool = Field(
        False,
        description="Weights of the hidden matrices that are 0 in the model that is given stay 0, as after `prune`.",
    )
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of a running mean of the weights, which becomes the model. 0: off."
    )

    schedule: Schedule = Field("cosine", description="Rate after warm-up; `wsd` holds it, then falls linearly.")
    warmup_steps: int = Field(20, ge=0, description="Steps over which the rate rises linearly.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Least rate after warm-up as a share of the peak.")
    decay_share: float = Field(0.5, gt=0, le=1, description="Last share of all steps over which `wsd` falls.")

    on_nonfinite: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="When loss or gradient are not finite: end, leave out the step, or go back to the last checkpoint "
        "and on with the next batch.",
    )
    spike_factor: float = Field(
        0.0, ge=0, description="A loss above this many times the median of the last 64 is a spike. 0: none is."
    )
    on_spike: Literal["skip", "rewind"] = Field("skip", description="What to do at a spike; as with on_nonfinite.")

    precision: Literal["auto", "float32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="Of products; weights are float32. `fp16` scales the loss, `fp8` is bf16 with the blocks' linear "
        "layers in 8 bits (Hopper). `auto`: bf16 on CUDA, float32 on CPU.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        affects="nothing",
        description="What is computed again for the gradient instead of kept: all inside a block, or what is cheap.",
    )
    loss_chunk: int = Field(
        0, ge=0, description="Targets whose logits are held at a time; the loss is the same. 0: all."
    )
    offload_optimizer: bool = Field(
        False, affects="nothing", description="Keep the optimizer's state in the host's memory; CUDA only."
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of embeddings, attention weights and sub-layers' outputs zeroed in training.",
    )
    attention: Literal["sdpa", "flex"] = Field(
        "sdpa", affects="nothing", description="`flex`: skips what packed documents and windows hide; CUDA only."
    )
    parallel: ParallelParams = Field(
        ParallelParams(), affects="nothing", description="How many processes train together, and what each holds."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", affects="nothing", description="Where to train.")
    threads: int = Field(0, ge=0, affects="nothing", description="CPU threads; 0: all cores, or OMP_NUM_THREADS.")
    compile: bool = Field(
        False, description="Compile the blocks with torch.compile, equal ones once; needs a C++ compiler on CPU."
    )
    seed: int = Field(0, ge=0, description="Fresh weights and the order of the data follow from it.")

    save_every: int = Field(100, ge=0, affects="nothing", description="Steps between checkpoints; 0: only when asked.")
    eval_every: int = Field(0, ge=0, affects="nothing", description="Steps between validations; 0: only at the end.")
    eval_batches: int = Field(16, ge=1, description="Batches per validation, spread over the split.")
    log_every: int = Field(10, ge=1, affects="nothing", description="Steps between points of the curves.")

    @model_validator(mode="after")
    def _check(self) -> TrainParams:
        if self.micro_batch != "auto" and not 0 <= self.micro_batch <= self.batch_size:
            raise ValueError(f"micro_batch {self.micro_batch} is not between 0 and batch_size {self.batch_size}")
        if self.cautious_decay and self.optimizer not in CAUTIOUS:
            raise ValueError(f"cautious_decay works with {', '.join(CAUTIOUS)}, not with {self.optimizer}")
        if 0 < self.spike_factor <= 1:
            raise ValueError(f"spike_factor {self.spike_factor:g} makes half of all losses spikes: 0 or above 1")
        if self.optimizer == "schedule-free":
            if self.schedule != "constant":
                raise ValueError("schedule-free replaces the schedule: set schedule to constant")
            if self.ema:
                raise ValueError("schedule-free has a mean of the weights of its own: set ema to 0")
            if self.keep_zeros:
                raise ValueError("keep_zeros does not reach the mean that schedule-free makes the model")
            if not self.beta1:
                raise ValueError("schedule-free needs beta1 above 0")
        if reason := misfit(self):
            raise ValueError(reason)
        return self

    def processes(self) -> int:
        """Those of `parallel`."""
        return self.parallel.world

    def restarts(self) -> int:
        """Those of `parallel`."""
        return self.parallel.max_restarts

    @property
    def sequences_at_once(self) -> int:
        """`micro_batch` with its default filled in, at most a process's share of the batch; with `auto` what is tried
        first."""
        share = max(1, self.batch_size // self.parallel.data)
        if self.parallel.pp > 1 and not self.micro_batch:
            return sequences_at_once(share, self.parallel.pp)
        return share if self.micro_batch == "auto" else min(self.micro_batch or share, share)

    @property
    def micro_batches(self) -> int:
        """How many forward passes a process makes per step."""
        return -(-(self.batch_size // self.parallel.data) // self.sequences_at_once)

    @property
    def rest_lr(self) -> float:
        """`embedding_lr` with its default filled in."""
        if self.embedding_lr is not None:
            return self.embedding_lr
        return 1.5 * self.lr if self.optimizer == "muon" else self.lr

    def resume_facts(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to be continued: everything that affects the output."""
        facts = self.model_dump()
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("affects") != "output":
                del facts[name]
        return facts


class AnswerParams(TrainParams):
    """Training on conversations: `batch_size` counts conversations (or pairs), however they are packed."""

    packing: Literal["documents", "none"] = Field(
        "documents",
        description="`documents`: several per row, none sees another; `none`: one per row, padded. Equal losses.",
    )
    too_long: Literal["drop", "error"] = Field(
        "drop", description="What to do with a conversation longer than the model's context."
    )
    max_dropped: float = Field(
        0.1, ge=0, le=1, description="Largest share of conversations that may be dropped as too long or without answer."
    )
