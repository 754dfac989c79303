"""An encoder as one graph, from token ids to what its head says; also decoders that classify and do not generate."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from llmctl.errors import UsageError
from llmctl.nn.attention import PADDING
from llmctl.nn.config import ModelConfig
from llmctl.nn.onnx_attention import OPSET
from llmctl.nn.transformer import Transformer
from llmctl_export_onnx import graph

Pooling = Literal["none", "mean", "cls"]
"""What becomes of the states: nothing further, or one embedding per text."""


class Traced(nn.Module):
    """The transformer with the inputs and outputs of Hugging Face's class for its head, as `outputs` names them."""

    def __init__(self, model: Transformer, pooling: Pooling = "none", normalise: bool = False) -> None:
        super().__init__()
        self.model, self.pooling, self.normalise = model, pooling, normalise

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> list[Tensor]:
        """`input_ids (B, T)`, `attention_mask (B, T)` (0: padding), `token_type_ids (B, T)`, all int64."""
        model, head = self.model, self.model.config.head
        documents = torch.where(attention_mask != 0, 0, PADDING)
        states = model.hidden(input_ids, documents=documents, segments=token_type_ids)
        if head == "features":
            found = [states] if model.pooler is None else [states, model.pooled(states)]
            return found if self.pooling == "none" else [*found, self.embedded(states, attention_mask)]
        if head in ("mlm", "pretraining"):
            return [model.head(states), *([model.next_sentence(states)] if head == "pretraining" else [])]
        logits = model.answer(states, documents)
        return [logits[..., 0], logits[..., 1]] if head == "question-answering" else [logits]

    def embedded(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """One vector per text, `(B, D)`: the mean of its tokens' states, or the first token's."""
        vectors = states[:, 0]
        if self.pooling == "mean":
            real = attention_mask.to(states.dtype)[..., None]
            vectors = (states * real).sum(1) / real.sum(1).clamp(min=1)
        return F.normalize(vectors, dim=-1) if self.normalise else vectors


def outputs(config: ModelConfig, pooling: Pooling = "none") -> list[str]:
    """The names of the graph's outputs, those of transformers. UsageError for pooling where there are no features."""
    if pooling != "none" and config.head != "features":
        raise UsageError(
            f"`pooling` makes an embedding of states, but the model's head is {config.head!r}",
            hint="leave pooling out, or export the model without its head",
        )
    if config.head == "features":
        found = ["last_hidden_state", *(["pooler_output"] if config.has_pooler else [])]
        return found if pooling == "none" else [*found, "sentence_embedding"]
    if config.head == "pretraining":
        return ["logits", "seq_relationship_logits"]
    return ["start_logits", "end_logits"] if config.head == "question-answering" else ["logits"]


def inputs(config: ModelConfig) -> list[str]:
    """The names of the graph's inputs; token types only where there are several."""
    return ["input_ids", "attention_mask", *(["token_type_ids"] if config.token_types > 1 else [])]


def trace(model: Transformer, opset: int, pooling: Pooling = "none", normalise: bool = False) -> ir.Model:
    """Trace `model` with dynamic batch and length."""
    check_opset(opset)
    names = inputs(model.config)
    found = outputs(model.config, pooling)
    # One tensor given twice would be one input.
    examples = tuple(torch.ones(2, 3, dtype=torch.int64) for _ in names)
    axes = {0: "batch_size", 1: "sequence_length"}
    module = Traced(model, pooling, normalise)
    return graph.trace(module, examples, (axes,) * len(names), names, found, opset, "encoder")


def check_opset(opset: int) -> None:
    """UsageError for an operator set without `Attention`."""
    if opset < OPSET:
        raise UsageError(
            f"operator set {opset} has no `Attention`, which encoders need",
            hint=f"leave `opset` out or set it to {OPSET}",
        )
