"""What a distillation will take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmctl.forecast import Forecast, Given
from llmctl.nn.counts import count, forward_flops
from llmctl.train.activations import FLOAT
from llmctl.train.forecasting import answers, config_of
from llmctl_distill.params import DistillParams


def forecast(params: DistillParams, inputs: Mapping[str, Given]) -> Forecast:
    """The student's training, with the teacher's weights and logits beside it."""
    teacher, found = config_of(inputs["teacher"], "teacher"), answers(params, inputs, "student")
    logits = found.memory.get("logits", 0)
    memory = {**found.memory, "teacher": FLOAT * count(teacher).total}
    if logits:
        memory["logits"] = 3 * logits  # the teacher's, and log-probabilities of both
    operations = found.operations_per_token + forward_flops(teacher, found.config.context)
    return replace(found, memory=memory, operations_per_token=operations)
