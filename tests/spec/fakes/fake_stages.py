"""A registry of tiny stages that are declared but never run."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmctl import In, Out, Stage
from llmctl.registry import Origin


def stage(name: str, params: str, inputs: dict[str, In], outputs: dict[str, Out], **more) -> Stage:
    return Stage(
        name=name,
        help="A fake.",
        params=f"fake_params:{params}",
        run="none:run",
        inputs=inputs,
        outputs=outputs,
        **more,
    )


MODEL, METRICS = Out("model.hf"), Out("metrics")
STAGES = [
    stage(
        "data",
        "DataParams",
        {"files": In("files", optional=True, many=True)},
        {"text": Out("dataset.text"), "chat": Out("dataset.chat"), "extra": Out("dataset.chat"), "metrics": METRICS},
    ),
    stage(
        "tokenize",
        "TokenizeParams",
        {"text": In("dataset.text"), "tokenizer": In("tokenizer", optional=True)},
        {"tokenizer": Out("tokenizer"), "tokens": Out("dataset.tokens"), "metrics": METRICS},
    ),
    stage(
        "train-pretrain",
        "TrainParams",
        {"tokens": In("dataset.tokens"), "tokenizer": In("tokenizer")},
        {"model": MODEL, "metrics": METRICS},
    ),
    stage(
        "sft",
        "TrainParams",
        {"model": In("model.hf"), "data": In("dataset.chat")},
        {"model": MODEL, "metrics": METRICS},
    ),
    stage(
        "eval",
        "EvalParams",
        {"model": In("model.hf", "model.onnx"), "data": In("dataset.tokens", "dataset.chat", many=True)},
        {"metrics": METRICS},
    ),
    stage("export-onnx", "PlainParams", {"model": In("model.hf")}, {"model": Out("model.onnx"), "metrics": METRICS}),
    stage(
        "quantize",
        "PlainParams",
        {"model": In("model.hf", "model.onnx")},
        {"model": Out(same_as="model"), "metrics": METRICS},
    ),
    stage("serve", "PlainParams", {"model": In("model.onnx")}, {"receipt": Out("deployment")}, effect=True),
    stage("ship", "RequiredParams", {"model": In("model.onnx")}, {"receipt": Out("deployment")}),
    stage("broken", "NoSuchClass", {}, {}),
]


@dataclass
class FakeRegistry:
    stages: dict[str, Stage] = field(default_factory=lambda: {stage.name: stage for stage in STAGES})

    def origin(self, stage_name: str) -> Origin:
        return Origin(dist="fakes", version="1.4.0", editable=False)
