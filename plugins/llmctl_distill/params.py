"""Parameters of `distill`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from llmctl.spec.params import Field
from llmctl.train.params import AnswerParams

Method = Literal["logits", "sequences", "hidden", "on-policy"]
DIVERGENCE = ("temperature", "divergence", "beta")
WRITTEN = ("max_new_tokens", "sampling_temperature", "top_k", "top_p")
OWN: dict[str, tuple[str, ...]] = {
    "logits": (*DIVERGENCE, "alpha"),
    "sequences": (*WRITTEN, "beams"),
    "hidden": (*DIVERGENCE, "alpha", "layer_map", "hidden_loss", "hidden_weight", "relations", "relation_weight"),
    "on-policy": (*DIVERGENCE, *WRITTEN, "on_policy_share"),
}
"""By method: the parameters that it reads beside those of all."""


class DistillParams(AnswerParams):
    """Knowledge distillation; `batch_size` counts conversations, or rows of tokens."""

    method: Method = Field(
        "logits",
        description="`logits`: the teacher's distribution at every target (1503.02531). `sequences`: cross-entropy of "
        "answers that the teacher writes (1606.07947). `hidden`: `logits`, and the teacher's states (1910.01108, "
        "2002.10957). `on-policy`: the teacher's distribution at every target of answers that the student writes "
        "(GKD, 2306.13649).",
    )
    temperature: float = Field(
        1.0, gt=0, description="Both distributions are softened by it; the loss is multiplied by its square."
    )
    divergence: Literal["forward-kl", "reverse-kl", "jsd"] = Field(
        "forward-kl",
        description="`forward-kl`: KL(teacher, student); `reverse-kl`: KL(student, teacher); `jsd`: generalized "
        "Jensen-Shannon (2306.13649).",
    )
    beta: float | None = Field(
        None,
        ge=0,
        le=1,
        description="jsd: the teacher's share in the mixture that both are compared with. 0 is `forward-kl`, 1 "
        "`reverse-kl`. Unset: .5, which is symmetric.",
    )
    alpha: float = Field(
        0.0, ge=0, le=1, description="Share of the cross-entropy of the data's own tokens; 0: the teacher alone."
    )
    layer_map: list[int] | None = Field(
        None,
        description="hidden: for each layer of the student the teacher's layer that it is to equal, counted from 1; "
        "0: none. Unset: evenly spaced, the last to the last.",
    )
    hidden_loss: Literal["cosine", "mse"] = Field(
        "cosine", description="hidden: 1 - cosine, or the mean squared difference of the channels."
    )
    hidden_weight: float = Field(1.0, ge=0, description="hidden: weight of the states' loss beside that of the logits.")
    relations: Literal["none", "values", "attention", "both"] = Field(
        "none",
        description="hidden: what of the last layers' relations between tokens is matched as well: of values, the "
        "attention weights, or both (2002.10957).",
    )
    relation_weight: float | None = Field(
        None, gt=0, description="hidden: weight of the relations' loss beside that of the logits. Unset: 1."
    )
    on_policy_share: float = Field(
        0.5, gt=0, le=1, description="on-policy: share of steps whose answers the student writes, not the data."
    )
    max_new_tokens: int = Field(128, ge=1, description="sequences, on-policy: longest answer that is written.")
    sampling_temperature: float | None = Field(
        None,
        ge=0,
        description="sequences, on-policy: of the draws; 0: greedy. Unset: 0 for sequences, 1 for on-policy.",
    )
    top_k: int = Field(0, ge=0, description="sequences, on-policy: likeliest tokens to draw from; 0: all.")
    top_p: float = Field(1.0, gt=0, le=1, description="sequences, on-policy: their mass to draw from.")
    beams: int = Field(1, ge=1, description="sequences: width of a beam search; 1: none.")
    epochs: float = Field(3.0, gt=0, affects="extent", description="Passes over the data.")
    batch_size: int = Field(32, ge=1, description="Conversations, or rows of tokens, per optimizer step.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for reason in (self._foreign(), self._idle(), self._cannot()):
            if reason:
                raise ValueError(reason)
        return self

    def _foreign(self) -> str:
        """Which parameter of another method differs from its default, empty if none does."""
        own, fields = OWN[self.method], type(self).model_fields
        for name in sorted({name for names in OWN.values() for name in names}.difference(own)):
            if getattr(self, name) != fields[name].default:
                methods = [method for method, names in OWN.items() if name in names]
                return f"{name} is of the method {' or '.join(methods)}, not of {self.method}"
        return ""

    def _idle(self) -> str:
        """Which parameter would change nothing beside another, empty if none would."""
        if self.beta is not None and self.divergence != "jsd":
            return f"beta is of the divergence jsd, not of {self.divergence}"
        if self.alpha == 1 and self.divergence != "forward-kl":
            return f"alpha 1 leaves the teacher's distributions out: drop divergence {self.divergence}, or lower alpha"
        if self.relation_weight is not None and self.relations == "none":
            return "relation_weight weighs relations, of which there are none: set relations"
        if self.hidden_weight == 0 and (self.hidden_loss != "cosine" or self.layer_map is not None):
            return "hidden_weight 0 leaves the states out: drop hidden_loss and layer_map, or raise it"
        if self.hidden_weight == 0 and self.method == "hidden" and self.relations == "none":
            return "hidden_weight 0 without relations leaves the logits alone: that is the method logits"
        if self.layer_map is not None and (min(self.layer_map, default=0) < 0 or not any(self.layer_map)):
            return f"layer_map {self.layer_map} names no layer: give numbers from 1, and 0 for layers without one"
        if self.beams > 1 and self.drawn_at:
            return f"sampling_temperature {self.drawn_at:g} draws at random, beams do not: set one of them alone"
        if self.method in ("sequences", "on-policy") and not self.drawn_at and (self.top_k or self.top_p < 1):
            return "top_k and top_p are for draws, and sampling_temperature 0 draws none: raise it"
        return ""

    def _cannot(self) -> str:
        """What the method cannot do in this way, empty if it can."""
        ranks = self.parallel
        if self.method in ("hidden", "on-policy") and ranks.world > ranks.dp_replicate:
            return f"the method {self.method} needs whole models: of parallel only dp_replicate goes with it"
        if self.method == "on-policy" and (self.compile or self.precision == "fp8"):
            name = "compile" if self.compile else "precision fp8"
            return f"{name} does not go with the method on-policy: answers are written token by token"
        return ""

    def outputs(self) -> set[str]:
        """The model and the metrics; answers where the teacher writes some."""
        return {"model", "metrics"} | ({"answers"} if self.method == "sequences" else set())

    @property
    def mixture(self) -> float:
        """The divergence as the beta of the generalized Jensen-Shannon divergence: 0 forward KL, 1 reverse KL."""
        ends = {"forward-kl": 0.0, "reverse-kl": 1.0}
        return ends.get(self.divergence, 0.5 if self.beta is None else self.beta)

    @property
    def drawn_at(self) -> float:
        """`sampling_temperature` with its default filled in."""
        if self.sampling_temperature is not None:
            return self.sampling_temperature
        return 1.0 if self.method == "on-policy" else 0.0
