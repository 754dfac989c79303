"""How fast training is: tokens per second, floating-point operations per token, utilisation. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from llmctl.nn.config import ModelConfig
from llmctl.nn.foreign import ForeignConfig

# Dense bf16 tensor-core peaks of the vendors' data sheets, operations per second, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "B200": 2250e12}


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Tokens over duration; 0 when no time has passed."""
    return tokens / seconds if seconds > 0 else 0.0


def flops_per_token(config: ModelConfig | ForeignConfig, length: int) -> int:
    """Operations of one training step per token in sequences of `length`: forward plus twice as much backward.

    Matrix products only, two operations per multiply-add, attention counted in full as torch's FlopCounterMode does;
    the causal half that kernels may skip is included. The embedding look-up counts nothing, the head does.
    """
    if isinstance(config, ForeignConfig):
        return config.training_flops(length)
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    ffn = (3 if config.traits.ffn == "swiglu" else 2) * config.dim * config.ff_dim
    block = config.dim * (q_dim + 2 * kv_dim) + q_dim * config.dim + ffn
    attention = 2 * q_dim * length  # q k' and weights times v
    return 6 * (config.layers * (block + attention) + config.dim * config.vocab_size)


def utilisation(flops_per_second: float, device: str) -> float | None:
    """Share of the device's bf16 peak (MFU, 2204.02311 appendix B); None for a device whose peak is not known."""
    # The longest name wins: "L40S" is no "L4".
    for name in sorted(PEAKS, key=len, reverse=True):
        if name in device:
            return flops_per_second / PEAKS[name]
    return None


class Throughput:
    """Counts tokens against a clock that only runs while training: validation and saving are taken out."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self.tokens = 0
        self.seconds = 0.0
        self._marked = (0, 0.0)

    def add(self, tokens: int) -> None:
        """Count the tokens of a finished step."""
        now = self._clock()
        self.seconds += now - self._since
        self._since = now
        self.tokens += tokens

    def skip(self) -> None:
        """Forget the time since the last call: it went into something else than training."""
        self._since = self._clock()

    def rate(self) -> float:
        """Tokens per second since the last call of `rate`, whole steps only."""
        tokens, seconds = self._marked
        self._marked = (self.tokens, self.seconds)
        return tokens_per_second(self.tokens - tokens, self.seconds - seconds)

    def overall(self) -> float:
        """Tokens per second since the beginning."""
        return tokens_per_second(self.tokens, self.seconds)
