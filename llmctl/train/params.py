"""The parameters every training stage shares. Free of torch; each stage subclasses it with its own defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params


class TrainParams(Params):
    """How far, how fast and how exactly to train.

    Thread count, device and checkpoint interval are in no cache key, as the world size is not (they are recorded): they
    change sums in the last bits only. Raising `max_steps` or `epochs` continues from the last checkpoint, of a run that
    has ended too; a schedule that decays towards the end is then stretched over the new length from there on.
    """

    epochs: float = Field(1.0, gt=0, affects="extent", description="Passes over the training data.")
    max_steps: int | None = Field(None, ge=1, affects="extent", description="Optimizer steps; wins over `epochs`.")
    batch_size: int = Field(16, ge=1, description="Sequences per optimizer step.")
    micro_batch: int = Field(
        0, ge=0, description="Sequences computed at a time; gradients add up to those of the whole batch. 0: all."
    )
    packing: Literal["documents", "none"] = Field(
        "documents",
        description="`documents`: several per row, none sees another; `none`: one per row, padded. Equal losses.",
    )

    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="`muon`: Muon for the hidden matrices, AdamW for the rest; `adamw`: AdamW for all."
    )
    lr: float = Field(0.02, gt=0, description="Peak learning rate of the hidden matrices.")
    embedding_lr: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of embeddings, head, norms, biases. Unset: 1.5 lr with muon, lr with adamw.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled decay of the hidden matrices, times the rate.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the mean gradient.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW: decay of the mean squared gradient.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon: Nesterov momentum.")
    muon_scale: Literal["original", "match_rms_adamw"] = Field(
        "original",
        description="Muon's rate per matrix: lr sqrt(max(1, rows/columns)), or 0.2 lr sqrt(max(rows, columns)).",
    )
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; longer gradients are scaled down. 0: off.")

    schedule: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine", description="Rate after warm-up; `wsd` holds it, then falls linearly."
    )
    warmup_steps: int = Field(20, ge=0, description="Steps over which the rate rises linearly.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Rate at the end as a share of the peak.")
    decay_share: float = Field(0.5, gt=0, le=1, description="Last share of all steps over which `wsd` falls.")

    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto", description="`bf16` computes in mixed precision. `auto`: bf16 on CUDA, float32 on CPU."
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
    device: Literal["auto", "cpu", "cuda"] = Field("auto", affects="nothing", description="Where to train.")
    threads: int = Field(0, ge=0, affects="nothing", description="CPU threads; 0: all cores, or OMP_NUM_THREADS.")
    compile: bool = Field(False, description="Compile the model with torch.compile; needs a C++ compiler on CPU.")
    seed: int = Field(0, ge=0, description="Fresh weights and the order of the data follow from it.")

    save_every: int = Field(100, ge=0, affects="nothing", description="Steps between checkpoints; 0: only when asked.")
    eval_every: int = Field(0, ge=0, affects="nothing", description="Steps between validations; 0: only at the end.")
    eval_batches: int = Field(16, ge=1, description="Batches per validation, spread over the split.")
    log_every: int = Field(10, ge=1, affects="nothing", description="Steps between points of the curves.")

    @model_validator(mode="after")
    def _check(self) -> TrainParams:
        if self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch {self.micro_batch} is larger than batch_size {self.batch_size}")
        return self

    @property
    def sequences_at_once(self) -> int:
        """`micro_batch` with its default filled in."""
        return self.micro_batch or self.batch_size

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

    too_long: Literal["drop", "error"] = Field(
        "drop", description="What to do with a conversation longer than the model's context."
    )
    max_dropped: float = Field(
        0.1, ge=0, le=1, description="Largest share of conversations that may be dropped as too long or without answer."
    )
