"""Parameters of `quantize`."""

from __future__ import annotations

from typing import Literal

from llmctl import Field, Params


class QuantizeParams(Params):
    """How weights are stored, and how much worse the model may become."""

    bits: Literal[4, 8] = Field(8, description="bits per weight of the matrix products")
    method: Literal["auto", "rtn", "search"] = Field(
        "auto",
        description="rtn: round to nearest; search: clip each block best first; auto: search at 4 bits",
    )
    block_size: Literal[0, 16, 32, 64, 128, 256] = Field(
        0, description="weights that share a scale; 0 means 32 at 4 bits and 64 at 8 bits"
    )
    symmetric: bool = Field(False, description="no zero points: a little smaller, a little less exact")
    accuracy_level: Literal[0, 1, 4] = Field(
        4, description="activations in the products: 0 and 1 float32, 4 rounded to int8, which is faster"
    )
    embedding_bits: Literal[0, 4, 8] = Field(
        8, description="bits of embedding tables and of a head tied to one; 0 leaves them as they are"
    )
    max_bits_per_byte_rise: float | None = Field(
        None, ge=0, description="largest relative rise of bits per byte on `data`; default 0.01 at 8 bits, 0.05 at 4"
    )
    eval_tokens: int = Field(16384, ge=64, description="held-out tokens on which quality is measured")
    speed_rounds: int = Field(15, ge=1, affects="nothing", description="rounds of the interleaved speed comparison")
    threads: int = Field(0, ge=0, affects="nothing", description="CPU threads; 0 takes one per physical core")

    @property
    def rounding(self) -> str:
        """The method in force; at 8 bits clipping gains nothing."""
        if self.method != "auto":
            return self.method
        return "search" if self.bits == 4 else "rtn"

    @property
    def block(self) -> int:
        """The block size in force."""
        return self.block_size or (32 if self.bits == 4 else 64)

    @property
    def budget(self) -> float:
        """The relative rise of bits per byte in force."""
        if self.max_bits_per_byte_rise is not None:
            return self.max_bits_per_byte_rise
        return 0.05 if self.bits == 4 else 0.01
