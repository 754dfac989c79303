"""What a training on preferences will take."""

from __future__ import annotations

from collections.abc import Mapping

from llmctl.forecast import Forecast, Given
from llmctl.train.forecasting import answers
from llmctl_rlhf.params import RlhfParams


def forecast(params: RlhfParams, inputs: Mapping[str, Given]) -> Forecast:
    """Two answers per pair, each as long as the context."""
    return answers(params, inputs, per_row=2)
