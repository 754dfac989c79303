"""Parameters of `export-onnx`."""

from __future__ import annotations

from typing import Literal

from llmctl import Field, Params

Task = Literal[
    "auto",
    "text-generation-with-past",
    "text2text-generation-with-past",
    "feature-extraction",
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
]


class ExportParams(Params):
    """How the graph is made, and how close to the model it must be."""

    exporter: Literal["auto", "native", "optimum"] = Field(
        "auto", description="native: our transformer, fused; optimum: any other architecture; auto: by config.json"
    )
    task: Task = Field("auto", description="what an Optimum export computes; auto: by the architecture's name")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32",
        description="of weights and computation. bfloat16 is refused: ONNX Runtime has it on CUDA only, "
        "and exports are proved on the CPU",
    )
    pooling: Literal["auto", "none", "mean", "cls"] = Field(
        "auto",
        description="an encoder's features: also one embedding per text, the mean of its tokens or the first; "
        "auto: as the model's `1_Pooling` says, none without it",
    )
    normalise: bool | None = Field(
        None, description="embeddings get length 1. Unset: as the model's `modules.json` says, yes without it"
    )
    adapter_names: list[str] = Field(
        [], description="what clients call the `adapters`, in their order; default: the names of their directories"
    )
    opset: int = Field(23, ge=18, le=23, description="version of the ONNX operator set; Optimum is given at most 18")
    tolerance: float = Field(1e-4, gt=0, description="largest difference of any output from the torch model's")
    parity_prompts: int = Field(20, ge=1, description="prompts on which outputs and 64 greedy tokens are compared")
    seed: int = Field(0, ge=0, description="draws the prompts of the comparison where there is no `data`")
    threads: int = Field(0, ge=0, affects="nothing", description="CPU threads; 0 takes one per physical core")
