"""Parameters of `quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import model_validator

from llmctl import Field, Params

_OF_BLOCKS = ("method", "block_size", "symmetric", "accuracy_level")
_OF_WEIGHTS = (*_OF_BLOCKS, "embedding_bits", "activations")


class QuantizeParams(Params):
    """How weights and the cache are stored, and how much worse the model may become."""

    bits: Literal[0, 4, 8, 16] = Field(
        8,
        description="bits per weight of the matrix products; 0 leaves all weights as they are; 16 is float16, for the "
        "whole graph and its cache. There is no bfloat16: ONNX Runtime multiplies it on CUDA only, and quality is "
        "measured on the CPU",
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
    activations: Literal["auto", "dynamic", "static"] = Field(
        "auto",
        description="what the products read: auto as `accuracy_level` says; in 8 bits per tensor, for integer products "
        "with weights per channel, dynamic: ranges found at run time, static: ranges from `data`",
    )
    calibration: Literal["minmax", "percentile", "entropy"] = Field(
        "minmax",
        description="static ranges: all that `data` shows, the middle `percentile` of it, or clipped by entropy",
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="percentage of the values that `calibration: percentile` keeps"
    )
    smooth: float | None = Field(
        None,
        ge=0,
        le=1,
        description="static: SmoothQuant's alpha, 0.5 in the paper; unset leaves activations as they are",
    )
    reduce_range: bool = Field(
        False, description="dynamic and static: weights in 7 bits, exact on x86 processors without VNNI, too"
    )
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        "auto", description="keys and values in the cache: auto as the graph has them; int8 with scales from `data`"
    )
    calibration_tokens: int = Field(
        16384,
        ge=64,
        description="tokens of `data`, of its training split, that static ranges and an int8 cache's scales come from",
    )
    max_bits_per_byte_rise: float | None = Field(
        None,
        ge=0,
        description="largest relative rise of bits per byte on `data`; default 0.05 at 4 bits, "
        "0.001 at 16 bits, else 0.01",
    )
    min_top1_agreement: float | None = Field(
        None,
        ge=0,
        le=1,
        description="smallest share of tokens on `data` whose likeliest successor stays; default 0.9 with "
        "`activations` dynamic or static, else none",
    )
    eval_tokens: int = Field(16384, ge=64, description="held-out tokens on which quality is measured")
    speed_rounds: int = Field(15, ge=1, affects="nothing", description="rounds of the interleaved speed comparison")
    threads: int = Field(0, ge=0, affects="nothing", description="CPU threads; 0 takes one per physical core")

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> Self:
        """A parameter of what is not done would change nothing."""
        if not self.bits:
            if not self.int8_cache:
                raise ValueError("`bits: 0` leaves nothing to do without `kv_cache_dtype: int8`")
            self._unset(_OF_WEIGHTS, "is about weights, which `bits: 0` leaves as they are")
        if self.half:
            self._unset(_OF_WEIGHTS, "is for weights of 4 or 8 bits, `bits: 16` rounds the whole graph to float16")
            if self.int8_cache:
                raise ValueError("`kv_cache_dtype: int8` needs a float32 graph: the CPU's operator takes no float16")
        if self.integer:
            if self.bits != 8:
                raise ValueError(f"`activations: {self.activations}` multiplies 8-bit weights: `bits: 8`")
            self._unset(
                _OF_BLOCKS, f"is for weights in blocks, `activations: {self.activations}` has one scale a channel"
            )
            if self.embedding_bits == 4:
                raise ValueError(f"`activations: {self.activations}` keeps tables in 8 bits: `embedding_bits: 8`, or 0")
        else:
            self._unset(("reduce_range",), "is for `activations: dynamic` or `static`")
        if self.activations != "static":
            self._unset(("calibration", "smooth"), "is for `activations: static`")
            if not self.calibrated:
                self._unset(("calibration_tokens",), "is for `kv_cache_dtype: int8` or `activations: static`")
        if self.calibration != "percentile":
            self._unset(("percentile",), "is for `calibration: percentile`")
        return self

    def _unset(self, names: tuple[str, ...], why: str) -> None:
        """ValueError for the first of `names` that is not as it is without being given."""
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` {why}")

    def required_inputs(self) -> Mapping[str, str]:
        """See `Params`."""
        if self.activations == "static":
            return {"data": "activations: static"}
        return {"data": "kv_cache_dtype: int8"} if self.int8_cache else {}

    @property
    def integer(self) -> bool:
        """Whether products are of integers, with a scale per output channel and one per tensor of activations."""
        return self.activations != "auto"

    @property
    def half(self) -> bool:
        """Whether the whole graph becomes float16."""
        return self.bits == 16

    @property
    def int8_cache(self) -> bool:
        """Whether keys and values are kept in 8 bits."""
        return self.kv_cache_dtype == "int8"

    @property
    def calibrated(self) -> bool:
        """Whether something is learned from text."""
        return self.int8_cache or self.activations == "static"

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
        return {4: 0.05, 16: 0.001}.get(self.bits, 0.01)

    @property
    def agreement(self) -> float:
        """The smallest top-1 agreement in force; 0 allows any."""
        if self.min_top1_agreement is not None:
            return self.min_top1_agreement
        return 0.9 if self.integer else 0.0
