"""Parts that only an objective needs: trained and checkpointed with the model, saved beside its weights, never in them.

`Transformer.auxiliary` holds them, so that the directory's own tensors stay those of its family.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmctl.errors import InputError, StageError
from llmctl.nn.transformer import Transformer

FILE = "auxiliary.safetensors"
POSITION_DIM = 200
"""Width of SpanBERT's relative position embeddings."""


class SpanBoundary(nn.Module):
    """SpanBERT's boundary objective (1907.10529, section 3.2): a token of a masked span is predicted from the tokens
    just outside the span and from how far into the span it stands, by two layers of GELU and LayerNorm.
    """

    def __init__(self, dim: int, longest: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(longest, POSITION_DIM)
        self.first, self.first_norm = nn.Linear(2 * dim + POSITION_DIM, dim), nn.LayerNorm(dim)
        self.second, self.second_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        for table in (self.positions, self.first, self.second):
            nn.init.normal_(table.weight, std=0.02)
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.bias)

    def forward(self, left: Tensor, right: Tensor, offset: Tensor) -> Tensor:
        """States of the outer tokens `(N, D)` twice and places in the span `(N,)` from 0, to states `(N, D)`.

        Tokens further in than the longest span share the last position.
        """
        places = self.positions(offset.clamp(max=self.positions.num_embeddings - 1))
        h = self.first_norm(F.gelu(self.first(torch.cat([left, right, places], dim=-1))))
        return self.second_norm(F.gelu(self.second(h)))  # type: ignore[no-any-return]


def add_boundary(model: Transformer, longest: int, directory: Path | None = None) -> None:
    """Give `model` a SpanBoundary: that of `directory` where one is saved beside the model, else a fresh one.

    InputError for a damaged file, or one that belongs to another model.
    """
    boundary = SpanBoundary(model.config.dim, longest)
    path = directory / FILE if directory is not None else None
    if path is not None and path.is_file():
        wanted = boundary.state_dict()
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged: {error}", hint="copy it again, or delete it to begin anew") from error
        mine = {name.removeprefix("boundary."): tensor for name, tensor in found.items()}
        if {name: tensor.shape for name, tensor in mine.items()} != {n: t.shape for n, t in wanted.items()}:
            raise InputError(
                f"{path} does not fit a model of width {model.config.dim} with spans of up to {longest}",
                hint="set span_max to what it was trained with, or delete the file to begin anew",
            )
        boundary.load_state_dict(mine)
    model.auxiliary["boundary"] = boundary


def save_auxiliary(model: Transformer, directory: Path) -> None:
    """Write what `model.auxiliary` holds to `auxiliary.safetensors`; nothing where it is empty."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.auxiliary.state_dict().items()}
    if not tensors:
        return
    try:
        save_file(tensors, directory / FILE, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise StageError(f"cannot write {FILE}: {error}", hint="is the disk full?") from error
