"""Reading with the torch model: states and head logits of whole texts, named as an ONNX bundle names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmctl.errors import InputError, UsageError
from llmctl.nn.attention import PADDING
from llmctl.nn.hf import load_model
from llmctl.nn.transformer import Transformer
from llmctl.train.generate import pick_device


def open_reader(directory: Path, device: str = "auto", threads: int = 0, *, states: bool = False) -> TorchReader:
    """Open a `model.hf` directory to read with it; `states` leaves out whatever head it has.

    Raises MachineError without the device, InputError if damaged or an encoder-decoder.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    model = load_model(directory, pick_device(device))
    if model.config.traits.kind == "encoder-decoder":
        raise InputError(
            f"{directory} holds an encoder-decoder, which answers and has no head to read with",
            hint="give it rows of task seq2seq",
        )
    return TorchReader(model, states=states)


class TorchReader:
    """Reads batches of token ids; see `llmctl.reader.Reader`."""

    def __init__(self, model: Transformer, *, states: bool = False) -> None:
        self.model = model.eval()
        self.states = states
        self.labels = model.config.labels
        self.context_length = model.config.context
        self.backend = f"torch {model.embedding.weight.device} float32"

    @torch.inference_mode()
    def run(
        self, rows: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None = None
    ) -> dict[str, np.ndarray]:
        """See `Reader.run`. UsageError for an empty row, or one longer than the context."""
        for row in rows:
            if not 1 <= len(row) <= self.context_length:
                raise UsageError(
                    f"a text of {len(row)} tokens cannot be read, the model's context is {self.context_length}",
                    hint="give at least one token and at most a context of them",
                )
        device, width = self.model.embedding.weight.device, max(map(len, rows))
        tokens, documents = _padded(rows, width, 0), _padded([[0] * len(row) for row in rows], width, PADDING)
        known = segments is not None and self.model.config.token_types > 1  # as in training
        types = _padded(segments, width, 0).to(device) if segments is not None and known else None
        documents = documents.to(device)
        states = self.model.hidden(tokens.to(device), documents=documents, segments=types)
        return {name: value.float().cpu().numpy() for name, value in self._outputs(states, documents).items()}

    def _outputs(self, states: Tensor, documents: Tensor) -> dict[str, Tensor]:
        head = self.model.config.head
        if self.states or head == "features":
            return {"last_hidden_state": states}
        if head in ("lm", "mlm", "pretraining"):
            return {"logits": self.model.head(states)}
        logits = self.model.answer(states, documents)
        if head == "question-answering":
            return {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}
        return {"logits": logits}


def _padded(rows: Sequence[Sequence[int]], width: int, padding: int) -> Tensor:
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
