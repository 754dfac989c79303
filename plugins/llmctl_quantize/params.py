"""Parameters of `quantize`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from llmctl import Field, Params


class QuantizeParams(Params):
    """How weights are stored, and how much worse the model may become."""

    bits: Literal[4, 8] = Field(8, description="bits per weight of the matrix products")
    method: Literal["rtn", "hqq", "k-quant"] = Field(
        "rtn",
        description="how scales are found: round to nearest, half-quadratic (HQQ), k-quant",
    )
    block_size: Literal[0, 16, 32, 64, 128, 256] = Field(
        0, description="weights that share a scale; 0 means 32 at 4 bits and 64 at 8 bits"
    )
    symmetric: bool = Field(False, description="no zero points: a little smaller, a little less exact (rtn only)")
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
    threads: int = Field(0, ge=0, affects="nothing", description="CPU threads; 0 takes all cores")

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        if self.symmetric and self.method != "rtn":
            raise ValueError(f"method {self.method} always has zero points; leave `symmetric` out")
        if self.method == "hqq" and self.bits != 4:
            raise ValueError("method hqq works at 4 bits only: ONNX Runtime has no kernel for its zero points at 8")
        return self

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
