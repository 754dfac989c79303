"""Parameters of `quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import model_validator

from llmctl import Field, Params

_OF_WEIGHTS = ("method", "block_size", "symmetric", "accuracy_level", "embedding_bits")


class QuantizeParams(Params):
    """How weights and the cache are stored, and how much worse the model may become."""

    bits: Literal[0, 4, 8] = Field(
        8, description="bits per weight of the matrix products; 0 leaves all weights as they are"
    )
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
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        "auto", description="keys and values in the cache: auto as the graph has them; int8 with scales from `data`"
    )
    calibration_tokens: int = Field(
        16384,
        ge=64,
        description="tokens of `data`, of its training split, that the scales of an int8 cache come from",
    )
    max_bits_per_byte_rise: float | None = Field(
        None, ge=0, description="largest relative rise of bits per byte on `data`; default 0.05 at 4 bits, else 0.01"
    )
    eval_tokens: int = Field(16384, ge=64, description="held-out tokens on which quality is measured")
    speed_rounds: int = Field(15, ge=1, affects="nothing", description="rounds of the interleaved speed comparison")
    threads: int = Field(0, ge=0, affects="nothing", description="CPU threads; 0 takes one per physical core")

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> Self:
        """A parameter of what is not done would change nothing."""
        fields = type(self).model_fields
        if not self.bits:
            if not self.int8_cache:
                raise ValueError("`bits: 0` leaves nothing to do without `kv_cache_dtype: int8`")
            vain = [name for name in _OF_WEIGHTS if getattr(self, name) != fields[name].default]
            if vain:
                raise ValueError(f"`{vain[0]}` is about weights, which `bits: 0` leaves as they are")
        if not self.int8_cache and self.calibration_tokens != fields["calibration_tokens"].default:
            raise ValueError("`calibration_tokens` is for `kv_cache_dtype: int8`")
        return self

    def required_inputs(self) -> Mapping[str, str]:
        """See `Params`."""
        return {"data": "kv_cache_dtype: int8"} if self.int8_cache else {}

    @property
    def int8_cache(self) -> bool:
        """Whether keys and values are kept in 8 bits."""
        return self.kv_cache_dtype == "int8"

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
