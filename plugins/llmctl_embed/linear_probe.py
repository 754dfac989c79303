"""A linear probe: which label a vector has, by multinomial logistic regression on vectors that stay as they are.

What it finds is compared with two controls: a probe on shuffled labels, and the control task of Hewitt and Liang 2019,
in which every word has a label by chance. Accuracy above that of the control task is *selectivity*: what the vectors
say rather than what the probe has learnt by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TOLERANCE, MOST = 1e-6, 1000
"""L-BFGS ends at a gradient below the first, or after so many iterations."""


@dataclass(frozen=True)
class Labelled:
    """`vectors (N, D)` of words, with the word and the label of each."""

    vectors: np.ndarray
    words: Sequence[str]
    labels: Sequence[str]


@dataclass(frozen=True)
class Probed:
    """Shares of the test words that are right, 0 to 1."""

    accuracy: float
    control: float
    """Of the control task: labels by chance, one for each different word."""
    shuffled: float
    """Of a probe that learnt the labels in a shuffled order; what is left to chance."""
    majority: float
    """Of saying the most frequent label always."""

    @property
    def selectivity(self) -> float:
        """Accuracy less that of the control task."""
        return self.accuracy - self.control


@dataclass(frozen=True)
class LinearProbe:
    """`weights (D, K)` and `bias (K,)` float64 over standardised vectors."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def predict(self, vectors: np.ndarray) -> np.ndarray:
        """The class of each of `vectors (N, D)`, `(N,)`."""
        logits = (vectors - self.mean) / self.scale @ self.weights + self.bias
        return np.asarray(logits.argmax(axis=1))


def fit(vectors: np.ndarray, classes: np.ndarray, count: int, l2: float) -> LinearProbe:
    """Minimise the mean cross-entropy plus `l2`/2 times the squared weights, the bias left out, by L-BFGS in float64.

    `vectors (N, D)` are brought to mean 0 and deviation 1 first, since checkpoints differ in scale; `classes (N,)` are
    below `count`. The problem is convex: the result does not depend on where it starts.
    """
    vectors = np.asarray(vectors, np.float64)
    mean, scale = vectors.mean(axis=0), np.maximum(vectors.std(axis=0), 1e-8)
    x = torch.from_numpy((vectors - mean) / scale)
    right = torch.nn.functional.one_hot(torch.from_numpy(np.asarray(classes, np.int64)), count).double()
    weights, bias = torch.zeros(x.shape[1], count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    # The gradient in closed form; with it torch's optimizer needs no graph.
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=MOST, tolerance_grad=TOLERANCE, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        logits = x @ weights + bias
        push = (logits.softmax(1) - right) / len(x)
        weights.grad, bias.grad = x.T @ push + l2 * weights, push.sum(0)
        entropy = (logits.logsumexp(1) - (logits * right).sum(1)).mean()
        return entropy + l2 / 2 * weights.square().sum()

    with torch.no_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]  # torch leaves it without annotations
    return LinearProbe(mean, scale, weights.numpy(), bias.numpy())


def probe(train: Labelled, test: Labelled, l2: float, seed: int) -> Probed:
    """Fit on `train`, measure on `test`, with both controls."""
    names = sorted(set(train.labels))
    random = np.random.default_rng(seed)
    shuffled = [train.labels[place] for place in random.permutation(len(train.labels))]
    chance = labels_by_chance(train, test, random)
    most = max(names, key=list(train.labels).count)
    return Probed(
        accuracy=_accuracy(train, test, train.labels, test.labels, l2),
        control=_accuracy(train, test, [chance[w] for w in train.words], [chance[w] for w in test.words], l2),
        shuffled=_accuracy(train, test, shuffled, test.labels, l2),
        majority=float(np.mean([label == most for label in test.labels])),
    )


def labels_by_chance(train: Labelled, test: Labelled, random: np.random.Generator) -> dict[str, str]:
    """A label for each different word, drawn as often as it is among the words of `train`."""
    words = sorted({*train.words, *test.words})
    return dict(zip(words, random.choice(np.array(train.labels), len(words)).tolist(), strict=True))


def _accuracy(train: Labelled, test: Labelled, learnt: Sequence[str], expected: Sequence[str], l2: float) -> float:
    """A label that was never learnt is never right."""
    number = {name: n for n, name in enumerate(sorted(set(learnt)))}
    found = fit(train.vectors, np.array([number[name] for name in learnt]), len(number), l2).predict(test.vectors)
    return float((found == np.array([number.get(name, -1) for name in expected])).mean())
