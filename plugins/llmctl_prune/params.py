"""What can be set for `prune`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from llmctl.spec.params import Field, Params


class PruneParams(Params):
    """How much to remove, and how what matters is found."""

    method: Literal["structured"] = Field(
        "structured", description="`structured` removes whole MLP channels and layers; the model becomes smaller."
    )
    mlp_width_removed: float = Field(
        0.45, ge=0, lt=1, description="Share of the MLP width to remove; the width kept is rounded up to 8 channels."
    )
    layers_removed: int = Field(0, ge=0, description="Layers to remove, before the width.")
    importance: Literal["activation", "magnitude", "random"] = Field(
        "activation",
        description="`activation`: mean activation times weight norm, and block influence, on the calibration data; "
        "`magnitude`: weight norms; `random`: the control.",
    )
    calibration_tokens: int = Field(32_768, ge=1, description="Tokens of the train split to measure importance on.")
    evaluation_tokens: int = Field(32_768, ge=1, description="Tokens of the validation split to measure the loss on.")
    seed: int = Field(0, ge=0, description="Seed of the choice of calibration documents, and of `random`.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", affects="nothing", description="Where to compute.")
    threads: int = Field(0, ge=0, affects="nothing", description="CPU threads; 0: all cores.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.mlp_width_removed == 0 and self.layers_removed == 0:
            raise ValueError("nothing to remove: set mlp_width_removed or layers_removed")
        return self
