"""Store a model's weights and cache in fewer bits, multiply integers, and measure what that costs."""

from __future__ import annotations

from llmctl import In, Out, Stage, hookimpl

QUANTIZE = Stage(
    name="quantize",
    help="Store a model's weights and cache in fewer bits and measure what that costs.",
    inputs={
        "model": In("model.onnx"),
        "data": In(
            "dataset.tokens",
            "dataset.chat",
            optional=True,
            help="text of the quality check, of static ranges and of an int8 cache's scales",
        ),
    },
    outputs={"model": Out(same_as="model"), "metrics": Out("metrics")},
    params="llmctl_quantize.params:QuantizeParams",
    run="llmctl_quantize.run:run",
    extra="optimum",
    rev=2,  # scales and ranges reach as far as every adapter, and each is judged
    headline=("bytes.ratio", "cache.bytes_per_token"),
)


@hookimpl
def register_stages() -> list[Stage]:
    """Offer the stage `quantize`."""
    return [QUANTIZE]
