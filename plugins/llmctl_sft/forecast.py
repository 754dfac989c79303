"""What a fine-tuning will take."""

from __future__ import annotations

from collections.abc import Mapping

from llmctl.forecast import Forecast, Given
from llmctl.train.forecasting import answers
from llmctl_sft.params import SftParams


def forecast(params: SftParams, inputs: Mapping[str, Given]) -> Forecast:
    """As if every conversation filled the context."""
    return answers(params, inputs)
