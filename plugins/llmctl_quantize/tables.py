"""Rounding one matrix to blocks of few bits: what a method is. The layout is MatMulNBits's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Parts of a block's range, at either end, that `search` tries."""
_ROWS = 2048


@dataclass(frozen=True)
class Table:
    """A matrix `(N, K)` in blocks along K. A value is `(code - zero point) * scale`."""

    values: np.ndarray
    """Codes, `(N, blocks, block * bits / 8)` uint8; of two 4-bit codes in a byte the first is the lower half."""
    scales: np.ndarray
    """`(N, blocks)` float32."""
    zero_points: np.ndarray | None
    """Packed like the codes, `(N, ceil(blocks * bits / 8))` uint8; None: all are 2 ** (bits - 1)."""


Method = Callable[[np.ndarray, int, int, bool], Table]
"""`(matrix (N, K) float32, bits, block, symmetric) -> Table`; K is padded with zeros to whole blocks."""


def round_to_nearest(matrix: np.ndarray, bits: int, block: int, symmetric: bool) -> Table:
    """Scale and zero point from each block's smallest and largest weight, by ONNX Runtime's own kernel."""
    with _root_logger_kept():
        from onnxruntime.quantization import matmul_nbits_quantizer as ort

    config = ort.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    kernel = ort.DefaultWeightOnlyQuantizer(config)
    values, scales, zero_points = kernel.qbits_block_quant(np.ascontiguousarray(matrix.T))
    rows, blocks = values.shape[:2]
    return Table(values, scales.reshape(rows, blocks), None if symmetric else zero_points.reshape(rows, -1))


def search(matrix: np.ndarray, bits: int, block: int, symmetric: bool) -> Table:
    """For each block the clipped range with the smallest squared error; never worse than its whole range.

    Clipping the few largest weights makes the steps between all others finer (OCTAV, 2206.06501, searches the same).
    ONNX Runtime's k-quant does this too but rounds its zero points afterwards, and ends above round to nearest:
    relative RMS error of Gaussian weights, 4 bits, block 32: .0824 (k-quant), .0811 (nearest), .0785 (here).
    """
    parts = [_search(matrix[row : row + _ROWS], bits, block, symmetric) for row in range(0, len(matrix), _ROWS)]
    codes, scales, zeros = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Table(_pack(codes, bits), scales, None if symmetric else _pack(zeros, bits))


METHODS: dict[str, Method] = {"rtn": round_to_nearest, "search": search}


def _search(matrix: np.ndarray, bits: int, block: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `(N, blocks, block)`, scales and zero points `(N, blocks)` of some rows."""
    rows, columns = matrix.shape
    blocks = -(-columns // block)
    x = np.zeros((rows, blocks * block), np.float32)
    x[:, :columns] = matrix
    x = x.reshape(rows, blocks, block)
    error = np.full((rows, blocks), np.inf, np.float32)
    codes = np.zeros(x.shape, np.uint8)
    scales, zeros = np.ones((rows, blocks), np.float32), np.zeros((rows, blocks), np.uint8)
    for scale, zero in _ranges(x, bits, symmetric):
        scale = np.where(scale == 0, np.float32(1), scale)
        tried = np.clip(np.rint(x / scale[..., None]) + zero[..., None], 0, 2**bits - 1)
        found = (((tried - zero[..., None]) * scale[..., None] - x) ** 2).sum(axis=2)
        better = found < error
        error[better], scales[better] = found[better], scale[better]
        codes[better], zeros[better] = tried[better].astype(np.uint8), zero[better].astype(np.uint8)
    return codes, scales, zeros


def _ranges(x: np.ndarray, bits: int, symmetric: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scales and zero points, each `(N, blocks)` float32, to try for the blocks `x (N, blocks, block)`."""
    top, half = 2**bits - 1, 2 ** (bits - 1)
    low, high = np.minimum(x.min(axis=2), 0), np.maximum(x.max(axis=2), 0)
    if symmetric:
        # Codes reach one step further down than up, so the larger end goes down, under a negative scale if need be.
        extreme = np.where(-low > high, low, high)
        for ratio in RATIOS:
            yield extreme * np.float32(ratio / -half), np.full(extreme.shape, half, np.float32)
        return
    for lower in RATIOS:
        for upper in RATIOS:
            scale = (high * np.float32(upper) - low * np.float32(lower)) / np.float32(top)
            safe = np.where(scale == 0, np.float32(1), scale)
            yield scale, np.clip(np.rint(-low * np.float32(lower) / safe), 0, top)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis into bytes, the first of two in the lower half."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    packed: np.ndarray = codes[..., ::2] | (codes[..., 1::2] << 4)
    return packed


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[Any]:
    """Importing ONNX Runtime's quantizer sets up the root logger at INFO, which is not its business."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
