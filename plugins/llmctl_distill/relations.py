"""MiniLM's losses (2002.10957): how the tokens of a sequence relate to each other in the last layer.

Relations are distributions over tokens, so student and teacher need not be equally wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from llmctl.errors import UsageError
from llmctl.nn.attention import AttentionContext
from llmctl.nn.config import ModelConfig
from llmctl.nn.transformer import Block
from llmctl.train.cross_entropy import wide

UNSEEN = -1e30
"""Score of a token that is not seen: its share is 0, and a difference of two such scores is no NaN."""
Layer = tuple[Block, Tensor, AttentionContext]
"""A block, what entered it `(B, T, D)`, and what its attention was told."""


def relation_heads(student: ModelConfig, teacher: ModelConfig) -> int:
    """Into how many equal parts the values of both are cut: as many as both have key/value heads, if it can be."""
    return math.gcd(student.kv_heads, teacher.kv_heads)


def check_relations(student: ModelConfig, teacher: ModelConfig, kinds: str) -> None:
    """UsageError if the attention weights of the last layers cannot be compared."""
    if kinds in ("attention", "both") and student.heads != teacher.heads:
        raise UsageError(
            f"relations {kinds}: the student has {student.heads} attention heads, the teacher {teacher.heads}",
            hint="attention weights are compared head by head; set relations to values",
        )
    for config in (student, teacher):
        if config.traits.positions == "xl" and kinds in ("attention", "both"):
            raise UsageError(
                f"relations {kinds}: a model of the family {config.arch} adds distances of its own to its scores",
                hint="set relations to values",
            )


@dataclass(frozen=True)
class RelationLoss:
    """KL(teacher, student) of what each token attends to, and of the softmax of its value's products with those of the
    tokens before it, over the root of their width; means over heads, sums over tokens."""

    own: int
    """The student's layer, from 0."""
    goal: int
    """The teacher's."""
    kinds: str
    heads: int
    """Parts that values are cut into."""

    def between(self, student: Layer, teacher: Layer, picks: Tensor) -> Tensor:
        """Of the two layers' relations of the tokens at `picks (N,)`, flat indices."""
        own = self._scores(*student)
        with torch.no_grad():
            goal = self._scores(*teacher)
        return torch.stack([_divergence(*pair, picks) for pair in zip(own, goal, strict=True)]).sum()

    def _scores(self, block: Block, entered: Tensor, context: AttentionContext) -> list[Tensor]:
        """Of the kinds of relations, `(B, heads, T, T)` each."""
        q, k, v = block.attention.project(block.attention_input(block.mixed(entered, context)))
        found = []
        if self.kinds in ("attention", "both"):
            found.append(_attention(q, k, block.attention.layer, context))
        if self.kinds in ("values", "both"):
            found.append(_products(v, self.heads, context))
        return found


def _attention(q: Tensor, k: Tensor, layer: int, context: AttentionContext) -> Tensor:
    """Scores `(B, H, T, T)` whose softmax the layer's attention is."""
    config = context.config
    q, k = context.rotated(q, k, layer)
    q, k = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(config.heads // config.kv_heads, dim=1)
    scores = wide(q @ k.transpose(-1, -2)) * config.scale
    if config.attention_softcap:
        scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
    if context.bias is not None:
        scores = scores + context.bias
    return _seen(scores, context, config.layer_window(layer))


def _products(v: Tensor, heads: int, context: AttentionContext) -> Tensor:
    """Products `(B, heads, T, T)` of values, over the root of their width."""
    v = wide(v.reshape(*v.shape[:2], heads, -1).transpose(1, 2))
    return _seen(v @ v.transpose(-1, -2) * v.shape[-1] ** -0.5, context, 0)


def _seen(scores: Tensor, context: AttentionContext, window: int) -> Tensor:
    """`scores (B, H, T, T)` without those of tokens behind, or of another document."""
    every = slice(0, scores.shape[-1])
    return scores.masked_fill(~context.visible(window, every, every, scores.device), UNSEEN)


def _divergence(own: Tensor, goal: Tensor, picks: Tensor) -> Tensor:
    """KL(goal, own) of the rows at `picks`, summed over them, of scores `(B, H, T, T)`; the mean over heads."""
    rows = [scores.transpose(1, 2).flatten(0, 1).index_select(0, picks).log_softmax(-1) for scores in (own, goal)]
    return F.kl_div(rows[0], rows[1], reduction="sum", log_target=True) / own.shape[1]
