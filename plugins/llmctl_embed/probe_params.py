"""Parameters of `probe`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmctl.spec.params import Field, Params


class ProbeParams(Params):
    """Measure what the states of models say about labelled words, checkpoint by checkpoint."""

    labels: list[str] = Field(
        default=["labels"],
        min_length=1,
        description="columns to probe: a label for each word, or one for a row, which is then that of all its words",
    )
    steps: list[int] = Field(
        default=[], description="training step of each model, in the order of `models`; none: 1, 2, …"
    )
    untrained: bool = Field(
        default=True, description="probe a model of the same shape with fresh weights as well, as step 0"
    )
    layer: int | None = Field(
        default=None, ge=0, description="states that enter this block, 0 for the embeddings; unset: the last states"
    )
    split: str = Field(default="train", description="split that the probe is fitted on")
    test_split: str = Field(default="validation", description="split that it is measured on")
    limit: int | None = Field(default=None, ge=1, description="read the first rows of each split only")
    l2: float = Field(default=1e-3, gt=0, description="penalty on the probe's weights: l2/2 times their squares")
    seed: int = Field(default=1, ge=0, description="of fresh weights, shuffled labels and labels by chance")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", affects="nothing", description="where the models run"
    )
    threads: int = Field(default=1, ge=0, affects="nothing", description="threads that compute; 0 takes all cores")

    @model_validator(mode="after")
    def _sensible(self) -> ProbeParams:
        if any(step < 0 for step in self.steps) or sorted(set(self.steps)) != sorted(self.steps):
            raise ValueError("steps must be different numbers, none below 0")
        if self.untrained and 0 in self.steps:
            raise ValueError("step 0 is the untrained model: leave it out of steps, or set untrained to false")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a column stands twice in labels")
        if self.split == self.test_split:
            raise ValueError(
                f"split and test_split are both `{self.split}`: a probe is measured on rows it has not seen"
            )
        return self
