"""What can be set for `prune`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from llmctl.spec.params import Field, Params

Pattern = Literal["unstructured", "2:4", "4:8"]
GROUPS: dict[str, tuple[int, int]] = {"2:4": (2, 4), "4:8": (4, 8)}
"""Of each pattern in groups: how many weights go, and of how many that lie side by side along a row."""
_SPARSE = frozenset({"sparsity", "pattern"})
_MEASURED = frozenset({"calibration_tokens", "seed"})
READ: dict[str, frozenset[str]] = {
    "structured": _MEASURED | {"mlp_width_removed", "heads_removed", "layers_removed", "importance"},
    "magnitude": _SPARSE,
    "wanda": _SPARSE | _MEASURED,
    "sparsegpt": _SPARSE | _MEASURED | {"damping", "column_block"},
}
"""What each method reads beside what all do."""


class PruneParams(Params):
    """How much to remove, and how what matters is found."""

    method: Literal["structured", "magnitude", "wanda", "sparsegpt"] = Field(
        "structured",
        description="`structured` removes whole MLP channels, attention heads and layers; the model becomes smaller. "
        "The others set single weights of the blocks' matrices to 0: the smallest (`magnitude`), the smallest times "
        "their input's norm (`wanda`, 2306.11695), or with an update of the others (`sparsegpt`, 2301.00774).",
    )
    mlp_width_removed: float = Field(
        0.45, ge=0, lt=1, description="Share of the MLP width to remove; the width kept is rounded up to 8 channels."
    )
    heads_removed: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the attention heads to remove from every layer: key/value heads with all their query "
        "heads; those kept are rounded up.",
    )
    layers_removed: int = Field(0, ge=0, description="Layers to remove, before the heads and the width.")
    importance: Literal["activation", "magnitude", "random"] = Field(
        "activation",
        description="`activation`: mean activation times weight norm, and block influence, on the calibration data; "
        "`magnitude`: weight norms; `random`: the control.",
    )
    sparsity: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of the weights to set to 0: of each row with `wanda`, of each matrix with `magnitude`, of "
        "each block of columns with `sparsegpt`.",
    )
    pattern: Pattern = Field(
        "unstructured",
        description="`2:4`, `4:8`: exactly 2 of each 4, or 4 of each 8, weights side by side in a row are 0.",
    )
    damping: float = Field(
        0.01, gt=0, description="SparseGPT: share of the Hessian's mean diagonal that is added to its diagonal."
    )
    column_block: int = Field(128, ge=1, description="SparseGPT: columns whose mask is chosen at a time.")
    calibration_tokens: int = Field(32_768, ge=1, description="Tokens of the train split to measure importance on.")
    evaluation_tokens: int = Field(32_768, ge=1, description="Tokens of the validation split to measure the loss on.")
    seed: int = Field(0, ge=0, description="Seed of the choice of calibration documents, and of `random`.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", affects="nothing", description="Where to compute.")
    threads: int = Field(0, ge=0, affects="nothing", description="CPU threads; 0: all cores.")

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        idle = frozenset[str]().union(*READ.values()) - READ[self.method]
        for name, field in type(self).model_fields.items():
            # By value: a process is handed all parameters, those at their defaults too.
            if name in idle and getattr(self, name) != field.default:
                raise ValueError(f"{name} has no effect with method: {self.method}")
        return self

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.method != "structured" or self.mlp_width_removed or self.heads_removed or self.layers_removed):
            raise ValueError("nothing to remove: set mlp_width_removed, heads_removed or layers_removed")
        return self

    @model_validator(mode="after")
    def _pattern_fits(self) -> Self:
        if self.pattern == "unstructured":
            return self
        gone, size = GROUPS[self.pattern]
        if self.sparsity != gone / size:
            raise ValueError(
                f"pattern {self.pattern} is a sparsity of {gone / size:g}, not {self.sparsity:g}: leave sparsity out"
            )
        if self.column_block % size:
            raise ValueError(f"column_block {self.column_block} cuts the groups of pattern {self.pattern}: take 128")
        return self
