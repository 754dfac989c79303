"""What word2vec and GloVe minimise, over whole matrices of counts: any optimiser may be put on them.

With as many dimensions as words both have a closed optimum (Levy & Goldberg 2014; Pennington et al. 2014), which the
steps of `word2vec.py` and `glove.py` are held against.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def sgns_loss(scores: Tensor, counts: Tensor, noise: Tensor, negative: float) -> Tensor:
    """Expected loss of skip-gram with negative sampling, summed over all pairs.

    `scores (V, V)` are the products of word and context vectors, `counts (V, V)` how often a word has a context, `noise
    (V)` the distribution that wrong contexts are drawn from. Its minimum is `log(C / (C.sum(1) noise)) - log negative`.
    """
    wrong = negative * counts.sum(1, keepdim=True) * noise
    return -(counts * F.logsigmoid(scores) + wrong * F.logsigmoid(-scores)).sum()


def sgns_sample_loss(inputs: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Loss of drawn examples: `inputs (B, D)`, vectors of right words `(B, D)`, of wrong ones `(B, K, D)`."""
    positive = (inputs * right).sum(-1)
    return -(F.logsigmoid(positive).sum() + F.logsigmoid(-(wrong @ inputs.unsqueeze(-1))).sum())


def glove_weights(counts: Tensor, x_max: float, exponent: float) -> Tensor:
    """The share of `x_max` to `exponent`, at most 1."""
    return (counts / x_max).clamp(max=1.0) ** exponent


def glove_loss(scores: Tensor, counts: Tensor, x_max: float, exponent: float) -> Tensor:
    """Half the weighted squares, summed. `scores` are products plus both biases, of counts above 0; any shape.

    The minimum is `log counts`.
    """
    return 0.5 * (glove_weights(counts, x_max, exponent) * (scores - counts.log()) ** 2).sum()
